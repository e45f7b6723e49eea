"""What ``cpu.py`` adds to the scores of its rows: which sequence a slot belongs to, windows and biases, as one tensor.

What does not depend on the queries is made once for a batch and found again by every layer.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from fastencoder.kernels.varlen_attention.features import UNLIMITED, Features, column_of
from fastencoder.kernels.varlen_attention.rows import Rows

CACHE_BYTES = 64 * 2**20


def mask(rows: Rows, features: Features, queries: range, keys: range, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scores of these slots: ``[R or 1, H or 1, queries or 1, keys]``; None for nothing."""
    hidden = _hidden(rows, features, queries, keys)
    added = _added(rows, features, queries, keys, dtype)
    if hidden is None:
        return added
    if added is None:
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    if features.has_token_terms:  # which are a tensor of this call, for every row and head
        return added.masked_fill_(hidden, float("-inf"))
    return torch.where(hidden, float("-inf"), added)


def _hidden(rows: Rows, features: Features, queries: range, keys: range) -> torch.Tensor | None:
    """bool ``[R or 1, 1, queries or 1, keys]``: which keys a query does not see; None where it sees all."""
    hidden = rows.apart
    if hidden is not None:
        hidden = hidden[..., keys.start : keys.stop]
        hidden = hidden[:, :, queries.start : queries.stop] if rows.shared else hidden
    for side, sign in ((features.left, -1), (features.right, 1)):
        if side != UNLIMITED:
            outside = sign * _distance(queries, keys) > side
            hidden = outside[None, None] if hidden is None else hidden | outside
    return hidden


def _distance(queries: range, keys: range) -> torch.Tensor:
    """int64 ``[queries, keys]``: from query to key; where slots belong to one sequence, that is as in the sequence."""
    return torch.arange(keys.start, keys.stop) - torch.arange(queries.start, queries.stop)[:, None]


def _added(rows: Rows, features: Features, queries: range, keys: range, dtype: torch.dtype) -> torch.Tensor | None:
    """The biases, ``[R or 1, H or 1, queries, keys]``; anything between slots of different sequences."""
    parts = []
    if features.relative_bias is not None:
        reach = features.relative_bias.shape[1] // 2  # R - 1
        column = _distance(queries, keys).clamp(-reach, reach) + reach
        parts.append(features.relative_bias.to(dtype)[:, column][None])
    if features.bias is not None:
        parts.append(_dense_bias(rows, features.bias, queries, keys).to(dtype))
    if features.columns is not None:
        parts.append(_disentangled(rows, features, queries, keys).to(dtype))
    if features.rel_h is not None:
        parts.append(_decomposed(rows, features, queries, keys).to(dtype))
    return sum(parts[1:], parts[0]) if parts else None


def _dense_bias(rows: Rows, bias: torch.Tensor, queries: range, keys: range) -> torch.Tensor:
    if not rows.shared:
        bias = bias[:, :, queries.start : queries.stop, keys.start : keys.stop]
        return bias if bias.shape[0] == 1 else bias[[place.sequence for place in rows.places]]
    out = bias.new_zeros(rows.count, bias.shape[1], rows.length, rows.length)
    for sequence, row, slots in rows.places:
        length = slots.stop - slots.start
        out[row, :, slots, slots] = bias[sequence if len(bias) > 1 else 0, :, :length, :length]
    return out[:, :, queries.start : queries.stop, keys.start : keys.stop]


