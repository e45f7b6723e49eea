"""Rotary position embedding (https://arxiv.org/abs/2104.09864), from the tables that the model makes for its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from ...packing import PackedBatch
from ...parts import lookup
from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind

Prepare = Callable[[torch.Tensor], torch.Tensor]


class Rope(AttentionKind):
    """Queries and keys are turned by `position_embeddings`, a pair of cosines and sines `[1 or B, S, r]`.

    `Adapter.options["rotary"]` may name an attribute of the layer and the value with which its attention turns anything at all.

    Args:
        interleaved: pairs are neighbours (2i, 2i + 1), otherwise (i, i + r / 2).
        repeats: where the angle of a pair stands again in the tables: "halves", if their second half repeats the first, or
            "neighbours".
        argument: the name of the layer's argument.
        optional: a layer that is given no tables turns nothing.
    """

    def __init__(
        self,
        interleaved: bool = False,
        repeats: Literal["halves", "neighbours"] = "halves",
        argument: str = "position_embeddings",
        optional: bool = False,
    ) -> None:
        self.interleaved = interleaved
        self.prepare = _first_half if repeats == "halves" else _every_other
        self.argument = argument
        self.optional = optional
        self.reads = frozenset({argument})

    def features(self, call: LayerCall) -> dict[str, Any]:
        path, value = call.spec.adapter.options.get("rotary", (None, None))  # type: ignore[misc]
        if path is not None and lookup(call.layer, path) != value:
            return {}
        given = call.arguments.get(self.argument)
        if given is None and self.optional:
            return {}
        try:
            cos, sin = (call.batch.per_token(table, prepare) for table, prepare in self.tables(given, call.batch))
        except ValueError as error:
            raise Delegated(f"{self.argument}: {error}") from None
        return {"rope": (cos, sin, self.interleaved)}

    def tables(self, given: Any, batch: PackedBatch) -> Any:
        """Cosines and sines in the argument that was given, each with a function that makes `[1 or B, S, r / 2]` of it."""
        if (
            not isinstance(given, tuple | list)
            or len(given) != 2
            or not all(isinstance(t, torch.Tensor) for t in given)
        ):
            raise Delegated(f"{self.argument} is not a pair of cosines and sines")
        return [(table, self.prepare) for table in given]


class RoFormerRope(Rope):
    """RoFormer's own: one table `[1, 1, S, d]` with sines in its first half and cosines in its second; neighbours are pairs."""

    def __init__(self) -> None:
        super().__init__(interleaved=True, argument="sinusoidal_pos", optional=True)

    def tables(self, given: Any, batch: PackedBatch) -> Any:
        if not isinstance(given, torch.Tensor) or given.dim() != 4 or given.shape[1] != 1:
            raise Delegated(f"{self.argument} is not a table [1, 1, S, d]")
        return (given, _second_half_of_heads), (given, _first_half_of_heads)


class AxialRope(Rope):
    """Each head has a part for each axis of an image, and pairs (i, i + r / 2) inside of the part; tables `[B, S, d]` likewise.

    The parts of queries and keys change places, so that the first halves of all parts come first.
    """

    def queries_keys_values(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().queries_keys_values(call, x)
        position_ids = call.arguments.get("position_ids")
        if not isinstance(position_ids, torch.Tensor) or position_ids.shape[-1:] != (2,):
            raise Delegated("position_ids are not two coordinates of each token")
        return _halves_first(q), _halves_first(k), v

    def tables(self, given: Any, batch: PackedBatch) -> Any:
        return [(table, _one_of_each_pair) for table, _ in super().tables(given, batch)]


def _halves_first(x: torch.Tensor) -> torch.Tensor:
    """`[..., 2 axes, 2 halves, n]`, flat, with halves and axes exchanged."""
    return x.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


def _one_of_each_pair(table: torch.Tensor) -> torch.Tensor:
    return table.unflatten(-1, (2, 2, -1))[..., 0, :].flatten(-2)


def _first_half(table: torch.Tensor) -> torch.Tensor:
    return table[..., : table.shape[-1] // 2]


def _every_other(table: torch.Tensor) -> torch.Tensor:
    return table[..., ::2]


def _first_half_of_heads(table: torch.Tensor) -> torch.Tensor:
    return table[:, 0, :, : table.shape[-1] // 2]


def _second_half_of_heads(table: torch.Tensor) -> torch.Tensor:
    return table[:, 0, :, table.shape[-1] // 2 :]
