"""Plain PyTorch ``linear`` and ``linear_partial``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastencoder.kernels._dispatch import accumulation_dtype

# The activations that a linear can finish with, by the name that the rest of the package uses.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
    gated: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T, K]``, ``[N, K]`` (gated: ``[2 N, K]``), ``[N]`` (``[2 N]``), name, ``[T, N]`` -> ``[T, N]``."""
    dtype = accumulation_dtype(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    residual = None if residual is None else residual.to(dtype)
    product = F.linear(x.to(dtype), weight.to(dtype), bias)
    scale = None if scale is None else scale.to(dtype)
    return finish(product, activation, residual, gated, scale).to(x.dtype)


def finish(
    product: torch.Tensor,
    activation: str,
    residual: torch.Tensor | None,
    gated: bool,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The epilogue on a product with its bias, ``[T, N]`` or gated ``[T, 2 N]``, in the product's own dtype."""
    if gated:
        half, up = product.chunk(2, dim=1)
        result = ACTIVATIONS[activation](half) * up
    else:
        result = ACTIVATIONS[activation](product)
    if scale is not None:
        return result * scale if residual is None else torch.addcmul(residual, result, scale)
    return result if residual is None else result + residual


def linear_partial(x: torch.Tensor, weight: torch.Tensor, splits: int) -> torch.Tensor:
    """``[T, K]``, ``[N, K]`` -> ``[splits, T, N]`` in float32 or wider."""
    dtype = accumulation_dtype(x.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    parts = zip(x.tensor_split(splits, dim=1), weight.tensor_split(splits, dim=1), strict=True)
    return torch.stack([part @ part_weight.T for part, part_weight in parts])
