"""Ragged batches, one builder per kind of input.

A batch knows the keyword arguments of the model's forward and ``real``: which positions of the encoder's hidden states
are real tokens. Padding is filled with ordinary random tokens, so that a leak shows. No two rows of a ragged batch have
the same length, and except in the pattern that says so no row is full: a bug that only shows where even the longest row
is padded stays hidden otherwise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .case import Case

NONE = "none"  # no mask at all
RIGHT = "right"  # right padding, no full row
LEFT = "left"  # left padding, no full row
HOLES = "holes"  # padding inside the rows
EMPTY = "empty"  # one row is nothing but padding
SINGLE = "single"  # a batch of one, padded
FULL = "full"  # one full row
ONES = "ones"  # a mask that masks nothing

ALL = (NONE, RIGHT, LEFT, HOLES, EMPTY, SINGLE, FULL, ONES)
LENGTHS = (RIGHT, NONE, SINGLE, FULL, ONES)  # where only the length of a row counts
UNMASKED = (NONE, SINGLE)

PATTERNS: dict[str, tuple[str, ...]] = {
    "text": ALL,
    "seq2seq": ALL,
    "text_with_boxes": ALL,
    "hidden_states": ALL,
    "layout": ALL,
    "series": ALL,
    "lxmert": ALL,
    "characters": ALL,
    "audio": LENGTHS,
    "filterbank": LENGTHS,
    "mel_masked": LENGTHS,
    "mel": UNMASKED,
    "image": UNMASKED,
    "video": UNMASKED,
    "spectrogram": UNMASKED,
    "patch_embeds": UNMASKED,
    "text_and_image": UNMASKED,
    "naflex": (RIGHT, HOLES, SINGLE, FULL, ONES),
    "hidden": ALL,
    "languages": ALL,
    "streaming": LENGTHS,
    "windows": UNMASKED,
    "frames": UNMASKED,
    "patch_rows": UNMASKED,
    "tiles": (NONE, SINGLE, FULL),
    "flat_patches": (RIGHT, HOLES, SINGLE, FULL, ONES),
    "query_embeds": UNMASKED,
    "qformer": ALL,
    "feature_map": UNMASKED,
    "clap_audio": UNMASKED,
    "painted_image": UNMASKED,
    "flat_map": ALL,
    "log_mel": UNMASKED,
    "seconds": ALL,
    "stacked_frames": ALL,
    "chunks": (RIGHT, FULL, ONES),
    "waves": LENGTHS,
    "placed_patches": (RIGHT, LEFT, HOLES, SINGLE, FULL, ONES),
    "patch_grid": (NONE, RIGHT, HOLES, SINGLE, FULL, ONES),
    "patches": (NONE, SINGLE, ONES),
    "strip": (NONE, SINGLE, ONES),
    "image_sizes": (NONE, SINGLE, ONES),
    "mel_chunks": (NONE, SINGLE, ONES),
    "mel_rows": (NONE, SINGLE, ONES),
    "annealed": UNMASKED,
    "clip": UNMASKED,
    "clip_tokens": UNMASKED,
}


@dataclass
class Batch:
    """Inputs of one forward. ``real`` is bool [batch, tokens], or None where every position is a real token."""

    inputs: dict[str, Any]
    real: torch.Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch with its floating point inputs in another dtype."""
        cast = {
            key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in self.inputs.items()
        }
        return dataclasses.replace(self, inputs=cast)


