"""Inputs of whole models with heads, where those of the encoder's conformance row do not do."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .batches import Batch, mask

ROWS, TOKENS = 4, 13


def build(names: tuple[str, ...], model: nn.Module, padded: bool, options: dict[str, Any]) -> Batch:
    """The named kinds of input together."""
    generator = torch.Generator().manual_seed(77)
    made = Batch({})
    for name in names:
        globals()["_" + name](made, model, padded, generator, options)
    return made


def adapt(kind: str, model: nn.Module, made: Batch) -> None:
    """Changes the inputs of an encoder into those of a head on it."""
    inputs = made.inputs
    decodes = kind in ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
    if (
        not decodes and kind != "MASKED_LM" and inputs.pop("decoder_input_ids", None) is not None
    ):  # it is the input, shifted
        del inputs["use_cache"]
        last = inputs["attention_mask"].sum(1) - 1
        inputs["input_ids"][torch.arange(len(last)), last] = model.config.eos_token_id  # where the classifier looks
    elif decodes and "decoder_input_ids" not in inputs:
        rows = len(next(iter(inputs.values())))
        inputs["decoder_input_ids"] = torch.arange(rows * 4).view(rows, 4) % 9 + 5
        inputs["use_cache"] = False
    if kind == "VISUAL_QUESTION_ANSWERING" and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    if kind == "QUESTION_ANSWERING" and getattr(model.config, "question_token_id", None) is not None:
        inputs["input_ids"][:, 0] = model.config.question_token_id
    if kind == "MULTIPLE_CHOICE":
        pairs = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        made.inputs = {name: torch.stack([value, value.roll(1, 0)], 1) for name, value in pairs.items()}
        if "lang_ids" in inputs:
            made.inputs["lang_ids"] = inputs["lang_ids"][-1:]  # X-MOD takes one for all
        made.real = None


def _text(made: Batch, model: nn.Module, padded: bool, generator: torch.Generator, options: dict[str, Any]) -> None:
    attention_mask = mask("right" if padded else "none", TOKENS)
    made.inputs["input_ids"] = torch.randint(5, 60, (ROWS, TOKENS), generator=generator)
    made.inputs["input_ids"][:, 0] = 2
    if attention_mask is not None:
        made.inputs["attention_mask"] = attention_mask
        made.real = attention_mask.bool()


def _image(made: Batch, model: nn.Module, padded: bool, generator: torch.Generator, options: dict[str, Any]) -> None:
    height, width = options.get("size", (16, 16))
    name = options.get("image", "pixel_values")
    made.inputs[name] = torch.randn(ROWS, 3, height, width, generator=generator)


def _pixel_mask(
    made: Batch, model: nn.Module, padded: bool, generator: torch.Generator, options: dict[str, Any]
) -> None:
    """Images of different sizes, in one frame."""
    height, width = options.get("size", (16, 16))
    pixel_mask = torch.ones(ROWS, height, width, dtype=torch.long)
    if padded:
        for row, (filled_height, filled_width) in enumerate(((1.0, 0.75), (0.5, 1.0), (0.25, 0.25), (0.75, 0.5))):
            pixel_mask[row, int(height * filled_height) :] = 0
            pixel_mask[row, :, int(width * filled_width) :] = 0
    made.inputs["pixel_mask"] = pixel_mask
    made.meta["unread"] = ("encoder_last_hidden_state",)  # it has padding, of which the mask here says nothing


def _clip(made: Batch, model: nn.Module, padded: bool, generator: torch.Generator, options: dict[str, Any]) -> None:
    config = model.config
    shape = (ROWS, config.frames_per_clip, 3, config.crop_size, config.crop_size)
    made.inputs["pixel_values_videos"] = torch.randn(shape, generator=generator)


def _waves(made: Batch, model: nn.Module, padded: bool, generator: torch.Generator, options: dict[str, Any]) -> None:
    """Raw samples, long enough for the convolutions of a speaker model."""
    samples = options.get("samples", 400)
    made.inputs["input_values"] = torch.randn(ROWS, samples, generator=generator)
    if padded:
        lengths = torch.tensor([samples - 20, samples // 2, samples * 3 // 4, samples // 2 + 30])
        made.inputs["attention_mask"] = (torch.arange(samples) < lengths[:, None]).long()
    made.meta["unread"] = ("encoder_last_hidden_state",)  # the mask counts samples, not its frames


def _filterbank(
    made: Batch, model: nn.Module, padded: bool, generator: torch.Generator, options: dict[str, Any]
) -> None:
    frames, bins = options["filterbank"]
    made.inputs["input_features"] = torch.randn(ROWS, frames, bins, generator=generator)
    if padded:
        lengths = torch.tensor([frames - 4, frames // 2, frames // 4, frames - 8])
        made.inputs["attention_mask"] = (torch.arange(frames) < lengths[:, None]).long()
