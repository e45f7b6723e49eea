"""``add_norm``: residual addition, optional layer scale, and LayerNorm or RMSNorm."""

from __future__ import annotations

import torch

from fastencoder.kernels._dispatch import Dispatcher, register

__all__ = ["add_norm"]

_add_norm = Dispatcher(__name__, "add_norm")


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None = None,
    *,
    x_bias: torch.Tensor | None = None,
    rms: bool = False,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum = residual + scale * (x + x_bias)`` and ``normed = norm(sum) * weight + bias``.

    The norm is LayerNorm (Ba et al. 2016, arXiv 1607.06450) or RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467). The
    sum, its mean and its centred variance are kept in float32; ``normed`` is computed from the sum before rounding.

    Args:
        x: ``[T, D]``; or float32 ``[P, T, D]``, the partial sums that a matrix product was split into, which are added
            up in float32 in the order of P.
        residual: ``[T, D]``, of the dtype of the result; None adds nothing.
        weight: ``[D]``.
        bias: ``[D]`` or None.
        eps: added to the variance, or to the mean square.
        scale: ``[D]``, the layer scale of ``x`` (Touvron et al. 2021, arXiv 2103.17239); None is 1.
        x_bias: ``[D]``, the bias of the matrix product that made ``x``; None is 0.
        rms: RMSNorm, which subtracts no mean.
        keep_sum: False where nobody reads the sum. It is not written then.

    Returns:
        ``normed`` and ``sum``, both ``[T, D]``. Their dtype is that of ``x``; for partial sums it is that of ``residual``,
            or of ``weight`` without one. Where nothing is added, ``sum`` is ``x`` itself and not a copy (the registered
            operator copies, because operators may not alias). Without ``keep_sum`` it is empty, ``[0, D]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.add_norm(
            x, residual, weight, bias, eps, scale, x_bias=x_bias, rms=rms, keep_sum=keep_sum
        )
    _check(x, residual, weight, bias, scale, x_bias)
    return _add_norm(x, residual, weight, bias, eps, scale, x_bias, rms, keep_sum)


def _run(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None = None,
    *,
    x_bias: torch.Tensor | None = None,
    rms: bool = False,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, weight, bias, scale, x_bias)
    normed, total = _add_norm(x, residual, weight, bias, eps, scale, x_bias, rms, keep_sum)
    return normed, total.clone() if total is x else total


def _fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None = None,
    *,
    x_bias: torch.Tensor | None = None,
    rms: bool = False,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, weight, bias, scale, x_bias)
    rows, dim = x.shape[-2:]
    dtype = result_dtype(x, residual, weight)
    return x.new_empty((rows, dim), dtype=dtype), x.new_empty((rows if keep_sum else 0, dim), dtype=dtype)


def result_dtype(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> torch.dtype:
    """The dtype of ``normed`` and ``sum``: partial sums are float32 whatever the model computes in."""
    if x.dim() == 2:
        return x.dtype
    return weight.dtype if residual is None else residual.dtype


def _check(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    x_bias: torch.Tensor | None,
) -> None:
    if x.dim() not in (2, 3) or (residual is not None and residual.shape != x.shape[-2:]):
        shape = None if residual is None else tuple(residual.shape)
        raise ValueError(f"x and residual must both be [T, D] (or x [P, T, D]), got {tuple(x.shape)} and {shape}")
    if x.dim() == 3 and (x.dtype != torch.float32 or x.shape[0] == 0):
        raise ValueError(f"partial sums must be float32 [P, T, D] with P > 0, got {x.dtype} {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias), ("scale", scale), ("x_bias", x_bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [D] = [{x.shape[-1]}], got {tuple(vector.shape)}")


register(
    "add_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, Tensor? scale=None, *,"
    " Tensor? x_bias=None, bool rms=False, bool keep_sum=True) -> (Tensor, Tensor)",
    _run,
    _fake,
)
