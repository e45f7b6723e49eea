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
        return kernels.linear(x, self.weight(x.dtype), self.bias(x.dtype), activation, residual, scale=scale)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """`[N, K]` in this dtype."""
        return self.linear.weight.to(dtype)

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """`[N]` in this dtype, or None. It is small, so no copy of it is kept."""
        return None if self.linear.bias is None else self.linear.bias.to(dtype)

    def sums(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For `add_norm`: the product `[T, N]`, or its partial sums `[P, T, N]` and the bias that is still to be added. Few
        tokens leave most of a GPU idle unless the sum over K is divided."""
        shape = self.linear.weight.shape
        if device_kind(x) == "cuda" and kernels.partial_splits(x.shape[0], *shape, x.dtype, x.device) > 1:
            return kernels.linear_partial(x, self.weight(x.dtype)), self.bias(x.dtype)
        return self(x), None


class Cast(Plain):
    """A copy of the weight in the dtype in which the layer computes; the bias stays the module's own."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        super().__init__(linear)
        self._weight = linear.weight.detach().to(dtype)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self._weight if dtype == self._weight.dtype else super().weight(dtype)


class Prepacked(Plain):
    """A copy of the weight in the layout that is multiplied fastest, in the dtype in which the layer computes; the bias stays
    the module's own."""

    def __init__(self, linear: Any, dtype: torch.dtype, in_panels: bool = False) -> None:
        super().__init__(linear)
        self._dtype = dtype
        self.packed = linear_cpu.prepack(linear.weight, dtype=dtype, in_panels=in_panels)

    def __call__(
        self,
        x: torch.Tensor,
        activation: str = "identity",
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not linear_cpu.takes(self.packed, self._dtype, x.dtype):
            return super().__call__(x, activation, residual, scale)
        return linear_cpu.linear_prepacked(x, self.packed, self.bias(x.dtype), activation, residual, scale=scale)


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
