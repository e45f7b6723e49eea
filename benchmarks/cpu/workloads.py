"""What is run: lengths as data, and the padded batches made of them. Needs NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu.models import VOCABULARY, Model, config

Arrays = dict[str, np.ndarray]
IMAGE = 224  # pixels a side
_RATE = 16_000  # samples of audio a second


@dataclass(frozen=True)
class Workload:
    """One batch of sequences.

    Args:
        name: as in the tables.
        kind: "text", "image" or "audio": which models run it.
        title: in words.
        lengths: of each sequence: tokens, samples of audio, or pixels a side.
    """

    name: str
    kind: str
    title: str
    lengths: tuple[int, ...]


def lognormal(count: int, low: int, high: int, mean: float, spread: float, seed: int) -> tuple[int, ...]:
    """`count` lengths from a lognormal distribution, clipped to `low`..`high`; `spread` is the deviation of the logarithm.

    The scale is found by bisection so that the clipped lengths have this mean, to within rounding.
    """
    drawn = np.exp(spread * np.random.default_rng(seed).standard_normal(count))
    small, large = 0.0, float(high)
    for _ in range(60):
        scale = (small + large) / 2
        lengths = np.clip(np.rint(scale * drawn), low, high).astype(int)
        small, large = (scale, large) if lengths.mean() < mean else (small, scale)
    return tuple(int(length) for length in np.clip(np.rint(large * drawn), low, high))


def standard() -> dict[str, Workload]:
    """The workloads with fixed lengths."""
    seconds = lognormal(8, 1, 10 * _RATE, 3 * _RATE, 0.7, seed=0)
    return {
        workload.name: workload
        for workload in (
            Workload("W1", "text", "32 texts, ragged, up to 128", lognormal(32, 4, 128, 35, 0.8, seed=1)),
            Workload("W2", "text", "32 x 128, no padding", (128,) * 32),
            Workload("W3", "text", "1 x 16", (16,)),
            Workload("W4", "text", "8 texts, ragged, up to 512", lognormal(8, 16, 512, 150, 1.0, seed=4)),
            Workload("W5", "image", "16 images of 224 x 224", (IMAGE,) * 16),
            Workload("AUDIO", "audio", "8 recordings, ragged, 3 s on average", seconds),
        )
    }


def paragraphs_workload(texts: Sequence[Sequence[int]]) -> Workload:
    """TEXT: the lengths of real paragraphs, in the order in which they came."""
    return Workload("TEXT", "text", f"{len(texts)} paragraphs of pydoc", tuple(map(len, texts)))


def own(lengths: Sequence[int]) -> Workload:
    """OWN: lengths that the user gave.

    Raises:
        ValueError: there is none, or one is not positive.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths are one or more positive numbers, not {list(lengths)}")
    return Workload("OWN", "text", f"{len(lengths)} texts of given lengths", tuple(lengths))


def read_lengths(text: str) -> list[int]:
    """Numbers separated by commas, spaces or lines.

    Raises:
        ValueError: something is not a number.
    """
    return [int(word) for word in text.replace(",", " ").split()]


def batch(workload: Workload, model: Model, model_folder: Path, tokens: Sequence[int] = (), seed: int = 0) -> Arrays:
    """The model's inputs, padded on the right to the longest.

    Args:
        tokens: a stream of token ids to cut the texts from; random ones if there are none.

    Returns:
        `input_ids` and `attention_mask` int64 `[B, S]`, or `pixel_values` float32 `[B, 3, H, W]`, or `input_values`
        float32 and `attention_mask` int64 `[B, samples]`.
    """
    chance = np.random.default_rng(seed)
    lengths = np.array(workload.lengths)
    if workload.kind == "image":
        return {"pixel_values": chance.standard_normal((len(lengths), 3, IMAGE, IMAGE), dtype=np.float32)}
    mask = (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64)
    if workload.kind == "audio":
        return {"input_values": chance.standard_normal(mask.shape, dtype=np.float32) * mask, "attention_mask": mask}
    if len(tokens):
        ids = np.resize(np.array(tokens, dtype=np.int64), int(lengths.sum()))
    else:
        ids = chance.integers(3, config(model_folder).get("vocab_size", VOCABULARY), int(lengths.sum()))
    padded = np.full(mask.shape, _padding_id(model_folder), dtype=np.int64)
    padded[mask.astype(bool)] = ids
    return {"input_ids": padded, "attention_mask": mask}


def _padding_id(model_folder: Path) -> int:
    return config(model_folder).get("pad_token_id") or 0


def real_lengths(workload: Workload, model: Model, model_folder: Path) -> list[int]:
    """Tokens of each sequence inside the encoder: patches and the class token of an image, frames of a recording."""
    values = config(model_folder)
    if workload.kind == "image":
        return [(size // values["patch_size"]) ** 2 + 1 for size in workload.lengths]
    if workload.kind == "audio":
        return [frames(length, values["conv_kernel"], values["conv_stride"]) for length in workload.lengths]
    return list(workload.lengths)


def frames(samples: int, kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Frames that a stack of convolutions without padding makes of so many samples."""
    for kernel, stride in zip(kernels, strides, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def positions(lengths: Sequence[int]) -> int:
    """Positions of the padded batch."""
    return len(lengths) * max(lengths)


def padding_share(lengths: Sequence[int]) -> float:
    """Share of the positions that hold padding."""
    return 1 - sum(lengths) / positions(lengths)


def fits(workload: Workload, model: Model, model_folder: Path) -> str:
    """Empty if the model can run it, else why not."""
    if workload.kind != model.kind:
        return f"{model.name} takes {model.kind}"
    values = config(model_folder)
    # RoBERTa and MPNet count positions from the padding id on.
    most = values.get("max_position_embeddings", math.inf)
    if values["model_type"] in ("roberta", "mpnet"):
        most -= 2
    longest = max(workload.lengths)
    return f"{model.name} has {most} positions, not {longest}" if workload.kind == "text" and longest > most else ""


def describe(workload: Workload, lengths: Sequence[int]) -> dict[str, Any]:
    """What the results say of it: lengths in tokens, their number, the share of padding."""
    return {
        "title": workload.title,
        "lengths": list(lengths),
        "tokens": sum(lengths),
        "positions": positions(lengths),
        "padding_share": round(padding_share(lengths), 4),
    }
