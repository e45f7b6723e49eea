"""Ragged batches of models that pack images themselves, and of images of one size: see ``batches``.

Here "none" is several images of different grids (one is a video of two frames, each a sequence of its own), "single" is one
image, and "ones" is images of one grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .batches import ONES, SINGLE, Batch

if TYPE_CHECKING:
    from .case import Case

GRIDS = {SINGLE: [[1, 4, 6]], ONES: [[1, 4, 4], [1, 4, 4]]}
RAGGED = [[1, 4, 6], [2, 2, 4], [1, 6, 2], [1, 6, 6]]


def _grids(case: Case, pattern: str) -> torch.Tensor:
    grids = torch.tensor(GRIDS.get(pattern, RAGGED))
    if "frames" in case.options:  # of every image: what the model computes outside of its layers wants them equal
        grids[:, 0] = case.options["frames"]
    return grids


def _patches(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Patches of all images one after the other, each flat or `[channels, side, side]`, and the grids of the images."""
    grids = _grids(case, pattern)
    count = int(grids.prod(1).sum()) // case.options.get("merged", 1)
    pixels = torch.randn(count, *case.options["cell"], generator=generator)
    inputs: dict[str, Any] = {
        case.options.get("name", "hidden_states"): pixels[None] if case.options.get("row") else pixels,
        case.options.get("grid", "grid_thw"): grids,
    }
    if "merge_sizes" in case.options:
        inputs["merge_sizes"] = torch.full((len(grids),), case.options["merge_sizes"])
    return Batch(inputs)


def _annealed(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """EoMT with the masks of its last layers off: where a checkpoint has them on, these layers run the stock forward."""
    model.attn_mask_probs.zero_()
    side = model.config.image_size
    return Batch({"pixel_values": torch.randn(1 if pattern == SINGLE else 3, 3, side, side, generator=generator)})


def _strip(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """MiniCPM-V: the patches of all images side by side in one strip of pixels. Up to transformers 5.17 only images of one size
    can be merged after a layer."""
    sizes = _grids(case, pattern)[:, 1:]
    side = model.config.patch_size
    strip = torch.randn(1, 3, side, side * int(sizes.prod(1).sum()), generator=generator)
    uniform = pattern in (SINGLE, ONES)
    return Batch({"pixel_values": strip, "target_sizes": sizes.int(), "use_vit_merger": uniform})


def _image_sizes(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Pixtral: images of different sizes in one padded tensor of pixels, which become one row of patches."""
    sizes = torch.tensor({SINGLE: [[16, 24]], ONES: [[16, 16], [16, 16]]}.get(pattern, [[16, 24], [8, 12], [24, 8]]))
    pixels = torch.randn(len(sizes), 3, *sizes.amax(0).tolist(), generator=generator)
    return Batch({"pixel_values": pixels, "image_sizes": sizes})


def _mel_rows(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Qwen3-ASR: log-mel `[batch, bins, frames]` with a mask, which the model cuts into chunks and packs."""
    lengths = torch.tensor({SINGLE: [90], ONES: [200, 200]}.get(pattern, [230, 100, 57]))
    chunk = 2 * model.config.n_window
    frames = -(-int(lengths.max()) // chunk) * chunk
    features = torch.randn(len(lengths), model.config.num_mel_bins, frames, generator=generator)
    return Batch({"input_features": features, "input_features_mask": torch.arange(frames) < lengths[:, None]})


def _clip(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """V-JEPA 2: videos of four frames."""
    side, rows = model.config.crop_size, 1 if pattern == SINGLE else 3
    pixels = torch.randn(rows, 4, 3, side, side, generator=generator)
    return Batch({"pixel_values_videos": pixels, "skip_predictor": True})


def _clip_tokens(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """The predictor of V-JEPA 2: some patches of each video are known, others are asked for."""
    rows = 1 if pattern == SINGLE else 3
    count = 2 * (model.config.crop_size // model.config.patch_size) ** 2
    order = torch.rand(rows, count, generator=generator).argsort(1)
    states = torch.randn(rows, count, model.config.hidden_size, generator=generator)
    return Batch({"encoder_hidden_states": states, "context_mask": [order[:, :9]], "target_mask": [order[:, 9:20]]})


def _mel_chunks(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Qwen-Omni: the frames of all sounds one after the other, `[bins, frames]`."""
    ragged = case.options.get("lengths", [37, 16, 52, 9])
    lengths = torch.tensor({SINGLE: ragged[:1], ONES: ragged[1:2] * 2}.get(pattern, ragged))
    features = torch.randn(model.config.num_mel_bins, int(lengths.sum()), generator=generator)
    return Batch({"input_features": features, "feature_lens": lengths})
