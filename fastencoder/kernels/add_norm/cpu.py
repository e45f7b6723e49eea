"""``add_norm`` on CPU: one addition and PyTorch's own LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastencoder.kernels._dispatch import accumulation_dtype


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, D]``, ``[T, D]``, ``[D]``, ``[D]``, eps, ``[D]`` -> ``[T, D]``, ``[T, D]``."""
    if residual is None and scale is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps), x
    dtype = accumulation_dtype(x.dtype)
    if dtype == x.dtype:
        total = _add(x, residual, scale)
        return F.layer_norm(total, weight.shape, weight, bias, eps), total
    # 16 bit: the norm must see the sum before it is rounded
    total = x.to(dtype)
    if scale is not None:
        total.mul_(scale)
    if residual is not None:
        total.add_(residual)
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(total, weight.shape, weight.to(dtype), bias, eps).to(x.dtype), total.to(x.dtype)


def _add(x: torch.Tensor, residual: torch.Tensor | None, scale: torch.Tensor | None) -> torch.Tensor:
    if residual is None:
        return x * scale
    if scale is None:
        return x + residual
    return torch.addcmul(residual, x, scale)
