"""``linear``: a projection with its bias, activation and residual in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastencoder.kernels._dispatch import Dispatcher, device_kind, register
from fastencoder.kernels._triton import dot_precision
from fastencoder.kernels.linear.reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "linear"]

_linear = Dispatcher(__name__, "linear")


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(x @ weight.T + bias) + residual``, accumulated and finished in float32, rounded once to ``x.dtype``.

    Args:
        x: ``[T, K]``.
        weight: ``[N, K]``, as ``nn.Linear`` keeps it; same dtype as ``x``.
        bias: ``[N]``.
        activation: a name in :data:`ACTIVATIONS`. ``"gelu"`` is the exact erf form, ``"gelu_tanh"`` the tanh form
            (both: Hendrycks and Gimpel, arXiv 1606.08415), ``"quick_gelu"`` is ``x * sigmoid(1.702 x)``.
        residual: ``[T, N]``, same dtype as ``x``.

    Returns:
        ``[T, N]``.

    Raises:
        ValueError: an unknown activation, or shapes that do not fit.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.linear(x, weight, bias, activation, residual)
    return _run(x, weight, bias, activation, residual)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(x, weight, bias, activation, residual)
    if device_kind(x) == "cuda" and _vendor_gemm_is_better(x.dtype, activation, residual):
        out = F.linear(x, weight, bias)
        if activation != "identity":
            out = ACTIVATIONS[activation](out)
        return out if residual is None else out.add_(residual)
    return _linear(x, weight, bias, activation, residual)


def _vendor_gemm_is_better(dtype: torch.dtype, activation: str, residual: torch.Tensor | None) -> bool:
    """The fastest plain GEMM is the vendor's, which adds a bias for nothing: ours pays where it saves a pass over the
    output.

    Exact float32 has no matrix unit, where the vendor is far ahead, and its separate epilogue rounds nothing away.
    """
    plain = activation == "identity" and residual is None
    return plain or (dtype == torch.float32 and dot_precision(dtype) == "ieee")


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(x, weight, bias, activation, residual)
    return x.new_empty(x.shape[0], weight.shape[0])


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [T, K] and weight [N, K], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [N] = [{weight.shape[0]}], got {tuple(bias.shape)}")
    if residual is not None and (residual.dim() != 2 or residual.shape != (x.shape[0], weight.shape[0])):
        raise ValueError(f"residual must be [{x.shape[0]}, {weight.shape[0]}], got {tuple(residual.shape)}")


register(
    'linear(Tensor x, Tensor weight, Tensor? bias=None, str activation="identity", Tensor? residual=None) -> Tensor',
    _run,
    _fake,
)
