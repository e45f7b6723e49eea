"""How large the blocks of attention are, by sequence length, head dimension, dtype and device.

No entry has been measured on a device yet. They leave a program's queries, scores and output in registers and its blocks in
shared memory, which ``configurations.py`` proves with the compiler.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastencoder.kernels._dispatch import is_batch_invariant
from fastencoder.kernels._triton import DeviceLimits, cdiv, dot_precision, next_power_of_2
from fastencoder.kernels.varlen_attention.features import PLAIN, Features

# Scores and one head's rows of a program of the single-block kernel live in registers: the longest sequence in tokens, and
# the widest padded row in bytes by the size of its elements. Features need registers as well, and are bounded by the bytes
# of a head's keys. Not measured.
_SINGLE_TOKENS = 128
_SINGLE_ROW = {2: 256, 4: 128}
_SINGLE_BYTES_WITH_FEATURES = 64 * 128


class Block(NamedTuple):
    """Queries of one program and keys of one step, in tokens, and how they are computed."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    single: bool = False  # whether the single-block kernel runs, to which `keys` are all keys of a sequence


def is_exact(dtype: torch.dtype) -> bool:
    """Whether matrix units cannot be used: float32, unless the user has allowed TF32."""
    return dtype == torch.float32 and dot_precision(dtype) == "ieee"


# The looped kernel in 16 bit and TF32, by whether the matrix units take the rows of whole warp groups from shared memory
# (elsewhere the operands of a matrix instruction live in registers), and by the bytes of one padded row of a head. The second
# block is for calls with features, which need registers of their own; it has the queries of the first. Not measured.
_LOOPED = {
    (True, 128): (Block(128, 64, 8, 3), Block(128, 64, 8, 2)),
    (True, 256): (Block(128, 64, 8, 2), Block(128, 32, 8, 2)),
    (True, 512): (Block(64, 32, 8, 2), Block(64, 16, 8, 1)),
    (True, 1024): (Block(16, 32, 4, 1), Block(16, 16, 4, 1)),
    (False, 128): (Block(128, 64, 8, 3), Block(128, 32, 8, 2)),
    (False, 256): (Block(128, 32, 8, 2), Block(128, 16, 8, 2)),
    (False, 512): (Block(32, 32, 4, 2), Block(32, 16, 4, 1)),
    (False, 1024): (Block(16, 32, 4, 1), Block(16, 16, 4, 1)),
}
_SHORT = 256  # tokens: up to here half as many queries, because a tile of 128 would often be half empty. Not measured.

# Exact float32 by head dimension up to: the operands of a dot live in registers. Not measured.
_EXACT = {64: Block(32, 16, 4, 1), 256: Block(16, 16, 4, 1)}


def choose_block(
    max_seqlen: int, dim: int, dtype: torch.dtype, limits: DeviceLimits, features: Features = PLAIN
) -> Block:
    """The blocks of a launch.

    Args:
        max_seqlen: a bound of the sequences' lengths; inside of ``batch_invariant`` it counts as long.
        dim: of a head.
        dtype: of queries, keys and values.
        limits: of the device.
        features: of the call. They never change the number of queries.
    """
    if is_exact(dtype):
        return next(block for most, block in _EXACT.items() if dim <= most)
    if is_batch_invariant():
        max_seqlen = max(_SHORT, _SINGLE_TOKENS) + 1
    row_bytes = max(128, next_power_of_2(dim) * dtype.itemsize)
    keys = max(16, next_power_of_2(max_seqlen))
    fits = keys <= _SINGLE_TOKENS and row_bytes <= _SINGLE_ROW[dtype.itemsize]
    if fits and (not features.any or keys * row_bytes <= _SINGLE_BYTES_WITH_FEATURES):
        return _single_block(keys, row_bytes, dtype, limits, features)
    block = _LOOPED[limits.capability[0] in (9, 10, 11), row_bytes][features.any]
    if features.has_biases and row_bytes > 128:  # every score has an address of its own, which takes registers
        block = block._replace(keys=max(16, block.keys // 2))
    if features.has_token_terms:  # which have two addresses
        block = block._replace(keys=min(block.keys, 32))
    if max_seqlen <= _SHORT and block.queries == 128:
        crowded = features.has_token_terms and row_bytes > 128 and limits.capability[0] == 8
        return block._replace(queries=64, num_warps=4, num_stages=1 if crowded else block.num_stages)
    return block


def _single_block(keys: int, row_bytes: int, dtype: torch.dtype, limits: DeviceLimits, features: Features) -> Block:
    """Blocks of the single-block kernel. A second stage loads the next head ahead, where there are shared memory and
    registers for it. Not measured."""
    queries = min(keys, 64)
    large = keys == 128 and (row_bytes == 256 or dtype.itemsize == 4)
    crowded = large or (keys == 64 and features.any) or (keys == 32 and features.has_token_terms)
    ahead = (not large or limits.shared_bytes > 128 * 1024) and not features.has_token_terms
    return Block(queries, keys, queries // (8 if crowded else 16), 2 if ahead else 1, single=True)


def choose_heads(tiles: int, heads: int, limits: DeviceLimits) -> int:
    """How many heads of a tile one program of the single-block kernel takes: up to 4, as long as there are 4 programs for
    every multiprocessor."""
    programs = cdiv(4 * limits.multiprocessors, max(tiles, 1))
    groups = min(heads, max(programs, cdiv(heads, 4)))
    return cdiv(heads, groups)
