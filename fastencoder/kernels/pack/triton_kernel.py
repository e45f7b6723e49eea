"""``pack`` and ``unpack`` in Triton: one kernel each, a row is moved as a whole.

Unpacking needs no memset and no inverse map: the indices ascend, so a padded row finds its token by binary search.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastencoder.kernels._triton import Launch, cdiv, next_power_of_2, rows_contiguous


def pack(hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``[B, S, D]``, ``[T]`` -> ``[T, D]``."""
    rows = hidden.reshape(-1, hidden.shape[2])
    values = torch.empty(indices.shape[0], hidden.shape[2], dtype=hidden.dtype, device=hidden.device)
    plan_pack(rows_contiguous(rows), indices.contiguous(), values).run(hidden.device)
    return values


def unpack(values: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """``[T, D]``, ``[T]`` -> ``[B, S, D]``."""
    padded = torch.empty(batch * seqlen, values.shape[1], dtype=values.dtype, device=values.device)
    plan_unpack(rows_contiguous(values), indices.contiguous(), padded).run(values.device)
    return padded.view(batch, seqlen, values.shape[1])


def plan_pack(hidden: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> Launch:
    """The launch that fills ``values`` [T, D] with the rows of ``hidden`` [B * S, D] at ``indices``."""
    arguments = {
        "hidden_ptr": hidden,
        "indices_ptr": indices,
        "values_ptr": values,
        "tokens": indices.shape[0],
        "hidden_stride": hidden.stride(0),
    }
    return _plan(_pack_kernel, arguments, *values.shape)


def plan_unpack(values: torch.Tensor, indices: torch.Tensor, padded: torch.Tensor) -> Launch:
    """The launch that fills ``padded`` [B * S, D]: the rows of ``values`` at ``indices``, zero elsewhere."""
    tokens = indices.shape[0]
    arguments = {
        "values_ptr": values,
        "indices_ptr": indices,
        "padded_ptr": padded,
        "tokens": tokens,
        "positions": padded.shape[0],
        "values_stride": values.stride(0),
        "search_steps": tokens.bit_length(),
    }
    return _plan(_unpack_kernel, arguments, *padded.shape)


def _plan(kernel, arguments: dict, rows: int, dim: int) -> Launch:
    block_dim = min(next_power_of_2(dim), 1024)
    block_rows = max(1, min(16, 4096 // block_dim))
    return Launch(
        kernel=kernel,
        grid=(cdiv(rows, block_rows), cdiv(dim, block_dim)),
        arguments=arguments,
        constants={"DIM": dim, "BLOCK_ROWS": block_rows, "BLOCK_DIM": block_dim},
        num_warps=4,
        num_stages=1,  # no loop to pipeline
    )


@triton.jit
def _pack_kernel(
    hidden_ptr,  # [B * S, DIM]
    indices_ptr,  # [tokens], int32 or int64
    values_ptr,  # [tokens, DIM], contiguous
    tokens,
    hidden_stride,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    col = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]
    exists = token < tokens
    position = tl.load(indices_ptr + token, mask=exists, other=0).to(tl.int64)
    mask = exists[:, None] & (col < DIM)
    row = tl.load(hidden_ptr + position[:, None] * hidden_stride + col, mask=mask, other=0.0)
    tl.store(values_ptr + token.to(tl.int64)[:, None] * DIM + col, row, mask=mask)


@triton.jit
def _unpack_kernel(
    values_ptr,  # [tokens, DIM]
    indices_ptr,  # [tokens], int32 or int64, ascending
    padded_ptr,  # [positions, DIM], contiguous
    tokens,
    positions,
    values_stride,
    search_steps,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    position = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    col = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]

    # low becomes the first token whose position is not before this one
    low = tl.full([BLOCK_ROWS], 0, tl.int32)
    high = low + tokens
    for _ in range(search_steps):
        open_ = low < high
        middle = (low + high) // 2
        before = tl.load(indices_ptr + middle, mask=open_, other=0) < position
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & ~before, middle, high)
    found = tl.load(indices_ptr + low, mask=low < tokens, other=-1) == position

    exists = (position < positions)[:, None] & (col < DIM)
    row = tl.load(values_ptr + low.to(tl.int64)[:, None] * values_stride + col, mask=exists & found[:, None], other=0.0)
    tl.store(padded_ptr + position.to(tl.int64)[:, None] * DIM + col, row, mask=exists)
