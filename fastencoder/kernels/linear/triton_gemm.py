"""The GEMM kernels of ``linear``: a program a tile by pointers (with split-K), and persistent by tensor descriptors.

Both keep the accumulator in float32, finish on it, and round once. A gated product has two accumulators in one program, one
for each half of the weight, so that the halves meet in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastencoder.kernels.linear.triton_parts import finish, halves, tile_position


@triton.jit(do_not_specialize=["M"])
def tile_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K], gated: [2 N, K]
    bias_ptr,  # [N], gated: [2 N], or None
    residual_ptr,  # [M, N] or None
    scale_ptr,  # [N] or None
    out_ptr,  # [M, N], with split-K: [splits, M, N] float32; contiguous
    M,
    K,
    x_stride,
    weight_stride,
    residual_stride,
    chunk,  # of K, a multiple of BLOCK_K: what one program sums over with split-K
    N: tl.constexpr,
    SPLIT_K: tl.constexpr,  # store the sums over chunk program_id(1), unfinished
    WHOLE_STEPS: tl.constexpr,  # whether BLOCK_K divides K
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    start_m, start_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    row_mask = start_m + row < M
    col_mask = start_n + col < N
    # Rows and columns beyond the end read the tile's first row or column again, which always exists: no mask in the
    # loop.
    x_tile = x_ptr + start_m.to(tl.int64) * x_stride
    x_tile += tl.where(row_mask, row, 0)[:, None] * x_stride + step[None, :]
    weight_tile = weight_ptr + start_n.to(tl.int64) * weight_stride
    weight_tile += tl.where(col_mask, col, 0)[None, :] * weight_stride + step[:, None]

    first_k = 0
    last_k = K
    if SPLIT_K:
        first_k = tl.program_id(1) * chunk
        last_k = min(first_k + chunk, K)
        x_tile += first_k
        weight_tile += first_k
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    up = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32) if GATED else None
    up_tile = weight_tile + tl.cast(N, tl.int64) * weight_stride
    for k in range(first_k, last_k, BLOCK_K):
        if WHOLE_STEPS:
            x = tl.load(x_tile)
            weight = tl.load(weight_tile)
        else:
            x = tl.load(x_tile, mask=step[None, :] < K - k, other=0.0)
            weight = tl.load(weight_tile, mask=step[:, None] < K - k, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        if GATED:
            if WHOLE_STEPS:
                weight = tl.load(up_tile)
            else:
                weight = tl.load(up_tile, mask=step[:, None] < K - k, other=0.0)
            up = tl.dot(x, weight, up, input_precision=PRECISION)
            up_tile += BLOCK_K
        x_tile += BLOCK_K
        weight_tile += BLOCK_K

    acc = finish(acc, up, start_m, start_n, bias_ptr, residual_ptr, residual_stride, scale_ptr, M, N, ACTIVATION)
    out_tile = out_ptr + start_m.to(tl.int64) * N + start_n
    if SPLIT_K:
        out_tile += tl.program_id(1).to(tl.int64) * M * N
    mask = row_mask[:, None] & col_mask[None, :]
    tl.store(out_tile + (row[:, None] * N + col[None, :]), acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def persistent_kernel(
    x,  # descriptor of [M, K], blocks [BLOCK_M, BLOCK_K]
    weight,  # descriptor of [N, K], gated: [2 N, K], blocks [BLOCK_N, BLOCK_K]
    bias_ptr,  # [N], gated: [2 N], or None
    residual_ptr,  # [M, N] or None
    scale_ptr,  # [N] or None
    out,  # descriptor of [M, N], blocks [BLOCK_M, BLOCK_N / PARTS]
    M,
    residual_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,  # 1 or 2: how the columns of a tile are finished, because that takes registers
):
    # Loads beyond an edge give zeros and stores beyond it do nothing: that is the descriptors' work. Flattened, the
    # loops become one, and the loads of the next tile run during the epilogue of this one.
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        start_m, start_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
        up = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32) if GATED else None
        for k in range(0, K, BLOCK_K):
            x_block = x.load([start_m, k])
            acc = tl.dot(x_block, weight.load([start_n, k]).T, acc, input_precision=PRECISION)
            if GATED:
                up = tl.dot(x_block, weight.load([N + start_n, k]).T, up, input_precision=PRECISION)

        if PARTS == 1:
            result = finish(acc, up, start_m, start_n, bias_ptr, residual_ptr, residual_stride, scale_ptr, M, N, ACTIVATION)
            out.store([start_m, start_n], result.to(out.dtype))
        else:
            middle = start_n + BLOCK_N // 2
            left, right = halves(acc)
            left = finish(left, None, start_m, start_n, bias_ptr, residual_ptr, residual_stride, scale_ptr, M, N, ACTIVATION)
            out.store([start_m, start_n], left.to(out.dtype))
            right = finish(right, None, start_m, middle, bias_ptr, residual_ptr, residual_stride, scale_ptr, M, N, ACTIVATION)
            out.store([start_m, middle], right.to(out.dtype))
