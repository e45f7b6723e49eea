"""Packed batches: real tokens only, and where they belong.

`values [T, D]` and `offsets [B + 1]` are the two halves of a jagged nested tensor; `offsets` is what flash attention calls
`cu_seqlens`. Padding may be anywhere (right, left, holes, a whole row): it is dropped once and comes back as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Literal

import torch

from .kernels import pack, read_mask, token_positions, unpack
from .kernels._dispatch import on_gpu
from .kernels.padding import BIAS, DIFFERS, unreadable
from .kernels.varlen_attention import query_block, tile_list

MOST_POSITIONS = 2**31 - 1  # of a batch: what counts and names them is int32
_NOT_PADDING = {DIFFERS: "an attention mask that differs between queries", BIAS: "an additive attention bias"}


class NotAPaddingMask(ValueError):
    """The attention mask is not the same for every query, or is a bias: padding removal cannot express it."""


@dataclass(frozen=True)
class PackedBatch:
    """A batch without padding.

    Args:
        values: `[T, D]`, the tokens of all sequences one after the other.
        offsets: int32 `[B + 1]`; sequence `b` is `values[offsets[b]:offsets[b + 1]]`.
        max_seqlen: at least the length of the longest sequence, in tokens.
        indices: int32 `[T]`, the flat position `b * S + s` of each token in the padded batch; None where there is no padding
            to put back (`T = B * S`) or no padded form.
        batch, seqlen: B and S of the padded form; `seqlen` is 0 where there is none.
        lengths: of the sequences, in tokens, where the host knows them.
    """

    values: torch.Tensor
    offsets: torch.Tensor
    max_seqlen: int
    indices: torch.Tensor | None
    batch: int
    seqlen: int
    lengths: tuple[int, ...] | None = None
    _tiles: dict[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    _memo: dict[tuple[Any, ...], tuple[torch.Tensor, Any]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_padded(cls, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> PackedBatch:
        """Packs `hidden` `[B, S, D]`; `mask` `[B, S]` is nonzero at real tokens, None if all of them are real."""
        geometry = cls.geometry(hidden, None if mask is None else mask != 0)
        return geometry.with_values(geometry.take(hidden))

    @classmethod
    def geometry(cls, hidden: torch.Tensor, mask: torch.Tensor | None, marks: str = "tokens") -> PackedBatch:
        """The packed batch that `hidden` `[B, S, D]` and a mask make, with an empty `values`.

        Args:
            mask: whatever mask reached a layer, or None: `kernels.padding.read_mask` says what can be read.
            marks: what a nonzero entry of a mask `[B, S]` stands for: "tokens" or "padding".

        Raises:
            NotAPaddingMask: the mask differs between queries, or holds other values, or has another shape.
            ValueError: there are more than `MOST_POSITIONS` positions, padding included.
        """
        batch, seqlen = hidden.shape[:2]
        _check_positions(batch * seqlen)
        nothing = hidden.new_empty(0, hidden.shape[2])
        if mask is None:
            return cls._full(nothing, batch, seqlen)
        tokens, lengths = _read(mask, batch, seqlen, marks)
        if min(lengths, default=seqlen) == seqlen:
            return cls._full(nothing, batch, seqlen)
        offsets = _to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), hidden.device)
        indices = token_positions(tokens, offsets, sum(lengths))
        return cls(nothing, offsets, max(lengths), indices, batch, seqlen, lengths)

    @classmethod
    def _full(cls, values: torch.Tensor, batch: int, seqlen: int) -> PackedBatch:
        """Without padding: all sequences are `seqlen` tokens long."""
        offsets = _uniform_offsets(batch, seqlen, values.device)
        return cls(values, offsets, seqlen, None, batch, seqlen, (seqlen,) * batch)

    @classmethod
    def from_offsets(cls, values: torch.Tensor, offsets: torch.Tensor, max_seqlen: int | None = None) -> PackedBatch:
        """A batch that is packed already: `values` `[T, D]`, `offsets` `[B + 1]`.

        Raises:
            ValueError: the offsets do not cover the tokens, or there are more than `MOST_POSITIONS` of them.
        """
        _check_positions(values.shape[0])
        lengths = None
        if max_seqlen is None or offsets.device.type == "cpu":
            bounds = offsets.tolist()
            lengths = tuple(end - start for start, end in zip(bounds, bounds[1:], strict=False))
            if not lengths or bounds[0] != 0 or bounds[-1] != values.shape[0] or min(lengths) < 0:
                raise ValueError(
                    f"cumulative sequence lengths {bounds[:4]}...{bounds[-1:]} must rise from 0 to the number of tokens, "
                    f"{values.shape[0]}"
                )
            max_seqlen = max(lengths)
        offsets = offsets.to(device=values.device, dtype=torch.int32)
        return cls(values, offsets, int(max_seqlen), None, offsets.shape[0] - 1, 0, lengths)

    @classmethod
    def from_nested(cls, nested: torch.Tensor) -> PackedBatch:
        """The halves of a nested tensor `[B, *, D]`, without a copy: a jagged one, or a contiguous one of torch's older kind
        (strided layout), as `nn.TransformerEncoder` makes them.

        Raises:
            ValueError: it is of the older kind, and not contiguous or not of three dimensions; or too large (`from_offsets`).
        """
        if nested.layout is torch.jagged:
            return cls.from_offsets(nested.values(), nested.offsets())  # type: ignore[attr-defined]
        if nested.dim() != 3 or not nested.is_contiguous():
            raise ValueError("a strided nested tensor must be contiguous, with three dimensions")
        sizes = nested._nested_tensor_size().tolist()  # on the host
        lengths, width = tuple(length for length, _ in sizes), sizes[0][1]
        values = nested.values().view(-1, width)
        _check_positions(values.shape[0])
        offsets = _to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), nested.device)
        return cls(values, offsets, max(lengths), None, len(lengths), 0, lengths)

    def to_nested(self) -> torch.Tensor:
        """A jagged nested tensor `[B, *, D]` over the same memory (the offsets become int64)."""
        return _jagged(self.values, self.offsets.long(), self.max_seqlen)

    def nested_like(self, nested: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`values` `[T, D]` as a nested tensor with the very offsets of `nested`, so that the two can be added."""
        if nested.layout is torch.strided:
            geometry = (nested._nested_tensor_size(), nested._nested_tensor_strides(), nested._nested_tensor_storage_offsets())
            return torch._nested_view_from_buffer(values.flatten(), *geometry)
        return _jagged(values, nested.offsets(), self.max_seqlen)  # type: ignore[attr-defined]

    def tiles(self, head_dim: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Attention's list of work on the device (int32 `[n, 2]`, see `kernels.varlen_attention`). None where it is not
        needed: on the CPU, or if all sequences are equally long."""
        if not self._tiles and (not on_gpu(self.offsets.device) or not self._ragged):
            return None
        queries = query_block(head_dim, dtype, self.max_seqlen, self.offsets.device)
        if queries not in self._tiles and self.lengths is not None:
            self._tiles[queries] = _to_device(tile_list(self.lengths, queries), self.offsets.device)
        return self._tiles.get(queries)

    def joined(self, count: int) -> PackedBatch:
        """The same tokens, with every `count` neighbouring sequences as one.

        Raises:
            ValueError: `count` does not divide the number of sequences, or some have padding.
        """
        if self.batch % count or self.indices is not None or self.lengths is None:
            raise ValueError(f"{self.batch} sequences, or their padding, cannot be joined by {count}")
        lengths = tuple(sum(self.lengths[first : first + count]) for first in range(0, self.batch, count))
        offsets = self.offsets[::count].contiguous()
        return PackedBatch(self.values, offsets, max(lengths), None, self.batch // count, self.seqlen * count, lengths)

    @cached_property
    def _ragged(self) -> bool:
        """Whether some sequence is known to be shorter than the longest one."""
        return self.lengths is not None and min(self.lengths, default=self.max_seqlen) < self.max_seqlen

    @property
    def dtype(self) -> torch.dtype:
        """Of the padded hidden states, or of what the owner packed."""
        return self.values.dtype

    def remembered(self, key: tuple[Any, ...], source: torch.Tensor, make: Callable[[], Any]) -> Any:
        """What `make()` returned for this key and this very tensor: every layer of a batch is given the same one."""
        found = self._memo.get(key)
        if found is None or found[0] is not source:
            found = self._memo[key] = (source, make())
        return found[1]

    def positions(self) -> torch.Tensor:
        """Where the tokens of each sequence are in its padded row: int64 `[B, L]` with `L = max_seqlen`. Entries behind the
        end of a sequence are some position of the row."""

        def make() -> torch.Tensor:
            counted = torch.arange(self.max_seqlen, device=self.offsets.device)
            if self.indices is None:
                return counted.expand(self.batch, -1)
            slots = (self.offsets[:-1, None] + counted).clamp(max=self.indices.shape[0] - 1)
            return self.indices[slots] % self.seqlen

        found: torch.Tensor = self.remembered(("positions",), self.offsets, make)
        return found

    def between_tokens(self, table: torch.Tensor) -> torch.Tensor:
        """What a table `[1 or B, S, S, *]` by two positions in the padded rows holds for the tokens of each sequence:
        `[B, L, L, *]` with `L = max_seqlen`."""
        positions = self.positions()
        rows = torch.arange(self.batch, device=positions.device) if table.shape[0] > 1 else torch.zeros_like(positions[:, 0])
        return table[rows[:, None, None], positions[:, :, None], positions[:, None, :]]

    @property
    def layout(self) -> Literal["right", "run", "holes"]:
        """How tokens lie in their padded rows: each sequence begins at position 0 and has no hole ("right" padding, if any),
        is one run of tokens that begins anywhere, or has holes.

        What counts distances between tokens may count them in the packed sequence unless there are holes; what counts
        positions from the start of a row, only with right padding. The host asks the device once for each batch."""
        if self.indices is None or self.indices.shape[0] == 0:
            return "right"
        indices = self.indices

        def make() -> tuple[bool, bool]:
            starts, ends = self.offsets[:-1], self.offsets[1:]
            there = ends > starts
            last_slot = indices.shape[0] - 1
            first = indices[starts.clamp(max=last_slot).long()]
            last = indices[(ends - 1).clamp(min=0).long()]
            holes = there & (last - first != ends - starts - 1)
            shifted = there & (first % self.seqlen != 0)
            return tuple(torch.stack([holes.any(), shifted.any()]).tolist())

        holes, shifted = self.remembered(("layout",), self.offsets, make)
        return "holes" if holes else "run" if shifted else "right"

    def per_sequence(self, table: torch.Tensor) -> torch.Tensor:
        """For each real token what `table` `[B, *]` holds for its sequence: `[T, *]`.

        Raises:
            ValueError: the table is not one of this batch.
        """
        if table.dim() == 0 or table.shape[0] != self.offsets.shape[0] - 1:
            raise ValueError(f"a table {tuple(table.shape)} does not belong to {self.offsets.shape[0] - 1} sequences")

        def make() -> torch.Tensor:
            if self.indices is not None:
                return table.index_select(0, self.indices // self.seqlen)
            return table.repeat_interleave(self.offsets.diff(), dim=0)

        found: torch.Tensor = self.remembered(("per sequence", id(table)), table, make)
        return found

    def per_token(self, table: torch.Tensor, prepare: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The rows `[T, *]` of the real tokens, of a table by position: `prepare(table)` with `table` `[1 or B, S, *]`.

        Raises:
            ValueError: the table is not one of this batch.
        """

        def make() -> torch.Tensor:
            rows = prepare(table)
            if self.seqlen == 0:  # packed by its owner: the table is packed as well
                fits = rows.dim() >= 2 and rows.shape[0] == 1 and rows.shape[1] == self.values.shape[0]
            else:
                fits = rows.dim() >= 2 and rows.shape[0] in (1, self.batch) and rows.shape[1] == self.seqlen
            if not fits:
                raise ValueError(f"a table {tuple(rows.shape)} does not belong to {self.batch} sequences of {self.seqlen}")
            if self.seqlen == 0:
                return rows[0].contiguous()
            if self.indices is None:
                return rows.expand(self.batch, *rows.shape[1:]).flatten(0, 1).contiguous()
            if rows.shape[0] == 1:
                return rows[0].index_select(0, self.indices % self.seqlen)
            return rows.flatten(0, 1).index_select(0, self.indices)

        found: torch.Tensor = self.remembered((prepare.__qualname__, id(table)), table, make)
        return found

    def with_values(self, values: torch.Tensor) -> PackedBatch:
        """The same batch with other contents `[T, D]`."""
        return replace(self, values=values)

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """The real tokens `[T, D]` of a padded `[B, S, D]` with this batch's geometry."""
        if self.indices is None:
            return hidden.flatten(0, 1)
        return pack(hidden, self.indices)

    def to_padded(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, S, D]` with zeros at padding, from `values` `[T, D]` (default: this batch's own)."""
        values = self.values if values is None else values
        if not self.seqlen and self.batch:
            raise ValueError("this batch was packed by its owner: it has no padded form")
        if self.indices is None:
            return values.view(self.batch, self.seqlen, values.shape[-1])
        return unpack(values, self.indices, self.batch, self.seqlen)


def _check_positions(count: int) -> None:
    if count > MOST_POSITIONS:
        raise ValueError(
            f"a batch of {count:,} positions is too large: they are counted in 32 bits, up to {MOST_POSITIONS:,}. "
            "Split the batch."
        )


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host's on the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _jagged(values: torch.Tensor, offsets: torch.Tensor, longest: int) -> torch.Tensor:
    # Without the extreme lengths to_padded_tensor would pad to the number of tokens.
    shortest = int(offsets.diff().min())
    return torch.nested.nested_tensor_from_jagged(values, offsets=offsets, min_seqlen=shortest, max_seqlen=longest)


@lru_cache(maxsize=64)
def _uniform_offsets(batch: int, seqlen: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen


def key_padding_mask(mask: torch.Tensor | None, batch: int, seqlen: int, marks: str = "tokens") -> torch.Tensor | None:
    """The `[B, S]` mask (True at real tokens) behind whatever mask reached a layer.

    Args:
        mask: None; `[B, S]` boolean or integer; or `[B or 1, 1, 1 or S, S]`, boolean (True: attend) or additive
            (0: attend; -10000, finfo.min or -inf: do not).
        marks: what a nonzero `[B, S]` entry stands for: "tokens" or "padding".

    Raises:
        NotAPaddingMask: the mask differs between queries, or holds other values, or has another shape.
    """
    return None if mask is None else _read(mask, batch, seqlen, marks)[0]


def _read(mask: torch.Tensor, batch: int, seqlen: int, marks: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The real tokens `[B, S]`, on the device, and the lengths of the sequences."""
    reason = unreadable(mask, batch, seqlen)
    if reason is not None:
        raise NotAPaddingMask(reason)
    tokens, summary = read_mask(mask, batch, seqlen, marks)
    lengths = tuple(summary.tolist())  # the one time in a forward that the host waits for the device
    if min(lengths, default=0) < 0:
        raise NotAPaddingMask(_NOT_PADDING[min(lengths)])
    return tokens, lengths
