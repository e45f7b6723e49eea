"""`generate()` of models whose encoder is fast: the same tokens, and the same logits at every step."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastencoder import to_fast

from .. import tiny
from ..conformance import batches, weights

SEQ2SEQ = {
    "vocab_size": 60,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "vocab_size": 60,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 80,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 20}
WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None}
MODELS: dict[str, Any] = {
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**SEQ2SEQ, max_position_embeddings=40)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "t5, gated": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SEQ2SEQ, **WHISPER)),
}


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    weights.sharpen(model)
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return model, {"input_features": torch.randn(4, 8, 24, generator=generator)}
    mask = batches.mask(batches.RIGHT)
    return model, {"input_ids": torch.randint(5, 60, mask.shape, generator=generator), "attention_mask": mask}


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_logits=True, **options)


def logits_of(generated: Any) -> torch.Tensor:
    """`[steps, rows, vocabulary]`; tokens that are ruled out have minus infinity."""
    return torch.stack(list(generated.logits)).clamp(min=-1e4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_logits(name: str, beams: int) -> None:
    stock, inputs = build(name)
    fast = to_fast(copy.deepcopy(stock))
    theirs, ours = (generate(model, inputs, num_beams=beams, do_sample=False) for model in (stock, fast))
    assert torch.equal(ours.sequences, theirs.sequences)
    logits = [logits_of(found) for found in (ours, theirs)]
    assert tiny.relative_error(*logits) < 1e-5
    assert (logits[1][:, 0] - logits[1][:, beams]).std() > 0.1, "the answers do not depend on the inputs"
    assert tiny.calls(fast) == (2, 0)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_sampling_with_a_seed(name: str) -> None:
    stock, inputs = build(name)
    fast = to_fast(copy.deepcopy(stock))
    found = []
    for model in (fast, stock):
        torch.manual_seed(7)
        found.append(generate(model, inputs, do_sample=True, top_k=5))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert tiny.relative_error(*map(logits_of, found)) < 1e-5


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_outputs_that_are_given(name: str) -> None:
    """The encoder runs once, by itself, and its answer goes into `generate`."""
    stock, inputs = build(name)
    fast = to_fast(copy.deepcopy(stock))
    with torch.inference_mode():
        encoded = fast.get_encoder()(**inputs)
    expected = generate(stock, inputs, do_sample=False)
    got = generate(fast, {"attention_mask": inputs["attention_mask"]}, encoder_outputs=encoded, do_sample=False)
    assert torch.equal(got.sequences, expected.sequences)
    assert tiny.relative_error(logits_of(got), logits_of(expected)) < 1e-5
    assert tiny.calls(fast) == (2, 0)
