"""``embed_norm`` on CPU: one pass in the C++ extension, or PyTorch's embeddings and LayerNorm, and additions in place."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from fastencoder.kernels import native
from fastencoder.kernels._dispatch import accumulation_dtype


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
    tables = [(ids, table)]
    tables += [(rows, of) for rows, of in ((type_ids, type_table), (position_ids, position_table)) if of is not None]
    if _is_native(tables, weight, bias):
        return _native(tables, weight, bias, eps)
    dtype = accumulation_dtype(table.dtype)
    total = F.embedding(ids, table).to(dtype)
    for rows, of in tables[1:]:
        total.add_(F.embedding(rows, of))
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(total, weight.shape, weight.to(dtype), bias, eps).to(table.dtype)


def _is_native(tables: list[tuple[torch.Tensor, torch.Tensor]], weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the extension is there and understands these tensors."""
    dtype = tables[0][1].dtype
    return (
        native.current > 0
        and dtype in native.DTYPES
        and all(table.stride(1) == 1 for _, table in tables)
        and weight.dtype in (dtype, torch.float32)
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
    )


def _native(
    tables: list[tuple[torch.Tensor, torch.Tensor]], weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    ids, table = tables[0]
    out = torch.empty(ids.shape[0], table.shape[1], dtype=table.dtype)
    tables = [(rows.contiguous(), of) for rows, of in tables]
    given = [
        (of.data_ptr(), rows.data_ptr(), of.shape[0], of.stride(0), rows.dtype == torch.int64) for rows, of in tables
    ]
    native.library.embed_norm(
        *(native.current, native.DTYPES[table.dtype], native.DTYPES[weight.dtype], *out.shape),
        *(eps, torch.get_num_threads(), weight.data_ptr(), native.address(bias), out.data_ptr()),
        *itertools.chain.from_iterable(given),
    )
    return out
