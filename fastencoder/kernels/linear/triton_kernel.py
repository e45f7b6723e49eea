"""``linear`` in Triton: a tiled GEMM whose bias, activation and residual are applied to the float32 accumulator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastencoder.kernels._triton import (
    DeviceLimits,
    Launch,
    cdiv,
    device_limits,
    dot_precision,
    next_power_of_2,
    rows_contiguous,
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T, K]``, ``[N, K]``, ``[N]``, name, ``[T, N]`` -> ``[T, N]``."""
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    residual = None if residual is None else rows_contiguous(residual)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    plan(x, weight, bias, activation, residual, out, device_limits(x.device)).run(x.device)
    return out


def plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    limits: DeviceLimits,
) -> Launch:
    """The launch that fills ``out`` on a device with these limits."""
    (m, k), n = x.shape, weight.shape[0]
    tile = choose_tile(m, n, x.dtype, limits)
    return Launch(
        kernel=_linear_kernel,
        grid=(cdiv(m, tile.m) * cdiv(n, tile.n),),
        arguments={
            "x_ptr": x,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "residual_ptr": residual,
            "out_ptr": out,
            "M": m,
            "K": k,
            "x_stride": x.stride(0),
            "weight_stride": weight.stride(0),
            "residual_stride": 0 if residual is None else residual.stride(0),
        },
        constants={
            "N": n,
            "WHOLE_STEPS": k % tile.k == 0,
            "ACTIVATION": activation,
            "PRECISION": dot_precision(x.dtype),
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "GROUP_M": 8,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


class Tile(NamedTuple):
    """The part of the output that one program computes, and how."""

    m: int
    n: int
    k: int  # of one step along the summed dimension
    num_warps: int
    num_stages: int


# From large to small. The largest keeps 64 accumulators a thread: that leaves room for the erf of GELU, and two
# programs fit a multiprocessor, so that one computes while the other is in its epilogue (K is short in encoders).
_TILES_16_BIT = (
    Tile(128, 128, 64, 8, 3),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 32, 64, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(32, 32, 128, 4, 4),
    Tile(16, 64, 128, 4, 4),
    Tile(16, 32, 128, 4, 4),
)
# Without TF32, float32 runs on the ordinary cores, which want both operands in registers: small steps.
_TILES_32_BIT = (
    Tile(64, 64, 32, 4, 3),
    Tile(64, 32, 16, 4, 3),
    Tile(32, 32, 16, 4, 3),
    Tile(16, 32, 16, 4, 3),
)


def choose_tile(m: int, n: int, dtype: torch.dtype, limits: DeviceLimits) -> Tile:
    """The largest tile that still gives every multiprocessor a program, with as many stages as fit shared memory.

    Up to 64 rows the tile holds all of them, because reading the weights is what takes the time.
    """
    rows = max(16, next_power_of_2(m))
    tiles = _TILES_32_BIT if dtype == torch.float32 else _TILES_16_BIT
    tiles = [tile for tile in tiles if tile.m == min(rows, 64) or (tile.m == 128 and rows >= 128)]
    tile = next((t for t in tiles if cdiv(m, t.m) * cdiv(n, t.n) >= limits.multiprocessors), tiles[-1])
    if limits.capability < (9, 0) and tile.m == 128:  # matrix operands come from registers there: shorter, more steps
        tile = tile._replace(k=32, num_stages=4)
    stage_bytes = (tile.m + tile.n) * tile.k * dtype.itemsize
    return tile._replace(num_stages=max(1, min(tile.num_stages, limits.shared_bytes // stage_bytes)))


@triton.jit
def _linear_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    out_ptr,  # [M, N], contiguous
    M,
    K,
    x_stride,
    weight_stride,
    residual_stride,
    N: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,  # whether BLOCK_K divides K
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs run through GROUP_M rows of tiles before the next column, so that their operands meet in the L2 cache.
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    start_m = (first_m + program % (GROUP_M * tiles_n) % group_m) * BLOCK_M
    start_n = program % (GROUP_M * tiles_n) // group_m * BLOCK_N

    row = tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    row_mask = start_m + row < M
    col_mask = start_n + col < N
    # Rows and columns beyond the end read the tile's first row or column again, which always exists: no mask in the
    # loop.
    x_row = tl.where(row_mask, row, 0)
    weight_row = tl.where(col_mask, col, 0)
    x_tile = x_ptr + start_m.to(tl.int64) * x_stride
    x_tile += x_row[:, None] * x_stride + step[None, :]
    weight_tile = weight_ptr + start_n.to(tl.int64) * weight_stride
    weight_tile += weight_row[None, :] * weight_stride + step[:, None]

    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for k in range(0, K, BLOCK_K):
        if WHOLE_STEPS:
            x = tl.load(x_tile)
            weight = tl.load(weight_tile)
        else:
            x = tl.load(x_tile, mask=step[None, :] < K - k, other=0.0)
            weight = tl.load(weight_tile, mask=step[:, None] < K - k, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_tile += BLOCK_K
        weight_tile += BLOCK_K

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + start_n + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    acc = _activate(acc, ACTIVATION)
    mask = row_mask[:, None] & col_mask[None, :]
    if residual_ptr is not None:
        residual_tile = residual_ptr + start_m.to(tl.int64) * residual_stride + start_n
        residual = tl.load(residual_tile + (row[:, None] * residual_stride + col[None, :]), mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    out_tile = out_ptr + start_m.to(tl.int64) * N + start_n
    tl.store(out_tile + (row[:, None] * N + col[None, :]), acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
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
