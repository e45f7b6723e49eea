"""Ragged batches of vision encoders that take something else than an image each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .batches import FULL, SINGLE, Batch, mask

if TYPE_CHECKING:
    from .case import Case


def _size(pattern: str) -> int:
    return 1 if pattern == SINGLE else 3


def _windows(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """The windows of each image, one after the other in the batch."""
    rows = _size(pattern) * case.options["windows"]
    return Batch({"hidden_states": torch.randn(rows, 7, case.options["width"], generator=generator)})


def _frames(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """A video of frames that are images for the encoder."""
    size = model.config.image_size
    return Batch({"pixel_values_videos": torch.randn(_size(pattern), 2, 3, size, size, generator=generator)})


def _patch_rows(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Molmo 2: patches that are flat already."""
    config = model.config
    pixels = 3 * config.patch_size**2
    return Batch(
        {"pixel_values": torch.randn(_size(pattern), config.num_position_embeddings, pixels, generator=generator)}
    )


def _tiles(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Mllama: images of up to four tiles, [batch, images, tiles, 3, H, W]; other tiles are padding."""
    size, tiles = model.config.image_size, model.config.max_num_tiles
    counts = {SINGLE: [3], FULL: [4, 4]}.get(pattern, [2, 4, 1])
    real = (torch.arange(tiles) < torch.tensor(counts)[:, None]).long()
    inputs = {
        "pixel_values": torch.randn(len(counts), 1, tiles, 3, size, size, generator=generator),
        "aspect_ratio_ids": torch.tensor([[count] for count in counts]),
        "aspect_ratio_mask": real[:, None],
    }
    return Batch(inputs)


def _flat_patches(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Pix2Struct: rows of patches, each with its row and column in front; rows of padding are zero unless a mask is given."""
    attention_mask = mask(pattern)
    assert attention_mask is not None
    pixels = torch.randn(*attention_mask.shape, case.options["pixels"], generator=generator)
    places = torch.randint(0, 8, (*attention_mask.shape, 2), generator=generator).float()
    return Batch(
        {"flattened_patches": torch.cat([places, pixels], -1), "attention_mask": attention_mask}, attention_mask.bool()
    )


def feature_map(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """What RT-DETR's attention is given: a small map of features, without a mask."""
    return Batch({"feature_map": 2 * torch.randn(_size(pattern), case.options["width"], 3, 4, generator=generator)})
