"""Which GEMM multiplies, and how: the dispatch table of ``linear``, and the arithmetic that reads it.

A product ``[tokens, K] @ [K, N]`` with an epilogue finds its row by compute capability, number format and bucket of tokens.
The row says which epilogues the vendor's GEMM takes; for all others it lists tiles, each with a rate. N and K decide between
them through :func:`_cost`. Nothing is tried out at run time: the same shape always gets the same answer.

Every rate and every row is marked with its evidence. Change one when it was measured, and say where.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fastencoder.kernels._dispatch import is_batch_invariant
from fastencoder.kernels._triton import DeviceLimits, cdiv

NOT_MEASURED = "not measured"


class Tile(NamedTuple):
    """The part of the output that one program computes at a time, and how."""

    m: int
    n: int  # of a gated product, half of them for each half of the weight
    k: int  # of one step along the summed dimension
    num_warps: int
    num_stages: int
    rate: float  # speed with every multiprocessor busy, as a fraction of the fastest GEMM on that device
    descriptors: bool = False  # a persistent program on tensor descriptors; otherwise a program a tile, on pointers
    # In how many parts (1 or 2) a persistent program finishes its columns: 128 accumulators a thread leave no registers for
    # an epilogue on all of them, and each part goes through shared memory. A gated product has half as many columns.
    parts: int = 1


class Row(NamedTuple):
    """One row of the table."""

    tokens: float  # the row is for at most so many
    vendor: tuple[str, ...]  # the kinds of epilogue (see epilogue_kind) that the vendor's GEMM takes
    splits: bool  # whether K may be divided between programs
    tiles: tuple[Tile, ...]
    evidence: str = NOT_MEASURED


class Choice(NamedTuple):
    """How one product is computed."""

    vendor: bool  # by the vendor's GEMM; the rest is then what ours would have been
    tile: Tile
    splits: int  # programs that share the sum over K of one tile


ANY = float("inf")
PLAIN, EVERYTHING = ("plain",), ("plain", "fused", "gated")

# Up to 64 tokens reading the weights takes the time, whatever the device: the tile holds all rows, many programs read narrow
# tiles with deep steps, and the rate is what memory allows (tokens FLOP a byte of weight, at 3 TB/s and 600 TFLOP/s). The
# vendor's GEMM is left out there because a wide tile that fills few multiprocessors is what it is tuned for least.
_FEW_TOKENS = (
    Row(16, (), True, (Tile(16, 32, 256, 4, 4, 0.08),)),
    Row(32, (), True, (Tile(32, 32, 128, 4, 4, 0.16),)),
    Row(64, (), True, (Tile(64, 64, 64, 4, 4, 0.32), Tile(64, 32, 64, 4, 4, 0.32))),
)
# Beyond, a plain product (QKV, and out and FFN2 before an add_norm) is the vendor's: a Triton GEMM reaches 85 to 95 % of it at
# K of 768 to 1024. An epilogue that saves a pass over the output is worth more than that, exact GELU by far the most.
_POINTERS_8 = (
    Tile(128, 128, 32, 8, 4, 0.9),
    Tile(64, 128, 64, 4, 3, 0.75),
    Tile(64, 64, 64, 4, 4, 0.6),
)
_DESCRIPTORS_9 = (
    Tile(128, 256, 64, 8, 4, 1.0, descriptors=True, parts=2),
    Tile(128, 128, 64, 8, 4, 0.9, descriptors=True),
    Tile(128, 128, 64, 8, 3, 0.8),  # for strides that a descriptor cannot have
    Tile(64, 128, 64, 4, 4, 0.75),
    Tile(64, 64, 64, 4, 4, 0.6),
)
# As on 9.x; 128 registers a thread are what the compiler gives 8 warps there, too few for a whole tile of exact GELU.
_DESCRIPTORS_10 = (
    Tile(128, 256, 64, 8, 4, 1.0, descriptors=True, parts=2),
    Tile(128, 128, 64, 8, 4, 0.9, descriptors=True, parts=2),
    *_DESCRIPTORS_9[2:],
)
_DESCRIPTORS_12 = (
    Tile(128, 128, 32, 8, 4, 0.9, descriptors=True, parts=2),
    Tile(128, 128, 32, 8, 3, 0.8),
    Tile(64, 128, 64, 4, 3, 0.75),
    Tile(64, 64, 64, 4, 4, 0.6),
)
_FEW_TOKENS_TF32 = (
    Row(16, (), True, (Tile(16, 32, 64, 4, 4, 0.08),)),
    Row(32, (), True, (Tile(32, 32, 64, 4, 4, 0.16),)),
    Row(64, (), True, (Tile(64, 32, 32, 4, 4, 0.32),)),
)
_POINTERS_TF32 = (Tile(128, 64, 32, 8, 3, 0.9), Tile(64, 64, 32, 4, 3, 0.7))
_DESCRIPTORS_TF32 = (Tile(128, 128, 32, 8, 3, 1.0, descriptors=True), *_POINTERS_TF32)

# (generation, number format) -> rows, by rising number of tokens.
TABLE: dict[tuple[str, str], tuple[Row, ...]] = {
    ("8.x", "16 bit"): (*_FEW_TOKENS, Row(512, PLAIN, True, _POINTERS_8), Row(ANY, PLAIN, False, _POINTERS_8)),
    ("9.x", "16 bit"): (*_FEW_TOKENS, Row(512, PLAIN, True, _DESCRIPTORS_9), Row(ANY, PLAIN, False, _DESCRIPTORS_9)),
    ("10.x", "16 bit"): (*_FEW_TOKENS, Row(512, PLAIN, True, _DESCRIPTORS_10), Row(ANY, PLAIN, False, _DESCRIPTORS_10)),
    ("12.x", "16 bit"): (*_FEW_TOKENS, Row(512, PLAIN, True, _DESCRIPTORS_12), Row(ANY, PLAIN, False, _DESCRIPTORS_12)),
    ("8.x", "tf32"): (*_FEW_TOKENS_TF32, Row(ANY, PLAIN, False, _POINTERS_TF32)),
    ("9.x", "tf32"): (*_FEW_TOKENS_TF32, Row(ANY, PLAIN, False, _DESCRIPTORS_TF32)),
    ("10.x", "tf32"): (*_FEW_TOKENS_TF32, Row(ANY, PLAIN, False, _DESCRIPTORS_TF32)),
    ("12.x", "tf32"): (*_FEW_TOKENS_TF32, Row(ANY, PLAIN, False, _POINTERS_TF32)),
    # Exact float32 has no matrix unit, where the vendor is far ahead, and its separate epilogue rounds nothing away.
    # Ours wants both operands in registers: small steps.
    ("any", "exact"): (
        Row(16, EVERYTHING, False, (Tile(16, 32, 16, 4, 3, 0.1),)),
        Row(32, EVERYTHING, False, (Tile(32, 32, 16, 4, 3, 0.2),)),
        Row(ANY, EVERYTHING, False, (Tile(64, 64, 32, 4, 3, 0.5), Tile(64, 32, 16, 4, 3, 0.4))),
    ),
}

# Choices are made for these numbers of tokens, so that a model asks for few kernels: the next larger one, at most the last.
TOKEN_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

# Of an H100, in the unit of _cost: FLOP that the GEMM does while the L2 cache moves one byte (600 TFLOP/s, 5.5 TB/s), and
# while a second kernel is launched (2 microseconds). Estimates.
_FLOP_A_BYTE = 110
_FLOP_A_LAUNCH = 1.2e9
_MOST_SPLITS = 8
_SHORTEST_SUM = 256  # K of one program: below, its prologue and epilogue are most of its time


def token_bucket(tokens: int) -> int:
    """The entry of :data:`TOKEN_BUCKETS` that stands for so many tokens."""
    for bucket in TOKEN_BUCKETS:
        if tokens <= bucket:
            return bucket
    return TOKEN_BUCKETS[-1]


def epilogue_kind(activation: str, with_residual: bool, gated: bool) -> str:
    """``"plain"`` (nothing but a bias), ``"gated"``, or ``"fused"`` (an activation, a residual or both)."""
    if gated:
        return "gated"
    return "plain" if activation == "identity" and not with_residual else "fused"


def choose(
    tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    limits: DeviceLimits,
    *,
    activation: str = "identity",
    with_residual: bool = False,
    gated: bool = False,
    partial: bool = False,
    descriptors: bool = True,
    aligned: bool = True,
) -> Choice:
    """How ``[tokens, K] @ [K, N]`` (gated: twice that) is computed; inside of ``batch_invariant``, whatever ``tokens`` are.

    Args:
        precision: what ``_triton.dot_precision`` says of ``dtype``.
        partial: the result is partial sums, which the kernel after it adds up; otherwise splitting K takes a second kernel.
        descriptors: whether the strides allow tensor descriptors.
        aligned: whether the compiler sees that it may load 16 bytes at a time.
    """
    kind = epilogue_kind(activation, with_residual, gated)
    if is_batch_invariant():
        # One tile for any number of tokens, chosen for many, and no division of K.
        chosen = _choose(
            TOKEN_BUCKETS[-1], n, k, dtype, precision, kind, with_residual, gated, False, False, aligned, limits
        )
        return chosen._replace(vendor=False, splits=1)
    return _choose(
        token_bucket(tokens), n, k, dtype, precision, kind, with_residual, gated, partial, descriptors, aligned, limits
    )


@functools.lru_cache(maxsize=4096)
def _choose(
    tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    kind: str,
    with_residual: bool,
    gated: bool,
    partial: bool,
    descriptors: bool,
    aligned: bool,
    limits: DeviceLimits,
) -> Choice:
    row = next(row for row in rows(dtype, precision, limits) if tokens <= row.tokens)
    products = 2 if gated else 1
    candidates = []
    for tile in row.tiles:
        if tile.descriptors and (partial or not descriptors):
            continue
        most_splits = min(_MOST_SPLITS, k // _SHORTEST_SUM) if row.splits and not tile.descriptors else 1
        for splits in range(1, max(1, most_splits) + 1):
            cost = _cost(tile, splits, tokens, products * n, k, partial, limits)
            candidates.append((cost, splits, tile))
    _, splits, tile = min(candidates, key=lambda candidate: candidate[0])
    tile = fitted(tile, dtype, with_residual, gated, aligned, limits)
    return Choice(kind in row.vendor and not partial, tile, splits)


def _cost(tile: Tile, splits: int, tokens: int, n: int, k: int, partial: bool, limits: DeviceLimits) -> float:
    """An estimate of the time, in FLOP at the full rate of the device.

    The last wave of tiles takes as long as the others, however few multiprocessors it keeps busy; partial sums are written
    and read once, as float32.
    """
    tiles = cdiv(tokens, tile.m) * cdiv(n, tile.n) * splits
    waves = cdiv(tiles, limits.multiprocessors)
    multiply = waves * limits.multiprocessors * 2 * tile.m * tile.n * chunk(k, splits, tile) / tile.rate
    if splits == 1:
        return multiply
    return multiply + splits * tokens * n * 8 * _FLOP_A_BYTE + (0 if partial else _FLOP_A_LAUNCH)


def chunk(k: int, splits: int, tile: Tile) -> int:
    """What one of ``splits`` programs sums over: whole steps."""
    return cdiv(cdiv(k, splits), tile.k) * tile.k


def rows(dtype: torch.dtype, precision: str, limits: DeviceLimits) -> tuple[Row, ...]:
    """The part of :data:`TABLE` for a number format on a device."""
    if dtype in (torch.float16, torch.bfloat16):
        return TABLE[_generation(limits), "16 bit"]
    return TABLE[_generation(limits), "tf32"] if precision == "tf32" else TABLE["any", "exact"]


def _generation(limits: DeviceLimits) -> str:
    """The newest generation in the table whose instructions the device has: 11.0 runs what 10.0 runs, 7.5 what 8.x does."""
    major = limits.capability[0]
    return "8.x" if major < 9 else "9.x" if major == 9 else "10.x" if major < 12 else "12.x"


def fitted(
    tile: Tile, dtype: torch.dtype, with_residual: bool, gated: bool, aligned: bool, limits: DeviceLimits
) -> Tile:
    """The tile with as many stages as fit shared memory, beside what the epilogue of a persistent program keeps there (its
    part of the output, and of the residual).

    Rows that are not aligned are loaded element by element, with an address in registers for each: fewer at a time.
    """
    epilogue = 0
    if tile.descriptors:
        columns = tile.n // 2 if gated else tile.n // tile.parts
        epilogue = tile.m * columns * dtype.itemsize * (2 if with_residual else 1)
    elif not aligned:
        tile = tile._replace(n=min(tile.n, 64), k=max(16, tile.k // 2))
    free = limits.shared_bytes - epilogue - 1024  # and barriers
    stages = free // ((tile.m + tile.n) * tile.k * dtype.itemsize)
    return tile._replace(num_stages=max(1, min(tile.num_stages, stages)))
