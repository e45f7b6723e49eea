"""``add_norm`` on CPU: one pass in the C++ extension, or one addition and PyTorch's own LayerNorm or RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastencoder.kernels import native
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
    if _is_native(x, residual, weight, bias, scale, x_bias):
        return _native(x, residual, weight, bias, eps, scale, x_bias, rms, keep_sum)
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


def _is_native(x: torch.Tensor, residual: torch.Tensor | None, *vectors: torch.Tensor | None) -> bool:
    """Whether the extension is there and understands these tensors; `vectors` start with the weight."""
    given = [vector for vector in vectors if vector is not None]
    return (
        native.current > 0
        and x.dim() == 2
        and x.dtype in native.DTYPES
        and x.is_contiguous()
        and (residual is None or (residual.dtype == x.dtype and residual.is_contiguous()))
        and given[0].dtype in (x.dtype, torch.float32)
        and all(vector.dtype == given[0].dtype and vector.is_contiguous() for vector in given)
    )


def _native(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    rms: bool,
    keep_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = torch.empty_like(x)
    if not keep_sum:
        total = x.new_empty(0, x.shape[1])
    else:
        total = x if residual is scale is x_bias is None else torch.empty_like(x)
    native.library.add_norm(
        native.current,
        *(native.address(vector) for vector in (x, residual, weight, bias, scale, x_bias, normed)),
        0 if total is x else native.address(total),  # an empty tensor has no address
        *(native.DTYPES[x.dtype], native.DTYPES[weight.dtype], *x.shape, rms, eps, torch.get_num_threads()),
    )
    return normed, total


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
