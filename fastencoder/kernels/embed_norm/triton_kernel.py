"""``embed_norm`` in Triton: one launch, every table row is read once, and normalised from registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastencoder.kernels._triton import DeviceLimits, Launch, cdiv, device_limits, rows_contiguous
from fastencoder.kernels.add_norm.triton_rows import normalise, row_stride, row_tile
from fastencoder.kernels.embed_norm import reference


def embed_norm(
    ids: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    position_ids: torch.Tensor | None = None,
    position_table: torch.Tensor | None = None,
    type_ids: torch.Tensor | None = None,
    type_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T]``, ``[V, D]``, ``[D]``, ``[D]``, eps, ``[T]``, ``[M, D]``, ``[T]``, ``[N, D]`` -> ``[T, D]``."""
    if table.dtype == torch.float64:  # the kernel adds in float32
        return reference.embed_norm(ids, table, weight, bias, eps, position_ids, position_table, type_ids, type_table)
    tables = [
        (None, None) if of is None else (rows.contiguous(), rows_contiguous(of))
        for rows, of in ((ids, table), (type_ids, type_table), (position_ids, position_table))
    ]
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=table.dtype, device=table.device)
    plan(tables, weight, bias, eps, out, device_limits(table.device)).run(table.device)
    return out


def plan(
    tables: list[tuple[torch.Tensor | None, torch.Tensor | None]],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    limits: DeviceLimits,
) -> Launch:
    """The launch that fills ``out`` [T, D] from ``tables``: ids and table of the tokens, the types and the positions."""
    tokens, dim = out.shape
    block_rows, block_dim, num_warps = row_tile(tokens, dim, out.element_size(), limits)
    constants = {"DIM": dim, "BLOCK_ROWS": block_rows, "BLOCK_DIM": block_dim}
    arguments = {"weight_ptr": weight, "bias_ptr": bias, "out_ptr": out, "tokens": tokens, "eps": float(eps)}
    for name, (ids, table) in zip(("token", "type", "position"), tables, strict=True):
        arguments |= {
            f"{name}_ids_ptr": ids,
            f"{name}_table_ptr": table,
            f"{name}_rows": 0 if table is None else table.shape[0],
        }
        constants[f"{name.upper()}_STRIDE"] = 0 if table is None else row_stride(table)
    return Launch(
        kernel=_embed_norm_kernel,
        grid=(cdiv(tokens, block_rows),),
        arguments=arguments,
        constants=constants,
        num_warps=num_warps,
        num_stages=1,  # no loop to pipeline
    )


@triton.jit(do_not_specialize=["tokens", "token_rows", "type_rows", "position_rows"])
def _embed_norm_kernel(
    token_ids_ptr,  # [tokens], int32 or int64
    token_table_ptr,  # [token_rows, DIM]
    type_ids_ptr,  # [tokens] or None
    type_table_ptr,  # [type_rows, DIM] or None
    position_ids_ptr,  # [tokens] or None
    position_table_ptr,  # [position_rows, DIM] or None
    weight_ptr,  # [DIM]
    bias_ptr,  # [DIM] or None
    out_ptr,  # [tokens, DIM], contiguous
    tokens,
    token_rows,
    type_rows,
    position_rows,
    eps,
    TOKEN_STRIDE: tl.constexpr,
    TYPE_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    token = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]  # [BLOCK_ROWS, 1]
    col = tl.arange(0, BLOCK_DIM)[None, :]  # [1, BLOCK_DIM]
    exists = token < tokens

    total, valid = _looked_up(token_ids_ptr, token_table_ptr, token_rows, TOKEN_STRIDE, token, col, exists, DIM)
    if type_table_ptr is not None:
        row, known = _looked_up(type_ids_ptr, type_table_ptr, type_rows, TYPE_STRIDE, token, col, exists, DIM)
        total, valid = total + row, valid & known
    if position_table_ptr is not None:
        row, known = _looked_up(
            position_ids_ptr, position_table_ptr, position_rows, POSITION_STRIDE, token, col, exists, DIM
        )
        total, valid = total + row, valid & known

    normed = normalise(total, weight_ptr, bias_ptr, eps, col, DIM, False)
    normed = tl.where(valid, normed, float("nan"))
    tl.store(out_ptr + token * DIM + col, normed.to(out_ptr.dtype.element_ty), mask=exists & (col < DIM))


@triton.jit
def _looked_up(
    ids_ptr,  # [tokens]
    table_ptr,  # [rows, DIM]
    rows,
    STRIDE: tl.constexpr,
    token,  # [BLOCK_ROWS, 1]
    col,  # [1, BLOCK_DIM]
    exists,  # [BLOCK_ROWS, 1]
    DIM: tl.constexpr,
):
    """The table's rows of these tokens, float32 ``[BLOCK_ROWS, BLOCK_DIM]``, and which of their ids the table has."""
    row = tl.load(ids_ptr + token, mask=exists, other=0).to(tl.int64)
    valid = (row >= 0) & (row < rows)
    return tl.load(table_ptr + row * STRIDE + col, mask=valid & (col < DIM), other=0.0).to(tl.float32), valid
