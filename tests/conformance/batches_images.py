"""Batches of spectrograms, of detectors, of windowed vision transformers and of Q-Formers: see ``batches``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .batches import Batch, _size, _text, mask

if TYPE_CHECKING:
    from .case import Case


def _feature_map(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """What RT-DETR's attention is given: a small map of features, without a mask."""
    return Batch({"feature_map": 2 * torch.randn(_size(pattern), case.options["width"], 3, 4, generator=generator)})


def _flat_map(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """What the encoders of DETR's line are given: flattened features, positions of each token, and a padding mask."""
    attention_mask = mask(pattern)
    rows = 3 if attention_mask is None else len(attention_mask)
    shape = (rows, 13, case.options["width"])
    inputs: dict[str, Any] = {
        "inputs_embeds": 2 * torch.randn(shape, generator=generator),
        case.options["positions"]: torch.randn(shape, generator=generator),
    }
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    elif case.options["positions"] == "object_queries":
        inputs["attention_mask"] = None
    return Batch(inputs, None if attention_mask is None else attention_mask.bool())


def _clap_audio(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """CLAP: one log-mel spectrogram [batch, 1, frames, bins], which the model folds into a square."""
    config = model.config
    frames = config.spec_size * config.spec_size // config.num_mel_bins
    return Batch({"input_features": torch.randn(_size(pattern), 1, frames, config.num_mel_bins, generator=generator)})


def _painted_image(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """SegGPT: an image, an example, and the example's painted mask."""
    height, width = model.config.image_size
    shape = (_size(pattern), 3, height // 2, width)
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return Batch({name: torch.randn(shape, generator=generator) for name in names})


def _query_embeds(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """BLIP-2: five learned queries that look at an image."""
    config, rows = model.config, _size(pattern)
    inputs = {
        "query_embeds": torch.randn(rows, 5, config.hidden_size, generator=generator),
        "encoder_hidden_states": torch.randn(rows, 9, config.encoder_hidden_size, generator=generator),
    }
    return Batch(inputs)


def _qformer(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """InstructBLIP: the queries stand before the words of an instruction, and the mask is over both."""
    batch = _text(case, model, pattern, generator)
    rows = len(batch.inputs["input_ids"])
    batch.inputs["query_embeds"] = torch.randn(rows, 5, model.config.hidden_size, generator=generator)
    image = torch.randn(rows, 9, model.config.encoder_hidden_size, generator=generator)
    batch.inputs["encoder_hidden_states"] = image
    if batch.real is None:
        return batch
    real = torch.cat([torch.ones(rows, 5, dtype=torch.bool), batch.real], dim=1)
    batch.inputs["attention_mask"] = real.long()
    return Batch(batch.inputs, real)


def _spectrogram(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    config = model.config
    return Batch(
        {"input_values": torch.randn(_size(pattern), config.max_length, config.num_mel_bins, generator=generator)}
    )


def _patch_embeds(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    side = model.config.image_size // model.config.patch_size
    return Batch(
        {"patch_embeds": torch.randn(_size(pattern), model.config.hidden_size, side, side, generator=generator)}
    )
