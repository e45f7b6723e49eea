"""Plain PyTorch ``add_norm``."""

from __future__ import annotations

import torch

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
    dtype = accumulation_dtype(x.dtype)
    total = x.to(dtype)
    if scale is not None:
        total = total * scale.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    centred = total - total.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    normed = centred / torch.sqrt(variance + eps) * weight.to(dtype)
    if bias is not None:
        normed = normed + bias.to(dtype)
    nothing_added = residual is None and scale is None
    return normed.to(x.dtype), x if nothing_added else total.to(x.dtype)
