"""Rotary position embedding (https://arxiv.org/abs/2104.09864), from the tables that the model makes for its layers."""

from __future__ import annotations

from typing import Any

import torch

from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind


class Rope(AttentionKind):
    """Queries and keys are turned by `position_embeddings`, a pair of cosines and sines `[1 or B, S, r]`.

    Args:
        interleaved: pairs are neighbours (2i, 2i + 1), and their angle stands twice side by side in the tables; otherwise pairs
            are (i, i + r / 2), and the second half of the tables repeats the first.
        argument: the name of the layer's argument.
    """

    def __init__(self, interleaved: bool, argument: str = "position_embeddings") -> None:
        self.interleaved = interleaved
        self.argument = argument
        self.reads = frozenset({argument})

    def features(self, call: LayerCall) -> dict[str, Any]:
        tables = call.arguments.get(self.argument)
        if not isinstance(tables, tuple | list) or len(tables) != 2:
            raise Delegated(f"{self.argument} is not a pair of cosines and sines")
        try:
            cos, sin = (call.batch.per_token(table, self._half) for table in tables)
        except ValueError as error:
            raise Delegated(f"{self.argument}: {error}") from None
        return {"rope": (cos, sin, self.interleaved)}

    def _half(self, table: torch.Tensor) -> torch.Tensor:
        """One angle for each pair: `[1 or B, S, r]` -> `[1 or B, S, r / 2]`."""
        return table[..., ::2] if self.interleaved else table[..., : table.shape[-1] // 2]
