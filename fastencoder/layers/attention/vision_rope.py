"""Rotary position embedding over a grid of patches, from the tables that a vision model makes for its layers.

The angles of two or three axes lie side by side in one table, so the rotation itself is that of text
(https://arxiv.org/abs/2104.09864). The tables come without a dimension of sequences: packed images share one, `[T, r]`, and so
do images of one size, `[S, r]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...packing import PackedBatch
from ..guards import Delegated
from .rope import Prepare, Rope


class VisionRope(Rope):
    """Queries and keys are turned by a pair of cosines and sines `[S or T, r]`, or `[1 or B, S, r]`.

    Args:
        interleaved: pairs are neighbours (2i, 2i + 1), and their angle stands twice side by side in the tables; otherwise pairs
            are (i, i + r / 2), and the second half of the tables repeats the first.
        prefix: tables may be shorter than the sequences: the tokens before the patches (class and register tokens) are not
            turned.
    """

    def __init__(self, interleaved: bool = False, prefix: bool = False) -> None:
        super().__init__(interleaved, "neighbours" if interleaved else "halves")
        self.prefix = prefix

    def tables(self, given: Any, batch: PackedBatch) -> Any:
        (cos, prepare), (sin, _) = super().tables(given, batch)
        return (cos, self._rows(batch, prepare, 1.0)), (sin, self._rows(batch, prepare, 0.0))

    def _rows(self, batch: PackedBatch, prepare: Prepare, unturned: float) -> Prepare:
        """Makes `[1 or B, S, r / 2]` of a table `[S, r]` or `[1 or B, S, r]`: an angle a pair, `unturned` at a prefix."""

        def rows_of(table: torch.Tensor) -> torch.Tensor:
            rows = prepare(table)
            rows = rows if rows.dim() == 3 else rows[None]
            before = batch.seqlen - rows.shape[1] if self.prefix and batch.seqlen else 0
            return F.pad(rows, (0, 0, before, 0), value=unturned) if before > 0 else rows

        return rows_of


class ComplexRope(Rope):
    """Neighbours (2i, 2i + 1) are complex numbers, multiplied by `freqs_ci` `[S, 1, d / 2]` on the unit circle (Llama 4)."""

    def __init__(self) -> None:
        super().__init__(interleaved=True, argument="freqs_ci")

    def tables(self, given: Any, batch: PackedBatch) -> Any:
        if not isinstance(given, torch.Tensor) or not given.is_complex() or given.dim() != 3 or given.shape[1] != 1:
            raise Delegated(f"{self.argument} is not a complex table [S, 1, d / 2]")
        return (given, _real), (given, _imaginary)


def _real(table: torch.Tensor) -> torch.Tensor:
    return table.real.transpose(0, 1)


def _imaginary(table: torch.Tensor) -> torch.Tensor:
    return table.imag.transpose(0, 1)
