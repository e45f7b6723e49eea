"""What kernels share that hold whole rows in registers: how many rows a program takes, and their normalisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastencoder.kernels._dispatch import is_batch_invariant
from fastencoder.kernels._triton import DeviceLimits, next_power_of_2

_MAX_DIM = 16384  # one row must fit the registers of one program
_MAX_WARPS = 16


def row_tile(rows: int, dim: int, itemsize: int, limits: DeviceLimits) -> tuple[int, int, int]:
    """Rows and columns of a program, and its warps. Not measured yet.

    A thread moves 16 bytes of a row at a time. With few rows each row is a program, so that it takes the least time. With
    many rows a thread has two vectors of each operand on their way: two rows, which share the weights and the barriers
    of the reductions (more of them where a row is narrower than a warp). Above 4096 columns of 16 bit one row is enough.

    Args:
        rows: rows of the whole launch.
        dim: columns.
        itemsize: bytes of an element of the widest operand.
        limits: of the device.

    Raises:
        NotImplementedError: more columns than a program can hold.
    """
    if dim > _MAX_DIM:
        raise NotImplementedError(f"a row is held in registers, up to {_MAX_DIM} columns; got {dim}")
    block_dim = next_power_of_2(dim)
    warp = 32 * 16 // itemsize  # columns of which each thread of a warp holds one vector
    num_warps = min(max(block_dim // warp, 1), _MAX_WARPS)
    block_rows = max(2 * num_warps * warp // block_dim, 1)
    if is_batch_invariant() or rows < 2 * block_rows * limits.multiprocessors:
        block_rows = 1
    return block_rows, block_dim, num_warps


def row_stride(x: torch.Tensor) -> int:
    """From one row of ``x`` [rows, columns] to the next, in elements. A single row may claim any stride; it gets the
    usual one, because strides are compiled into the kernels: that is how the compiler knows what is aligned."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


@triton.jit
def normalise(
    total,  # [BLOCK_ROWS, BLOCK_DIM] float32, zero in the columns from DIM on
    weight_ptr,  # [DIM]
    bias_ptr,  # [DIM] or None
    eps,
    col,  # [1, BLOCK_DIM]
    DIM: tl.constexpr,
    RMS: tl.constexpr,
):
    """LayerNorm or RMSNorm of every row, in float32."""
    col_mask = col < DIM
    weight = tl.load(weight_ptr + col, mask=col_mask, other=0.0).to(tl.float32)
    if RMS:
        centred = total
    else:
        # The variance of the centred row: E[x^2] - E[x]^2 would cancel where the mean is large.
        mean = tl.sum(total, axis=1)[:, None] / DIM
        centred = tl.where(col_mask, total - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / DIM
    normed = centred * tl.rsqrt(variance + eps) * weight
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + col, mask=col_mask, other=0.0).to(tl.float32)
    return normed
