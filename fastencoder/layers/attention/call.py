"""One call of one layer on packed tokens: everything that a program or a kind of attention may look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...kernels import add_norm
from ...packing import PackedBatch
from ...spec import LayerSpec
from ..binding import Binding

if TYPE_CHECKING:
    from ..weights import Projections


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One layer, the packed batch and the mask that it is given, and the other arguments of its call by name."""

    binding: Binding
    projections: Projections
    batch: PackedBatch
    layer: nn.Module | None
    arguments: dict[str, Any]
    mask: Any = None

    @property
    def spec(self) -> LayerSpec:
        return self.binding.spec

    def norm(
        self,
        slot: str,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        x_bias: torch.Tensor | None = None,
        keep_sum: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`sum = residual + scale * (x + x_bias)`; returns the norm in this slot of it and, if it is kept, `sum`.

        `x` is `[T, D]`, or partial sums `[P, T, D]` (see `kernels.add_norm`).
        """
        norm = self.binding.norm(slot)
        if norm is None:
            return self._opaque_norm(slot, x, residual, scale, x_bias)
        weight, bias = norm.weight, norm.bias
        if weight.dtype != x.dtype and x.dim() == 2:  # the working dtype is not the weights' (partial sums are float32 anyway)
            weight, bias, scale = (None if vector is None else vector.to(x.dtype) for vector in (weight, bias, scale))
        return add_norm(x, residual, weight, bias, norm.eps, scale, x_bias=x_bias, rms=norm.rms, keep_sum=keep_sum)

    def _opaque_norm(
        self,
        slot: str,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        scale: torch.Tensor | None,
        x_bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if x.dim() == 2 else x.sum(0)
        total = total if x_bias is None else total + x_bias
        total = total if scale is None else total * scale
        if residual is not None:
            total = (residual + total).to(residual.dtype)
        dtype = self.projections.dtype
        return self.binding.norms[slot](total.to(dtype).unsqueeze(0))[0].to(total.dtype), total
