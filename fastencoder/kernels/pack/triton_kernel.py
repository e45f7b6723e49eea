"""``pack`` and ``unpack`` in Triton: one kernel each, a row is moved as a whole.

Unpacking needs no memset and no inverse map: the indices ascend, so a padded row searches for its token. The search is 32
wide: two or three loads that depend on one another, where halving would take fifteen, and those are what it waits for.
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
    }
    return _plan(_pack_kernel, arguments, hidden, *values.shape)


def plan_unpack(values: torch.Tensor, indices: torch.Tensor, padded: torch.Tensor) -> Launch:
    """The launch that fills ``padded`` [B * S, D]: the rows of ``values`` at ``indices``, zero elsewhere."""
    tokens = indices.shape[0]
    arguments = {
        "values_ptr": values,
        "indices_ptr": indices,
        "padded_ptr": padded,
        "tokens": tokens,
        "positions": padded.shape[0],
        "search_steps": _search_steps(tokens),
    }
    return _plan(_unpack_kernel, arguments, values, *padded.shape)


def _search_steps(tokens: int) -> int:
    """How often ``_unpack_kernel`` narrows its search before one place is left."""
    steps = 0
    while tokens > 0:
        tokens = cdiv(tokens, 32) - 1
        steps += 1
    return steps


def _plan(kernel, arguments: dict, source: torch.Tensor, rows: int, dim: int) -> Launch:
    block_dim = min(next_power_of_2(dim), 1024)
    block_rows = max(1, min(16, 4096 // block_dim))
    return Launch(
        kernel=kernel,
        grid=(cdiv(rows, block_rows), cdiv(dim, block_dim)),
        arguments=arguments,
        constants={
            # A constant, so that the compiler knows what is aligned; the only row of a tensor may claim any stride.
            "STRIDE": source.stride(0) if source.shape[0] > 1 else dim,
            "DIM": dim,
            "BLOCK_ROWS": block_rows,
            "BLOCK_DIM": block_dim,
        },
        num_warps=4,
        num_stages=1,  # no loop to pipeline
    )


@triton.jit(do_not_specialize=["tokens"])
def _pack_kernel(
    hidden_ptr,  # [B * S, DIM]
    indices_ptr,  # [tokens], int32 or int64
    values_ptr,  # [tokens, DIM], contiguous
    tokens,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    col = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]
    exists = token < tokens
    position = tl.load(indices_ptr + token, mask=exists, other=0).to(tl.int64)
    mask = exists[:, None] & (col < DIM)
    row = tl.load(hidden_ptr + position[:, None] * STRIDE + col, mask=mask, other=0.0)
    tl.store(values_ptr + token.to(tl.int64)[:, None] * DIM + col, row, mask=mask)


@triton.jit(do_not_specialize=["tokens", "positions", "search_steps"])
def _unpack_kernel(
    values_ptr,  # [tokens, DIM]
    indices_ptr,  # [tokens], int32 or int64, ascending
    padded_ptr,  # [positions, DIM], contiguous
    tokens,
    positions,
    search_steps,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    position = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    col = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]

    # How many indices are before this position? At least low, and at most width more: every step asks at 32 places
    # between them, of which `span - 1` indices stay unknown.
    low = tl.full([BLOCK_ROWS], 0, tl.int32)
    width = tokens
    for _ in range(search_steps):
        span = tl.cdiv(width, 32)
        last = low[:, None] + (tl.arange(0, 32)[None, :] + 1) * span - 1  # [BLOCK_ROWS, 32]
        index = tl.load(indices_ptr + last, mask=last < tokens, other=positions)
        low += span * tl.sum((index < position[:, None]).to(tl.int32), axis=1)
        width = span - 1
    found = tl.load(indices_ptr + low, mask=low < tokens, other=-1) == position

    exists = (position < positions)[:, None] & (col < DIM)
    row = tl.load(values_ptr + low.to(tl.int64)[:, None] * STRIDE + col, mask=exists & found[:, None], other=0.0)
    tl.store(padded_ptr + position.to(tl.int64)[:, None] * DIM + col, row, mask=exists)
