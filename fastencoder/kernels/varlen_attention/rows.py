"""How sequences become rows of a few dense attention calls, for ``cpu.py``.

Short sequences share rows under a block-diagonal mask, and longer ones of similar length sit in rows of their own. Sharing
costs masked-out products, separate calls cost their start, so the short and many share and the long and few do not. The
plan depends on the lengths alone; it is made once for a batch and found again by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

_SIMILAR = 0.75  # sequences at least this fraction of the longest one of a call sit in its rows
_PLANS_KEPT = 16


class Limits(NamedTuple):
    """What a plan may do.

    shared: tokens in a shared row; longer sequences have rows of their own.
    similar: longest row, in tokens, that may hold a shorter sequence; None for any.
    cells: products of query and key, over all rows, that one call should stay below; None for any number.
    """

    shared: int
    similar: int | None = None
    cells: int | None = None


class Place(NamedTuple):
    """Which slots of a row a sequence of the batch has."""

    sequence: int
    row: int
    slots: slice


@dataclass(frozen=True, eq=False)
class Rows:
    """One dense attention call, of `count` rows of `length` slots.

    gather: int64 ``[R * L]``, the packed position that each slot reads, or a slice of the packed positions; unused slots
        read a token of their own row and are masked.
    scatter: int64 ``[R * L]``, the packed position that each slot's result belongs to, T for unused slots; or the slice.
    segments: int16 ``[R, L]``, which sequence of its row a slot belongs to (-1: unused), or None where every row is filled
        by one.
    places: the place of every sequence, in the order of the rows.
    shared: whether some row holds several sequences.
    """

    count: int
    length: int
    gather: torch.Tensor | slice
    scatter: torch.Tensor | slice
    segments: torch.Tensor | None
    places: tuple[Place, ...]
    shared: bool

    @cached_property
    def tokens(self) -> torch.Tensor:
        """int64 ``[R, L]``: `gather` as numbers."""
        index = self.gather
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop)
        return index.view(self.count, self.length)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 ``[R, L]``: where in its sequence a slot is; 0 for unused slots."""
        positions = torch.zeros(self.count, self.length, dtype=torch.long)
        for _, row, slots in self.places:
            positions[row, slots] = torch.arange(slots.stop - slots.start)
        return positions

    @cached_property
    def apart(self) -> torch.Tensor | None:
        """bool ``[R, 1, L, L]``, which slots belong to different sequences, where rows are shared, so that unused slots see
        one another, because a query needs a key; ``[R, 1, 1, L]``, which slots are unused, where they are not; None where
        every slot is used."""
        if self.segments is None:
            return None
        of_keys = self.segments[:, None, None, :]
        return self.segments[:, None, :, None] != of_keys if self.shared else of_keys < 0

    @property
    def cells(self) -> int:
        """Products of query and key."""
        return self.count * self.length * self.length


@lru_cache(maxsize=_PLANS_KEPT)
def plan_rows(lengths: tuple[int, ...], limits: Limits) -> tuple[Rows, ...]:
    """Rows for all sequences that are not empty; sequences of one length need neither a gather nor a mask."""
    starts = [0, *accumulate(lengths)]
    longest_first = sorted((s for s, length in enumerate(lengths) if length), key=lambda s: -lengths[s])
    if longest_first and lengths[longest_first[0]] == lengths[longest_first[-1]]:
        return tuple(_filled_rows(longest_first, lengths[longest_first[0]], limits))
    plan = []
    while longest_first:
        longest = lengths[longest_first[0]]
        share = longest <= limits.shared
        shortest = longest * _SIMILAR if limits.similar is None or longest <= limits.similar else longest
        count = sum(1 for s in longest_first if share or lengths[s] >= shortest)
        members, longest_first = longest_first[:count], longest_first[count:]
        rows = _best_fit(members, lengths, limits.shared) if share else [[sequence] for sequence in members]
        length = max(sum(lengths[s] for s in inside) for inside in rows)
        step = _rows_per_call(length, limits)
        plan += [_rows(rows[i : i + step], lengths, starts, length) for i in range(0, len(rows), step)]
    return tuple(plan)


def _rows_per_call(length: int, limits: Limits) -> int:
    return 2**31 if limits.cells is None else max(1, limits.cells // length**2)


def _best_fit(longest_first: list[int], lengths: tuple[int, ...], row_length: int) -> list[list[int]]:
    """The sequences of every row: the longest first, each into the fullest row with room for it, or into a new row."""
    room: list[int] = []
    rows: list[list[int]] = []
    for sequence in longest_first:
        fits = [row for row, left in enumerate(room) if left >= lengths[sequence]]
        row = min(fits, key=room.__getitem__, default=len(room))
        if row == len(room):
            room.append(row_length)
            rows.append([])
        room[row] -= lengths[sequence]
        rows[row].append(sequence)
    return rows


def _filled_rows(sequences: list[int], length: int, limits: Limits) -> list[Rows]:
    """Sequences of one length, which the packed batch holds one behind the other."""
    step = min(_rows_per_call(length, limits), len(sequences))
    calls = []
    for first in range(0, len(sequences), step):
        members = sequences[first : first + step]
        tokens = slice(first * length, (first + len(members)) * length)
        places = tuple(Place(sequence, row, slice(0, length)) for row, sequence in enumerate(members))
        calls.append(Rows(len(members), length, tokens, tokens, None, places, shared=False))
    return calls


def _rows(rows: list[list[int]], lengths: tuple[int, ...], starts: list[int], row_length: int) -> Rows:
    # Unused slots read a token of their own row: whatever it holds, no other row sees it.
    gather = torch.tensor([starts[inside[0]] for inside in rows])[:, None].repeat(1, row_length)
    segments = torch.full(gather.shape, -1, dtype=torch.int16)
    places = []
    for row, inside in enumerate(rows):
        end = 0
        for segment, sequence in enumerate(inside):
            slots = slice(end, end := end + lengths[sequence])
            gather[row, slots] = torch.arange(starts[sequence], starts[sequence] + lengths[sequence])
            segments[row, slots] = segment
            places.append(Place(sequence, row, slots))
    unused = segments < 0
    shared = len(places) > len(rows)
    scatter = gather.masked_fill(unused, starts[-1]).flatten()
    needs_mask = shared or bool(unused.any())  # equal lengths, one a row, need none
    return Rows(
        len(rows), row_length, gather.flatten(), scatter, segments if needs_mask else None, tuple(places), shared
    )
