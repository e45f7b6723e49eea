"""Tokenizers and processors for tiny models, made on the spot, and what goes through them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

TEXT = "a the cat dog bird sat ran flew on under over mat log tree red green blue small large and then it was not"
WORDS = TEXT.split()
SENTENCES = [
    "the cat sat on the mat",
    "dog",
    "a small red bird flew over the large tree and then it was not blue",
    "it ran",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(pad: int = 0) -> Any:
    """One token a word, between [CLS] and [SEP]; `pad` is the token of padding."""
    tokens = [*SPECIAL, *WORDS]
    tokens[0], tokens[pad] = tokens[pad], tokens[0]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", "attention_mask"], eos_token="[SEP]", **names
    )


def image_processor(model_type: str, size: tuple[int, int]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if model_type == "yolos":
            return transformers.YolosImageProcessor(size={"height": size[0], "width": size[1]})
        return transformers.ViTImageProcessor(size={"height": size[0], "width": size[1]})


def images(count: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (24, 40, 3), dtype=np.uint8)) for _ in range(count)]


def wave_extractor() -> Any:
    """Raw samples, with the mask of models that were trained with one."""
    return transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000, return_attention_mask=True)


def mel_extractor(bins: int, frames: int) -> Any:
    """Log-mel frames as Whisper takes them, all clips padded to `frames`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few bins leave some filters empty
        return transformers.WhisperFeatureExtractor(
            feature_size=bins, sampling_rate=100 * frames, hop_length=100, chunk_length=1
        )


def waves(lengths: tuple[int, ...] = (350, 120, 700)) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    tones = [np.sin(np.arange(length) / (3 + index)) for index, length in enumerate(lengths)]
    return [(tone + generator.normal(size=len(tone)) / 2).astype(np.float32) for tone in tones]


def ctc_tokenizer(folder: Any, size: int) -> Any:
    """Letters for the outputs of a CTC head of `size`."""
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *(chr(ord("a") + index) for index in range(size - 5))]
    path = folder / "vocab.json"
    path.write_text("{" + ", ".join(f'"{letter}": {index}' for index, letter in enumerate(letters)) + "}")
    return transformers.Wav2Vec2CTCTokenizer(str(path))


def difference(got: Any, expected: Any) -> float:
    """The largest difference of two numbers in answers of pipelines; infinite where anything else differs."""
    if isinstance(expected, dict) and isinstance(got, dict) and got.keys() == expected.keys():
        return max((difference(got[key], expected[key]) for key in expected), default=0.0)
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)) and len(got) == len(expected):
        return max((difference(*pair) for pair in zip(got, expected, strict=True)), default=0.0)
    if isinstance(expected, (float, np.floating)) and math.isfinite(got):
        return abs(float(got) - float(expected))
    return 0.0 if type(got) is type(expected) and got == expected else math.inf