def _disentangled(rows: Rows, features: Features, queries: range, keys: range) -> torch.Tensor:
    """``[R, H, queries, keys]``."""
    column = column_of(features.columns, -_distance(queries, keys))  # [queries, keys]
    parts = []
    if features.c2p is not None:
        parts.append(_gathered(features.c2p, rows.tokens[:, queries.start : queries.stop, None], column))
    if features.p2c is not None:
        parts.append(_gathered(features.p2c, rows.tokens[:, None, keys.start : keys.stop], column))
    return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def _decomposed(rows: Rows, features: Features, queries: range, keys: range) -> torch.Tensor:
    """``[R, H, queries, keys]``; one sum over the grid where a slot is where its token is in the sequence."""
    tokens = rows.tokens[:, queries.start : queries.stop]  # [R, queries]
    rel_h, rel_w = features.rel_h, features.rel_w
    if rows.shared:
        place = rows.positions[:, None, keys.start : keys.stop]
        width = rel_w.shape[2]
        added = _gathered(rel_h, tokens[:, :, None], place // width)
        return added.add_(_gathered(rel_w, tokens[:, :, None], place % width))
    rel_h, rel_w = (x[tokens].transpose(1, 2) for x in (rel_h, rel_w))  # [R, H, queries, Kh or Kw]
    return (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(-2)[..., keys.start : keys.stop]


def _gathered(products: torch.Tensor, token: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """``products[token, h, column]`` for every head: ``[T, H, P]``, two indices that broadcast to ``[R, queries, keys]`` ->
    ``[R, H, queries, keys]``.

    One gather along the tokens and columns of all heads is several times as fast as one along the columns of every token.
    """
    _, heads, width = products.shape
    index = token * width + column
    flat = products.transpose(0, 1).reshape(heads, -1)  # no copy of the transposed [H, T, P]
    return flat.index_select(1, index.flatten()).view(heads, *index.shape).transpose(0, 1)


class _Entry(NamedTuple):
    mask: torch.Tensor | None
    relative: torch.Tensor | None  # a copy of the table that was used: tables are small
    bias: weakref.ref | None
    bias_version: int


class MaskCache:
    """Masks of the last batches, up to a number of bytes.

    A table of biases by distance is recognised by what it holds. A dense bias is recognised by its identity and version;
    the cache does not keep it alive, and forgets the mask when it goes.
    """

    def __init__(self, most_bytes: int = CACHE_BYTES) -> None:
        self._most_bytes = most_bytes
        self._entries: dict[tuple, _Entry] = {}  # in the order of their last use

    def __len__(self) -> int:
        return len(self._entries)

    def mask(
        self, rows: Rows, features: Features, queries: range, keys: range, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """As :func:`mask`."""
        relative, bias = features.relative_bias, features.bias
        if features.has_token_terms:
            return mask(rows, features, queries, keys, dtype)
        if bias is not None and (bias.is_inference() or not _is_copied(rows)):
            return mask(rows, features, queries, keys, dtype)  # without a version, or nearly free
        key = (rows, features.left, features.right, queries, keys, dtype, None if bias is None else id(bias))
        version = 0 if bias is None else bias._version
        entry = self._entries.pop(key, None)
        if entry is None or not _is_current(entry, relative, bias, version):
            made = mask(rows, features, queries, keys, dtype)
            if made is None:
                return None
            copy = None if relative is None else relative.clone()
            entry = _Entry(made, copy, None if bias is None else weakref.ref(bias, self._forgets(key)), version)
        self._entries[key] = entry
        self._shrink()
        return entry.mask

    def _forgets(self, key: tuple):
        entries = self._entries
        return lambda _: entries.pop(key, None)

    def _shrink(self) -> None:
        entries = list(self._entries.items())
        total = sum(entry.mask.nbytes for _, entry in entries)
        for key, entry in entries:
            if total <= self._most_bytes:
                break
            self._entries.pop(key, None)
            total -= entry.mask.nbytes


def _is_copied(rows: Rows) -> bool:
    """Whether a dense bias has to be rearranged, and not only sliced."""
    return rows.segments is not None


def _is_current(entry: _Entry, relative: torch.Tensor | None, bias: torch.Tensor | None, version: int) -> bool:
    if (entry.relative is None) != (relative is None):
        return False
    if relative is not None and not (
        relative.dtype == entry.relative.dtype
        and relative.shape == entry.relative.shape
        and torch.equal(relative, entry.relative)
    ):
        return False
    return bias is None or (entry.bias() is bias and entry.bias_version == version)
