"""One linear slot of a layer as a function on packed tokens, with what is fused behind it:
`scale * activation(x @ weight.T + bias) + residual`, `[T, K]` -> `[T, N]`, in the dtype of `x`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import kernels
from ..kernels._dispatch import device_kind
from ..kernels.linear import cpu as linear_cpu
from ..kernels.linear.reference import finish


class Plain:
    """The module's own weight, cast where the working dtype is another."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear

    def __call__(
        self,
        x: torch.Tensor,
        activation: str = "identity",
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        if weight.dtype != x.dtype:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return kernels.linear(x, weight, bias, activation, residual, scale=scale)

    def sums(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For `add_norm`: the product `[T, N]`, or its partial sums `[P, T, N]` and the bias that is still to be added. Few
        tokens leave most of a GPU idle unless the sum over K is divided."""
        weight = self.linear.weight
        if device_kind(x) == "cuda" and kernels.partial_splits(x.shape[0], *weight.shape, x.dtype, x.device) > 1:
            return kernels.linear_partial(x, weight), self.linear.bias
        return self(x), None


class Prepacked(Plain):
    """A copy of the weight in the layout that is multiplied fastest; the bias stays the module's own."""

    def __init__(self, linear: Any) -> None:
        super().__init__(linear)
        self._weight = linear_cpu.prepack(linear.weight)

    def __call__(
        self,
        x: torch.Tensor,
        activation: str = "identity",
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not linear_cpu.takes(self._weight, self.linear.weight.dtype, x.dtype):
            return super().__call__(x, activation, residual, scale)
        return linear_cpu.linear_prepacked(x, self._weight, self.linear.bias, activation, residual, scale=scale)


class Opaque:
    """A module that is called as it is: an adapter around a linear, a quantised linear, somebody's own."""

    def __init__(self, linear: nn.Module) -> None:
        self.linear = linear

    def __call__(
        self,
        x: torch.Tensor,
        activation: str = "identity",
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        product = self.linear(x.unsqueeze(0))[0]  # in a model it is given [B, S, K]
        return finish(product, activation, residual, False, scale)

    def sums(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self(x), None


Projection = Plain | Opaque
