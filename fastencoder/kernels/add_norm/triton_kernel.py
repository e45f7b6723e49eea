"""``add_norm`` in Triton: every row is read once and normalised from registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastencoder.kernels._triton import Launch, cdiv, next_power_of_2, rows_contiguous

_MAX_DIM = 16384  # one row must fit the registers of one program


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, D]``, ``[T, D]``, ``[D]``, ``[D]``, eps, ``[D]`` -> ``[T, D]``, ``[T, D]``."""
    x = rows_contiguous(x)
    residual = None if residual is None else rows_contiguous(residual)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    nothing_added = residual is None and scale is None
    total = None if nothing_added else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plan(x, residual, weight, bias, eps, scale, normed, total).run(x.device)
    return normed, x if nothing_added else total


def plan(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None,
    normed: torch.Tensor,
    total: torch.Tensor | None,
) -> Launch:
    """The launch that fills ``normed`` and, unless it is None, ``total``."""
    rows, dim = x.shape
    if dim > _MAX_DIM:
        raise NotImplementedError(f"add_norm holds a row in registers, up to {_MAX_DIM} columns; got {dim}")
    block_rows, block_dim, num_warps = _tile(dim)
    return Launch(
        kernel=_add_norm_kernel,
        grid=(cdiv(rows, block_rows),),
        arguments={
            "x_ptr": x,
            "residual_ptr": residual,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "scale_ptr": scale,
            "normed_ptr": normed,
            "total_ptr": total,
            "rows": rows,
            "x_stride": x.stride(0),
            "residual_stride": 0 if residual is None else residual.stride(0),
            "eps": eps,
        },
        constants={"DIM": dim, "BLOCK_ROWS": block_rows, "BLOCK_DIM": block_dim},
        num_warps=num_warps,
        num_stages=1,  # no loop to pipeline
    )


def _tile(dim: int) -> tuple[int, int, int]:
    """Rows and columns of a program, and its warps: eight elements (16 bytes of 16 bit) a thread, 2 to 8 warps."""
    block_dim = next_power_of_2(dim)
    block_rows = max(1, min(8, 512 // block_dim))  # small rows share a program
    num_warps = min(max(block_rows * block_dim // 256, 2), 8)
    return block_rows, block_dim, num_warps


@triton.jit
def _add_norm_kernel(
    x_ptr,  # [rows, DIM]
    residual_ptr,  # [rows, DIM] or None
    weight_ptr,  # [DIM]
    bias_ptr,  # [DIM] or None
    scale_ptr,  # [DIM] or None
    normed_ptr,  # [rows, DIM], contiguous
    total_ptr,  # [rows, DIM], contiguous, or None
    rows,
    x_stride,
    residual_stride,
    eps,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]  # [BLOCK_ROWS, 1]
    col = tl.arange(0, BLOCK_DIM)[None, :]  # [1, BLOCK_DIM]
    col_mask = col < DIM
    mask = (row < rows) & col_mask

    total = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + col, mask=col_mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row * residual_stride + col, mask=mask, other=0.0).to(tl.float32)
    if total_ptr is not None:
        tl.store(total_ptr + row * DIM + col, total.to(total_ptr.dtype.element_ty), mask=mask)

    # The variance of the centred row: E[x^2] - E[x]^2 would cancel where the mean is large.
    mean = tl.sum(total, axis=1)[:, None] / DIM
    centred = tl.where(col_mask, total - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / DIM
    normed = centred * tl.rsqrt(variance + eps) * tl.load(weight_ptr + col, mask=col_mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + col, mask=col_mask, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * DIM + col, normed.to(normed_ptr.dtype.element_ty), mask=mask)
