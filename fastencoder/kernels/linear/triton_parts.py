"""What the kernels of ``linear`` share: the order of tiles, and the epilogue on float32 numbers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_position(tile, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile. ``GROUP_M`` rows of tiles are worked through before the next column, so that
    tiles that run at the same time share their operands in the L2 cache."""
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    start_m = (first_m + tile % (GROUP_M * tiles_n) % group_m) * BLOCK_M
    start_n = tile % (GROUP_M * tiles_n) // group_m * BLOCK_N
    return start_m, start_n


@triton.jit
def finish(
    acc,  # [rows, columns] float32
    up,  # the same of a gated product's other half, otherwise None
    start_m,
    start_n,
    bias_ptr,  # [N], gated: [2 N], or None
    residual_ptr,  # [M, N] or None
    residual_stride,
    scale_ptr,  # [N] or None
    M,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The epilogue of the part of the output that begins at ``[start_m, start_n]``: float32."""
    row = tl.arange(0, acc.shape[0])
    col = tl.arange(0, acc.shape[1])
    col_mask = start_n + col < N
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + start_n + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if up is not None:
        if bias_ptr is not None:
            up += tl.load(bias_ptr + N + start_n + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        acc *= up
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + start_n + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_tile = residual_ptr + start_m.to(tl.int64) * residual_stride + start_n
        mask = (start_m + row < M)[:, None] & col_mask[None, :]
        residual = tl.load(residual_tile + (row[:, None] * residual_stride + col[None, :]), mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    return acc


@triton.jit
def halves(x):
    """The left and the right half of the columns of ``x`` ``[rows, columns]``."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The functions of ``reference.ACTIVATIONS``, on float32."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(y)) / 2 = sigmoid(2 y) with y = sqrt(2 / pi) (x + 0.044715 x^3)
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "quick_gelu":
        x = x / (1.0 + tl.exp(-1.702 * x))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # keeps NaN, as PyTorch does
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
    return x


@triton.jit(do_not_specialize=["M"])
def reduction_kernel(
    partial_ptr,  # [SPLITS, M, N], gated: [SPLITS, M, 2 N], float32
    bias_ptr,  # [N], gated: [2 N], or None
    residual_ptr,  # [M, N] or None
    scale_ptr,  # [N] or None
    out_ptr,  # [M, N], contiguous
    M,
    residual_stride,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of partial products, in the order of the parts, and the epilogue on it."""
    width: tl.constexpr = 2 * N if GATED else N
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = element // N, element % N
    mask = row < M
    size = tl.cast(M, tl.int64) * width
    partial = partial_ptr + row * width + col
    acc = tl.load(partial, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(partial + split * size, mask=mask, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION)
    if GATED:
        up = tl.load(partial + N, mask=mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            up += tl.load(partial + N + split * size, mask=mask, other=0.0)
        if bias_ptr is not None:
            up += tl.load(bias_ptr + N + col, mask=mask, other=0.0).to(tl.float32)
        acc *= up
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + col, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + row * residual_stride + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + element, acc.to(out_ptr.dtype.element_ty), mask=mask)
