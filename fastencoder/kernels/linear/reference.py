"""Plain PyTorch ``linear``."""

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
) -> torch.Tensor:
    """``[T, K]``, ``[N, K]``, ``[N]``, name, ``[T, N]`` -> ``[T, N]``."""
    dtype = accumulation_dtype(x.dtype)
    out = x.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        out = out + bias.to(dtype)
    out = ACTIVATIONS[activation](out)
    if residual is not None:
        out = out + residual.to(dtype)
    return out.to(x.dtype)
