"""Ragged batches for the families with rotary position embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .batches import Batch, _size, mask

if TYPE_CHECKING:
    from .case import Case


def _log_mel(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """GlmAsr: log-mel [batch, bins, frames], never masked, halved by a convolution."""
    shape = (_size(pattern), model.config.num_mel_bins, 26)
    return Batch({"input_features": torch.randn(shape, generator=generator)})


def _seconds(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Moonshine: samples, of which every 384 make a frame; the mask is read at the first sample of each."""
    samples = 5300
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(samples)))
    short = mask(pattern, frames)
    inputs = {"input_values": torch.randn(3 if short is None else len(short), samples, generator=generator)}
    if short is None:
        return Batch(inputs)
    padded = nn.functional.pad(short, (0, samples // 384 + 1 - frames))
    inputs["attention_mask"] = padded.repeat_interleave(384, dim=1)[:, :samples]
    return Batch(inputs, short.bool())


def _stacked_frames(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Nemotron's encoders: log-mel [batch, frames, bins], of which a few are stacked to one token."""
    config = model.config
    short = mask(pattern)
    rows = 3 if short is None else len(short)
    features = torch.randn(rows, 13 * config.subsampling_factor, config.num_mel_bins, generator=generator)
    if short is None:
        return Batch({"input_features": features})
    attention_mask = short.repeat_interleave(config.subsampling_factor, dim=1)
    return Batch({"input_features": features, "attention_mask": attention_mask}, short.bool())


def _chunks(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Dots3Note: log-mel chunks [batch, bins, frames] and how many samples of each are sound."""
    config = model.config
    short = mask(pattern)
    assert short is not None
    features = torch.randn(len(short), config.feature_size, 8 * 13, generator=generator)
    inputs = {"input_features": features, "chunk_sample_lengths": short.sum(1) * config.samples_per_token}
    return Batch(inputs, short.bool())


def _waves(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Perception encoders: samples, frames of a video, or both, with padding masks. A class token comes first in the layers."""
    config = model.config
    short = mask(pattern)
    rows = 3 if short is None else len(short)
    inputs: dict[str, Any] = {}
    audio = getattr(config, "audio_config", config)
    if hasattr(audio, "dac_config"):
        hop = audio.dac_config.hop_length
        inputs["input_values"] = torch.randn(rows, 1, 13 * hop, generator=generator)
        if short is not None:
            inputs["padding_mask"] = short.bool().repeat_interleave(hop, dim=1)
    if hasattr(getattr(config, "video_config", config), "vision_config"):
        inputs["pixel_values_videos"] = torch.randn(rows, 13, 3, 8, 8, generator=generator)
        if short is not None:
            inputs["padding_mask_videos"] = short.bool()
    return Batch(inputs, None if short is None else short.bool())


def _placed_patches(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Gemma 4: flat patches with their columns and rows, -1 for padding; a pooler takes the padding out."""
    pixels = 3 * model.config.patch_size**2
    short = mask(pattern, 16)
    assert short is not None
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(*short.shape, 2)
    inputs = {
        "pixel_values": torch.rand(*short.shape, pixels, generator=generator),
        "pixel_position_ids": places.masked_fill(short[..., None] == 0, -1),
    }
    return Batch(inputs, short.bool())
