"""Plain PyTorch ``add_norm``."""

from __future__ import annotations

import torch

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
    dtype, result = accumulation_dtype(x.dtype), result_dtype(x, residual, weight)
    total = x.to(dtype) if x.dim() == 2 else x.sum(dim=0)
    if x_bias is not None:
        total = total + x_bias.to(dtype)
    if scale is not None:
        total = total * scale.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    centred = total if rms else total - total.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    normed = centred / torch.sqrt(variance + eps) * weight.to(dtype)
    if bias is not None:
        normed = normed + bias.to(dtype)
    if not keep_sum:
        return normed.to(result), normed.new_empty((0, normed.shape[1]), dtype=result)
    nothing_added = x.dim() == 2 and residual is None and scale is None and x_bias is None
    return normed.to(result), x if nothing_added else total.to(result)
