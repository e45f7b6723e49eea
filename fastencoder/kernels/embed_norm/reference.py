"""Plain PyTorch ``embed_norm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
    dtype = accumulation_dtype(table.dtype)
    total = F.embedding(ids, table).to(dtype)
    for rows, of in ((type_ids, type_table), (position_ids, position_table)):
        if of is not None:
            total = total + F.embedding(rows, of).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(total, weight.shape, weight.to(dtype), bias, eps).to(table.dtype)
