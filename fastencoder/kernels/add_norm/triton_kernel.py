"""``add_norm`` in Triton: every row is read once and normalised from registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastencoder.kernels._triton import DeviceLimits, Launch, cdiv, device_limits, rows_contiguous
from fastencoder.kernels.add_norm import result_dtype
from fastencoder.kernels.add_norm.triton_rows import normalise, row_stride, row_tile


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    rms: bool = False,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, D]`` or ``[P, T, D]``, ``[T, D]``, ``[D]``, ``[D]``, eps, ``[D]``, ``[D]`` -> ``[T, D]``, ``[T, D]``."""
    nothing_added = x.dim() == 2 and residual is None and scale is None and x_bias is None
    x = rows_contiguous(x) if x.dim() == 2 else x.contiguous()
    residual = None if residual is None else rows_contiguous(residual)
    dtype = result_dtype(x, residual, weight)
    normed = torch.empty(x.shape[-2:], dtype=dtype, device=x.device)
    total = torch.empty_like(normed) if keep_sum and not nothing_added else None
    limits = device_limits(x.device)
    plan(x, residual, weight, bias, eps, scale, x_bias, rms, normed, total, limits).run(x.device)
    if not keep_sum:
        return normed, normed.new_empty(0, x.shape[-1])
    return normed, x if total is None else total


def plan(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    rms: bool,
    normed: torch.Tensor,
    total: torch.Tensor | None,
    limits: DeviceLimits,
) -> Launch:
    """The launch that fills ``normed`` and, unless it is None, ``total``."""
    rows, dim = normed.shape
    few = x.dim() == 3  # nobody splits a product of many rows
    block_rows, block_dim, num_warps = row_tile(1 if few else rows, dim, x.element_size(), limits)
    return Launch(
        kernel=_add_norm_kernel,
        grid=(cdiv(rows, block_rows),),
        arguments={
            "x_ptr": x,
            "residual_ptr": residual,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "scale_ptr": scale,
            "x_bias_ptr": x_bias,
            "normed_ptr": normed,
            "total_ptr": total,
            "rows": rows,
            "eps": float(eps),
        },
        constants={
            "PARTS": 1 if x.dim() == 2 else x.shape[0],
            "RMS": rms,
            "X_STRIDE": row_stride(x) if x.dim() == 2 else dim,
            "RESIDUAL_STRIDE": 0 if residual is None else row_stride(residual),
            "DIM": dim,
            "BLOCK_ROWS": block_rows,
            "BLOCK_DIM": block_dim,
        },
        num_warps=num_warps,
        num_stages=1,  # the parts are few: the compiler unrolls their loop
    )


@triton.jit(do_not_specialize=["rows"])
def _add_norm_kernel(
    x_ptr,  # [rows, DIM]; contiguous [PARTS, rows, DIM] if there are several parts
    residual_ptr,  # [rows, DIM] or None
    weight_ptr,  # [DIM]
    bias_ptr,  # [DIM] or None
    scale_ptr,  # [DIM] or None
    x_bias_ptr,  # [DIM] or None
    normed_ptr,  # [rows, DIM], contiguous
    total_ptr,  # [rows, DIM], contiguous, or None
    rows,
    eps,
    PARTS: tl.constexpr,
    RMS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]  # [BLOCK_ROWS, 1]
    col = tl.arange(0, BLOCK_DIM)[None, :]  # [1, BLOCK_DIM]
    col_mask = col < DIM
    mask = (row < rows) & col_mask

    total = tl.load(x_ptr + row * X_STRIDE + col, mask=mask, other=0.0).to(tl.float32)
    part_ptr = x_ptr + row * DIM + col
    for _ in range(1, PARTS):
        part_ptr += rows.to(tl.int64) * DIM  # a product with DIM, and not a stride: so it is known to be aligned
        total += tl.load(part_ptr, mask=mask, other=0.0)
    if x_bias_ptr is not None:
        total += tl.load(x_bias_ptr + col, mask=col_mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + col, mask=col_mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row * RESIDUAL_STRIDE + col, mask=mask, other=0.0).to(tl.float32)
    if total_ptr is not None:
        tl.store(total_ptr + row * DIM + col, total.to(total_ptr.dtype.element_ty), mask=mask)

    normed = normalise(total, weight_ptr, bias_ptr, eps, col, DIM, RMS)
    tl.store(normed_ptr + row * DIM + col, normed.to(normed_ptr.dtype.element_ty), mask=mask)
