"""``linear``: a projection with bias, activation, gate and residual in one pass; ``linear_partial``: its sums unfinished."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastencoder.kernels import _dispatch
from fastencoder.kernels._dispatch import Dispatcher, device_kind, register
from fastencoder.kernels._triton import device_limits, dot_precision
from fastencoder.kernels.linear import heuristics
from fastencoder.kernels.linear.reference import ACTIVATIONS, finish

__all__ = ["ACTIVATIONS", "linear", "linear_partial", "partial_splits"]

_linear = Dispatcher(__name__, "linear")
_linear_partial = Dispatcher(__name__, "linear_partial")


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
    gated: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``scale * activation(x @ weight.T + bias) + residual``, accumulated and finished in float32, rounded once to ``x.dtype``.

    Gated (Shazeer, arXiv 2002.05202), the first half of ``weight`` and ``bias`` is activated and multiplies the second:
    ``scale * activation(x @ weight[:N].T + bias[:N]) * (x @ weight[N:].T + bias[N:]) + residual``.

    Args:
        x: ``[T, K]``.
        weight: ``[N, K]``, as ``nn.Linear`` keeps it; gated, ``[2 N, K]``; same dtype as ``x``.
        bias: ``[N]``; gated, ``[2 N]``.
        activation: a name in :data:`ACTIVATIONS`. ``"gelu"`` is the exact erf form, ``"gelu_tanh"`` the tanh form
            (both: Hendrycks and Gimpel, arXiv 1606.08415), ``"quick_gelu"`` is ``x * sigmoid(1.702 x)``.
        residual: ``[T, N]``, same dtype as ``x``.
        gated: whether ``weight`` holds two halves.
        scale: ``[N]``, the layer scale (Touvron et al., arXiv 2103.17239); None is 1.

    Returns:
        ``[T, N]``.

    Raises:
        ValueError: an unknown activation, or shapes that do not fit.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.linear(x, weight, bias, activation, residual, gated, scale)
    return _run(x, weight, bias, activation, residual, gated, scale)


def linear_partial(x: torch.Tensor, weight: torch.Tensor, splits: int | None = None) -> torch.Tensor:
    """Partial sums of ``x @ weight.T`` for few tokens, which one program a tile would leave most of a GPU idle for.

    Part ``p`` is the sum over the ``p``-th part of K. The kernel that comes next adds the parts up, and the bias, in an order
    that is always the same: the result is deterministic. The idea is the split-K of CUTLASS.

    Args:
        x: ``[T, K]``.
        weight: ``[N, K]``, same dtype as ``x``.
        splits: how many parts, ``P``; by default as many as :func:`partial_splits` says.

    Returns:
        ``[P, T, N]`` float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit.
    """
    if splits is None:
        splits = partial_splits(x.shape[0], weight.shape[0], x.shape[1], x.dtype, x.device)
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.linear_partial(x, weight, splits)
    return _run_partial(x, weight, splits)


def partial_splits(tokens: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many partial sums :func:`linear_partial` makes of ``[tokens, K] @ [K, N]``; 1 says: call :func:`linear`.

    Always 1 off CUDA, and under ``torch.compile``, where the number of tokens may be unknown.
    """
    if torch.compiler.is_compiling() or not _dispatch.on_gpu(device):
        return 1
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return 1
    limits, precision = device_limits(device), dot_precision(dtype)
    return heuristics.choose(tokens, n, k, dtype, precision, limits, partial=True).splits


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
    gated: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(x, weight, bias, activation, residual, gated, scale)
    if device_kind(x) == "cuda" and _vendor_gemm_is_better(x, weight, activation, residual, gated, scale):
        return finish(F.linear(x, weight, bias), activation, residual, gated, scale)
    return _linear(x, weight, bias, activation, residual, gated, scale)


def _vendor_gemm_is_better(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation: str,
    residual: torch.Tensor | None,
    gated: bool,
    scale: torch.Tensor | None,
) -> bool:
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    return heuristics.choose(
        x.shape[0],
        n,
        x.shape[1],
        x.dtype,
        dot_precision(x.dtype),
        device_limits(x.device),
        activation=activation,
        with_residual=residual is not None or scale is not None,
        gated=gated,
    ).vendor


def _run_partial(x: torch.Tensor, weight: torch.Tensor, splits: int) -> torch.Tensor:
    _check(x, weight, None, "identity", None, False, None)
    return _linear_partial(x, weight, splits)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
    gated: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(x, weight, bias, activation, residual, gated, scale)
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0])


def _fake_partial(x: torch.Tensor, weight: torch.Tensor, splits: int) -> torch.Tensor:
    _check(x, weight, None, "identity", None, False, None)
    return x.new_empty(splits, x.shape[0], weight.shape[0], dtype=_dispatch.accumulation_dtype(x.dtype))


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    gated: bool,
    scale: torch.Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [T, K] and weight [N, K], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if gated and weight.shape[0] % 2:
        raise ValueError(f"a gated weight must be [2 N, K], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [N] = [{weight.shape[0]}], got {tuple(bias.shape)}")
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    if residual is not None and (residual.dim() != 2 or residual.shape != (x.shape[0], n)):
        raise ValueError(f"residual must be [{x.shape[0]}, {n}], got {tuple(residual.shape)}")
    if scale is not None and scale.shape != (n,):
        raise ValueError(f"scale must be [N] = [{n}], got {tuple(scale.shape)}")


register(
    'linear(Tensor x, Tensor weight, Tensor? bias=None, str activation="identity", Tensor? residual=None, '
    "bool gated=False, Tensor? scale=None) -> Tensor",
    _run,
    _fake,
)
register("linear_partial(Tensor x, Tensor weight, int splits) -> Tensor", _run_partial, _fake_partial)
