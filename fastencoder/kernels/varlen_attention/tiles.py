"""The work list of ``varlen_attention``: which blocks of queries there are, the longest sequences first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastencoder.kernels._triton import device_limits
from fastencoder.kernels.varlen_attention.heuristics import choose_block


def query_block(q_dim: int, dtype: torch.dtype, max_seqlen: int, device: torch.device) -> int:
    """How many queries one tile of the work list has.

    Args:
        q_dim: head dimension.
        dtype: of the queries.
        max_seqlen: what :func:`varlen_attention` will be given.
        device: where it will run.
    """
    return choose_block(max_seqlen, q_dim, dtype, device_limits(device)).queries


def tile_list(lengths: Sequence[int], queries: int) -> torch.Tensor:
    """The work list for sequences of these lengths, in blocks of ``queries`` (see :func:`query_block`).

    A program's time grows with its sequence's length, so the longest sequences come first and the short ones fill the
    multiprocessors that would otherwise wait for the last of them.

    Returns:
        int32 ``[n, 2]`` on CPU, rows ``(sequence, block)``; every row has at least one query.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    blocks = -(-lengths[order] // queries)
    ends = np.cumsum(blocks)
    tiles = np.empty((int(ends[-1]) if len(ends) else 0, 2), dtype=np.int32)
    tiles[:, 0] = np.repeat(order, blocks)
    tiles[:, 1] = np.arange(len(tiles)) - np.repeat(ends - blocks, blocks)
    return torch.from_numpy(tiles)
