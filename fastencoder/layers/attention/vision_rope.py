"""Rotary position embedding over a grid of patches, from the tables that a vision model makes for its layers.

The angles of two or three axes lie side by side in one table, so the rotation itself is that of text
(https://arxiv.org/abs/2104.09864). The tables come without a dimension of sequences: packed images share one, `[T, r]`, and so
do images of one size, `[S, r]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...packing import PackedBatch
from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind

Prepare = Callable[[torch.Tensor], torch.Tensor]


class VisionRope(AttentionKind):
    """Queries and keys are turned by a pair of cosines and sines `[S or T, r]`, or `[1 or B, S, r]`.

    Args:
        interleaved: pairs are neighbours (2i, 2i + 1), and their angle stands twice side by side in the tables; otherwise pairs
            are (i, i + r / 2), and the second half of the tables repeats the first.
        prefix: tables may be shorter than the sequences: the tokens before the patches (class and register tokens) are not
            turned.
    """

    def __init__(self, interleaved: bool = False, prefix: bool = False) -> None:
        self.interleaved = interleaved
        self.prefix = prefix
        self.reads = frozenset({"position_embeddings"})

    def features(self, call: LayerCall) -> dict[str, Any]:
        tables = call.arguments.get("position_embeddings")
        if not isinstance(tables, tuple | list) or len(tables) != 2 or not all(map(torch.is_tensor, tables)):
            raise Delegated("position_embeddings is not a pair of cosines and sines")
        try:
            cos, sin = (
                call.batch.per_token(table, self._preparation(call.batch, unturned))
                for table, unturned in zip(tables, (1.0, 0.0), strict=True)
            )
        except ValueError as error:
            raise Delegated(f"position_embeddings: {error}") from None
        return {"rope": (cos, sin, self.interleaved)}

    def _preparation(self, batch: PackedBatch, unturned: float) -> Prepare:
        """Makes `[1 or B, S, r / 2]` of a table `[S, r]` or `[1 or B, S, r]`: an angle a pair, `unturned` at a prefix."""

        def prepare(table: torch.Tensor) -> torch.Tensor:
            rows = table[..., ::2] if self.interleaved else table[..., : table.shape[-1] // 2]
            rows = rows if rows.dim() == 3 else rows[None]
            before = batch.seqlen - rows.shape[1] if self.prefix and batch.seqlen else 0
            return F.pad(rows, (0, 0, before, 0), value=unturned) if before > 0 else rows

        return prepare


class ComplexRope(AttentionKind):
    """Neighbours (2i, 2i + 1) are complex numbers, multiplied by `freqs_ci` `[S, 1, d / 2]` on the unit circle (Llama 4)."""

    reads = frozenset({"freqs_ci"})

    def features(self, call: LayerCall) -> dict[str, Any]:
        table = call.arguments.get("freqs_ci")
        if not isinstance(table, torch.Tensor) or not table.is_complex() or table.dim() != 3 or table.shape[1] != 1:
            raise Delegated("freqs_ci is not a complex table [S, 1, d / 2]")
        try:
            cos, sin = call.batch.per_token(table, _real), call.batch.per_token(table, _imaginary)
        except ValueError as error:
            raise Delegated(f"freqs_ci: {error}") from None
        return {"rope": (cos, sin, True)}


def _real(table: torch.Tensor) -> torch.Tensor:
    return table.real.transpose(0, 1)


def _imaginary(table: torch.Tensor) -> torch.Tensor:
    return table.imag.transpose(0, 1)
