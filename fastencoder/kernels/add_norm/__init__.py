"""``add_norm``: residual addition, optional layer scale, and LayerNorm."""

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
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum = residual + scale * x`` and ``normed = LayerNorm(sum) * weight + bias`` (Ba et al., arXiv 1607.06450).

    The sum, its mean and its centred variance are kept in float32; ``normed`` is computed from the sum before rounding.

    Args:
        x: ``[T, D]``.
        residual: ``[T, D]``, same dtype as ``x``; None adds nothing.
        weight: ``[D]``.
        bias: ``[D]`` or None.
        eps: added to the variance.
        scale: ``[D]``, the layer scale of ``x`` (Touvron et al., arXiv 2103.17239); None is 1.

    Returns:
        ``normed`` and ``sum``, both ``[T, D]`` in the dtype of ``x``. Where there is neither residual nor scale,
            ``sum`` is
        ``x`` itself and not a copy (the registered operator copies, because operators may not alias).

    Raises:
        ValueError: shapes that do not fit.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.add_norm(x, residual, weight, bias, eps, scale)
    _check(x, residual, weight, bias, scale)
    return _add_norm(x, residual, weight, bias, eps, scale)


def _run(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, weight, bias, scale)
    normed, total = _add_norm(x, residual, weight, bias, eps, scale)
    return normed, total.clone() if total is x else total


def _fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, weight, bias, scale)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _check(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    if x.dim() != 2 or (residual is not None and residual.shape != x.shape):
        shape = None if residual is None else tuple(residual.shape)
        raise ValueError(f"x and residual must both be [T, D], got {tuple(x.shape)} and {shape}")
    for name, vector in (("weight", weight), ("bias", bias), ("scale", scale)):
        if vector is not None and vector.shape != x.shape[1:]:
            raise ValueError(f"{name} must be [D] = [{x.shape[1]}], got {tuple(vector.shape)}")


register(
    "add_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, Tensor? scale=None)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
)
