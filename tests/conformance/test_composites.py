"""Whole models as users have them: two towers, an encoder before a decoder, heads, generation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import fastencoder
from fastencoder.layers import FastLayer

from . import batches, measure, weights
from .cases_post_ln import SEQ2SEQ, TEXT, WAV2VEC2
from .cases_pre_ln import VISION
from .fast import calls

TEXT_TOWER = {**TEXT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def pair(model: nn.Module, **inputs: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """(stock, fast) of a sharpened model in eval mode; with inputs, every layer is fitted to them."""
    weights.sharpen(model.eval())
    if inputs:
        layers = [module for module in model.modules() if type(module).__name__.endswith("Layer")]
        weights.calibrate(layers, lambda: model(**inputs, use_cache=False))
    return model, fastencoder.to_fast(copy.deepcopy(model))


def ids(rows: int, size: int, vocab: int = 60) -> torch.Tensor:
    return torch.randint(5, vocab, (rows, size), generator=torch.Generator().manual_seed(5))


def pixels(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(6))


def fast_classes(model: nn.Module) -> dict[str, int]:
    """Name of the original class -> how many fast layers of it there are."""
    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, FastLayer):
            counts[module.original_class.__name__] = counts.get(module.original_class.__name__, 0) + 1
    return counts


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_two_towers(name: str) -> None:
    """Both towers share one layer class; CLIP's text is causal, SigLIP's pooled where padding may be."""
    config = getattr(transformers, f"{name}Config")(text_config=TEXT_TOWER, vision_config=VISION)
    stock, fast = pair(getattr(transformers, f"{name}Model")(config))
    assert fast_classes(fast) == {f"{name}EncoderLayer": 4}
    batch = batches.Batch(
        {"input_ids": ids(4, 13), "attention_mask": batches.mask(batches.RIGHT), "pixel_values": pixels(2)}
    )
    exact = measure.run(copy.deepcopy(stock).double(), batch.to(torch.float64))
    ours = measure.run(fast, batch)
    real = batch.inputs["attention_mask"].bool()
    text_ours, text_exact = (output.text_model_output.last_hidden_state[real] for output in (ours, exact))
    assert measure.error(text_ours, text_exact) <= measure.FP32_BAR
    vision_ours, vision_exact = (output.vision_model_output.last_hidden_state for output in (ours, exact))
    assert measure.error(vision_ours, vision_exact) <= measure.FP32_BAR
    assert calls(fast) == (2, 2)


def bert2bert() -> nn.Module:
    encoder, decoder = transformers.BertConfig(**TEXT), transformers.BertConfig(**TEXT)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 3
    return transformers.EncoderDecoderModel(config=config)


GENERATORS = {
    "bart": (lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ)), "BartEncoderLayer"),
    "marian": (
        lambda: transformers.MarianMTModel(transformers.MarianConfig(**{**SEQ2SEQ, "decoder_start_token_id": 1})),
        "MarianEncoderLayer",
    ),
    "mbart": (
        lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**SEQ2SEQ)),
        "MBartEncoderLayer",
    ),
    "bert2bert": (bert2bert, "BertLayer"),
}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(name: str, beams: int) -> None:
    """Only the encoder is converted; its output goes through beam expansion and the decoder's cross-attention."""
    make, layer_class = GENERATORS[name]
    torch.manual_seed(0)
    inputs = {"input_ids": ids(4, 13), "attention_mask": batches.mask(batches.RIGHT)}
    stock, fast = pair(make(), **inputs, decoder_input_ids=ids(4, 6))
    assert fast_classes(fast) == {layer_class: 2}
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = stock.generate(**inputs, **options), fast.generate(**inputs, **options)
    assert torch.equal(ours, theirs)
    assert len(theirs.unique(dim=0)) > 1, "the tokens do not depend on the input: this proves nothing"
    assert calls(fast) == (2, 0)


def test_whisper_generation() -> None:
    config = transformers.WhisperConfig(
        **{
            key: value
            for key, value in SEQ2SEQ.items()
            if key not in ("max_position_embeddings", "forced_eos_token_id")
        },
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=20,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1))
    model = transformers.WhisperForConditionalGeneration(config)
    stock, fast = pair(model, input_features=features, decoder_input_ids=ids(2, 6))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = (model.generate(features, max_new_tokens=6) for model in (stock, fast))
    assert torch.equal(ours, theirs)
    assert len(theirs.unique(dim=0)) > 1
    assert calls(fast) == (2, 0)


def test_ctc_head_on_real_frames() -> None:
    """Whoever decodes the frames of padding, too, gets the stock model's. Who does not can have a fast encoder."""
    stock, fast = pair(transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**WAV2VEC2, vocab_size=20)))
    mask = (torch.arange(400) < torch.tensor([350, 120, 200])[:, None]).long()
    samples = torch.randn(3, 400, generator=torch.Generator().manual_seed(1))
    batch = batches.Batch({"input_values": samples, "attention_mask": mask})
    theirs = measure.run(copy.deepcopy(stock).double(), batch.to(torch.float64)).logits
    assert torch.equal(measure.run(fast, batch).logits, measure.run(stock, batch).logits)
    assert calls(fast) == (0, 2)
    fastencoder.reverse(fast)
    fastencoder.to_fast(fast.wav2vec2)
    ours = measure.run(fast, batch).logits
    real = stock._get_feature_vector_attention_mask(ours.shape[1], mask).bool()
    assert measure.error(ours[real], theirs[real]) <= measure.FP32_BAR
    assert calls(fast) == (2, 0)
