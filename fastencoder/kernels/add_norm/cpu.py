"""``add_norm`` on CPU: one addition and PyTorch's own LayerNorm or RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastencoder.kernels._dispatch import accumulation_dtype
from fastencoder.kernels.add_norm import result_dtype


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
    norm = _rms_norm if rms else F.layer_norm
    dtype, result = accumulation_dtype(x.dtype), result_dtype(x, residual, weight)
    if x.dim() == 3:
        x = x.sum(dim=0)
        total = x if residual is None and scale is None and x_bias is None else _add(x, residual, scale, x_bias)
    elif residual is None and scale is None and x_bias is None:
        return norm(x, weight.shape, weight, bias, eps), x if keep_sum else x.new_empty(0, x.shape[1])
    elif dtype == x.dtype:
        total = _add(x, residual, scale, x_bias)
    else:  # 16 bit: the norm must see the sum before it is rounded
        total = x.to(dtype)
        if x_bias is not None:
            total.add_(x_bias)
        if scale is not None:
            total.mul_(scale)
        if residual is not None:
            total.add_(residual)
    if weight.dtype != total.dtype:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    normed = norm(total, weight.shape, weight, bias, eps).to(result)
    return normed, total.to(result) if keep_sum else normed.new_empty(0, normed.shape[1])


def _add(
    x: torch.Tensor, residual: torch.Tensor | None, scale: torch.Tensor | None, x_bias: torch.Tensor | None
) -> torch.Tensor:
    if x_bias is not None:
        x = x + x_bias
    if scale is None:
        return x if residual is None else x + residual
    if residual is None:
        return x * scale
    return torch.addcmul(residual.to(x.dtype), x, scale.to(x.dtype))


def _rms_norm(
    x: torch.Tensor, shape: torch.Size, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """``F.layer_norm``'s arguments. 16-bit rows are rounded once, at the end."""
    dtype = accumulation_dtype(x.dtype)
    normed = F.rms_norm(x.to(dtype), shape, weight.to(dtype), eps)
    return (normed if bias is None else normed + bias).to(x.dtype)