def mask(pattern: str, size: int = 13, seed: int = 0) -> torch.Tensor | None:
    """A 2-D key padding mask, int64 [batch, size], 1 = real token; None where the pattern is no mask."""
    columns = torch.arange(size)
    generator = torch.Generator().manual_seed(seed)

    def lengths(*values: int) -> torch.Tensor:
        return (columns < torch.tensor(values)[:, None]).long()

    if pattern == NONE:
        return None
    if pattern == RIGHT:
        return lengths(size - 4, 4, 1, size - 2)
    if pattern == LEFT:
        return lengths(size - 4, 4, 1, size - 2).flip(1)
    if pattern == EMPTY:
        return lengths(size - 6, 0, size - 1, 3)
    if pattern == SINGLE:
        return lengths(size - 5)
    if pattern == FULL:
        return lengths(5, size, size - 3)
    if pattern == ONES:
        return lengths(size, size, size)
    if pattern == HOLES:
        holes = (torch.rand(4, size, generator=generator) < 0.6).long()
        holes[:, 0] = torch.tensor([1, 0, 1, 0])
        holes[:, size // 2] = 1  # a token in every row
        holes[0, 3] = holes[1, 5] = holes[2, 4] = holes[3, 1] = 0  # a hole in every row
        return holes
    raise ValueError(f"unknown pattern {pattern!r}")


def patterns(case: Case) -> tuple[str, ...]:
    """The patterns that this row is run with."""
    return case.patterns or PATTERNS[case.inputs]


def build(case: Case, model: nn.Module, pattern: str, seed: int = 0) -> Batch:
    """The batch of a row: deterministic in (case, pattern, seed)."""
    from . import batches_encoders, batches_images, batches_rope, batches_vision

    generator = torch.Generator().manual_seed(77 + seed)
    name = "_" + case.inputs
    others = (getattr(module, name, None) for module in (batches_encoders, batches_images, batches_vision, batches_rope))
    builder = globals().get(name) or next(filter(None, others))
    return builder(case, model, pattern, generator)


def _size(pattern: str) -> int:
    return 1 if pattern == SINGLE else 3


def _ids(case: Case, config: Any, rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    vocab = case.options.get("vocab", getattr(config, "vocab_size", None) or 60)
    return torch.randint(5, vocab, (rows, size), generator=generator)


def _text(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    size = case.options.get("size", 13)
    attention_mask = mask(pattern, size)
    rows = 3 if attention_mask is None else len(attention_mask)
    inputs: dict[str, Any] = {"input_ids": _ids(case, model.config, rows, size, generator)}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    return Batch(inputs, None if attention_mask is None else attention_mask.bool())


def _text_with_boxes(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Words and where they are on the page: boxes (x0, y0, x1, y1), as integers or as fractions of the page."""
    batch = _text(case, model, pattern, generator)
    page = case.options.get("page", 1.0)
    corners = page * torch.rand(*batch.inputs["input_ids"].shape, 2, 2, generator=generator)
    corners = corners if page == 1.0 else corners.long()
    batch.inputs["bbox"] = corners.sort(dim=-2).values.flatten(-2)
    return batch


def _hidden_states(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """An encoder by itself, behind whatever makes its input."""
    attention_mask = mask(pattern)
    rows = 3 if attention_mask is None else len(attention_mask)
    inputs = {"hidden_states": torch.randn(rows, 13, model.config.hidden_size, generator=generator)}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    return Batch(inputs, None if attention_mask is None else attention_mask.bool())


def _layout(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """The same for documents: an additive mask, boxes, and positions in reading order, which begin anew at every third."""
    batch = _hidden_states(case, model, pattern, generator)
    rows, size = batch.inputs["hidden_states"].shape[:2]
    real = torch.ones(rows, size) if batch.real is None else batch.real.float()
    batch.inputs["attention_mask"] = (1.0 - real)[:, None, None] * torch.finfo(torch.float32).min
    batch.inputs["bbox"] = torch.randint(0, case.options["page"], (rows, size, 4), generator=generator)
    batch.inputs["position_ids"] = (torch.arange(size) % 3).expand(rows, -1)
    return batch


def _text_and_image(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """GIT: a caption after an image. Every output is compared: nothing drops padding here."""
    batch = _text(case, model, pattern, generator)
    size = case.options["image_size"]
    rows = len(batch.inputs["input_ids"])
    batch.inputs["pixel_values"] = torch.randn(rows, 3, size, size, generator=generator)
    return Batch(batch.inputs)


def _characters(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """CANINE: 16 characters, of which every 4 make a molecule."""
    batch = _text(dataclasses.replace(case, options={"size": 16, "vocab": 200}), model, pattern, generator)
    return batch


def _seq2seq(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    batch = _text(case, model, pattern, generator)
    rows = len(batch.inputs["input_ids"])
    batch.inputs["decoder_input_ids"] = _ids(case, model.config, rows, 4, generator)
    batch.inputs["use_cache"] = False
    return batch


def _lxmert(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    batch = _text(case, model, pattern, generator)
    rows = len(batch.inputs["input_ids"])
    batch.inputs["visual_feats"] = torch.randn(rows, 9, model.config.visual_feat_dim, generator=generator)
    batch.inputs["visual_pos"] = torch.rand(rows, 9, 4, generator=generator)
    visual = mask(RIGHT, 9)
    batch.meta["real_vision_output"] = None
    if pattern not in (NONE, ONES) and visual is not None:
        visual = visual[[3, 1, 0, 3][:rows]]
        batch.inputs["visual_attention_mask"] = visual
        language = batch.real
        assert language is not None  # a row without words: its image attends to padding, in the stock model too
        batch.meta["real_vision_output"] = visual.bool() & language.any(1, keepdim=True)
    return batch


def _series(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    attention_mask = mask(pattern)
    rows = 3 if attention_mask is None else len(attention_mask)
    inputs = {"inputs_embeds": 2 * torch.randn(rows, 13, model.config.feature_size, generator=generator)}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    return Batch(inputs, None if attention_mask is None else attention_mask.bool())


def _audio(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Raw samples: the mask counts samples, the model derives the frames that are real."""
    size = case.options.get("samples", 400)
    attention_mask = None
    if pattern != NONE:
        short = mask(pattern, 16)
        assert short is not None
        attention_mask = (torch.arange(size) < (short.sum(1) * size // 16).clamp(min=60)[:, None]).long()
    rows = 3 if attention_mask is None else len(attention_mask)
    inputs: dict[str, Any] = {"input_values": torch.randn(rows, size, generator=generator)}
    real = None
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        frames = int(model._get_feat_extract_output_lengths(torch.tensor(size)))
        real = model._get_feature_vector_attention_mask(frames, attention_mask).bool()
    return Batch(inputs, real)


def _filterbank(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Speech2Text: filter bank frames [batch, frames, features], subsampled by strided convolutions."""
    attention_mask = mask(pattern, 40)
    rows = 3 if attention_mask is None else len(attention_mask)
    features = torch.randn(rows, 40, model.config.input_feat_per_channel, generator=generator)
    inputs: dict[str, Any] = {"input_features": features}
    real = None
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        frames = int(model._get_feat_extract_output_lengths(torch.tensor(40)))
        real = model._get_feature_vector_attention_mask(frames, attention_mask).bool()
    return Batch(inputs, real)


def _mel(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Whisper and its line: log-mel [batch, bins, 2 * positions], never masked."""
    config = model.config
    shape = (_size(pattern), config.num_mel_bins, 2 * config.max_source_positions)
    return Batch({"input_features": torch.randn(shape, generator=generator)})


def _mel_masked(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """AudioFlamingo3: log-mel with a mask over its frames; the output is pooled by two after the layers."""
    config = model.config
    frames = 2 * config.max_source_positions
    feature_mask = mask(pattern, frames)
    if feature_mask is None:
        feature_mask = torch.ones(3, frames, dtype=torch.long)  # this encoder always wants one
    features = torch.randn(len(feature_mask), config.num_mel_bins, frames, generator=generator)
    lengths = (feature_mask.sum(1) - 1) // 2 + 1
    real = torch.arange(config.max_source_positions) < lengths[:, None]
    pooled = torch.arange(config.max_source_positions // 2) < (lengths // 2)[:, None]
    inputs = {"input_features": features, "input_features_mask": feature_mask}
    return Batch(inputs, real, {"real_last_hidden_state": pooled})


def _image(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    size = case.options.get("image_size", getattr(model.config, "image_size", 16))
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(_size(pattern), 3, height, width, generator=generator)
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if "noise" in case.options:  # ViT-MAE drops random patches: fix which
        inputs["noise"] = torch.rand(_size(pattern), case.options["noise"], generator=generator)
    return Batch(inputs)


def _video(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    frames, size = model.config.num_frames, model.config.image_size
    name = case.options.get("name", "pixel_values")
    return Batch({name: torch.randn(_size(pattern), frames, 3, size, size, generator=generator)})


def _naflex(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """SigLIP2: patches of images of different shapes, padded to one count, with a patch mask."""
    config = model.config
    shapes = {SINGLE: [(2, 3)], FULL: [(2, 2), (4, 4)], ONES: [(4, 4), (2, 8)]}.get(pattern, [(3, 4), (2, 2), (5, 3)])
    count = 16
    real = torch.arange(count) < torch.tensor([h * w for h, w in shapes])[:, None]
    if pattern == HOLES:
        real = real & (torch.rand(real.shape, generator=generator) < 0.7)
        real[:, 0] = True
    channels = config.num_channels * config.patch_size**2
    inputs = {
        "pixel_values": torch.randn(len(shapes), count, channels, generator=generator),
        "pixel_attention_mask": real.long(),
        "spatial_shapes": torch.tensor(shapes),
    }
    return Batch(inputs, real)


def _patch_grid(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Idefics2 line: images with a boolean mask over the grid of patches."""
    config = model.config
    side = config.image_size // config.patch_size
    flat = mask(pattern, side * side)
    rows = 3 if flat is None else len(flat)
    inputs: dict[str, Any] = {
        "pixel_values": torch.randn(rows, 3, config.image_size, config.image_size, generator=generator)
    }
    if flat is None:
        return Batch(inputs)
    sides = {SINGLE: [(3, 2)], FULL: [(2, 3), (side, side)], ONES: [(side, side)]}.get(
        pattern, [(3, 2), (2, 4), (1, 3)]
    )
    grid = torch.zeros(len(sides), side, side, dtype=torch.bool)
    for row, (height, width) in enumerate(sides):
        grid[row, :height, :width] = True
    if pattern == HOLES:
        grid[0, 0, 1] = grid[1, 1, 2] = False
    inputs["pixel_values"] = inputs["pixel_values"][: len(sides)]
    inputs["patch_attention_mask"] = grid
    return Batch(inputs, grid.flatten(1))


def _languages(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """X-MOD: each sentence has a language."""
    batch = _text(case, model, pattern, generator)
    rows = len(batch.inputs["input_ids"])
    batch.inputs["lang_ids"] = torch.arange(rows) // 2 % len(model.config.languages)
    return batch


def _streaming(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """Moonshine: raw samples in frames, of which every four make a token."""
    frame = model.embedder.frame_len
    short = mask(pattern, 13)
    rows = 3 if short is None else len(short)
    samples = torch.randn(rows, 4 * 13 * frame, generator=generator)
    if short is None:
        return Batch({"input_values": samples})
    attention_mask = (torch.arange(samples.shape[1]) < 4 * frame * short.sum(1)[:, None]).long()
    with torch.no_grad():
        real = model.embedder(samples.to(model.dtype), attention_mask)[1]
    return Batch({"input_values": samples, "attention_mask": attention_mask}, real)


def _hidden(case: Case, model: nn.Module, pattern: str, generator: torch.Generator) -> Batch:
    """An encoder by itself: hidden states and a mask over them."""
    attention_mask = mask(pattern)
    rows = 3 if attention_mask is None else len(attention_mask)
    inputs: dict[str, Any] = {"hidden_states": torch.randn(rows, 13, case.options["width"], generator=generator)}
    if "dataset_index" in case.options:  # ViTPose has experts for the data sets that it was trained on
        inputs["dataset_index"] = torch.arange(rows) // 2
    if attention_mask is None or not case.options.get("masked", True):
        return Batch(inputs)
    inputs["attention_mask"] = attention_mask
    return Batch(inputs, attention_mask.bool())
