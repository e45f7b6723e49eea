"""DETR's attention: positions are added to what queries and keys are projected from, and not to values."""

from __future__ import annotations

import torch

from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind


class SpatialPositions(AttentionKind):
    """`q` and `k` are projections of `x + positions`, `v` of `x` (https://arxiv.org/abs/2005.12872, section A.4).

    Args:
        argument: the layer's argument that holds the positions, `[1 or B, S, D]`, or None for no positions.
    """

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.reads = frozenset({argument})

    def queries_keys_values(
        self, call: LayerCall, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        positions, placed = call.arguments.get(self.argument), x
        if positions is not None:
            if not isinstance(positions, torch.Tensor) or positions.dim() != 3:
                raise Delegated(f"{self.argument} is not [B, S, D]")
            try:
                placed = x + call.batch.per_token(positions, _as_given).to(x.dtype)
            except ValueError as error:
                raise Delegated(f"{self.argument}: {error}") from None
        slots, dim = call.projections.slots, call.spec.head_dim
        inputs = {"query": placed, "key": placed, "value": x}
        q, k, v = (slots[slot](tokens).unflatten(1, (-1, dim)) for slot, tokens in inputs.items())
        return q, k, v


def _as_given(table: torch.Tensor) -> torch.Tensor:
    return table
