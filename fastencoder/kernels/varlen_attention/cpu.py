"""``varlen_attention`` on CPU, without a loop over sequences: sequences become rows of a few dense attention calls.

Equal lengths need nothing: the packed batch is a dense batch. Otherwise short sequences share rows ("bins") under a
block-diagonal mask, and each distinct longer length is a dense batch of its own ("group"). Bins cost masked-out products,
groups cost calls, so bins serve the short and many, groups the long and few. The plan depends on the lengths alone; it is
made once for a batch and found again by every layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

BIN_LENGTH = 128  # tokens a row; sequences up to this length may share rows
_PLANS_KEPT = 16


@dataclass(frozen=True)
class Rows:
    """One dense attention call. Both index vectors are int64.

    gather: ``[R * L]``, the packed position that each row slot reads; unused slots read position 0 and are masked.
    scatter: ``[n]``, the row slots that hold real tokens, in the order of `tokens`.
    tokens: ``[n]``, the packed positions that those slots belong to.
    segments: ``[R, L]`` int16, which sequence of its row a slot belongs to (-1: unused), or None where no mask is needed.
    """

    count: int
    length: int
    gather: torch.Tensor
    scatter: torch.Tensor | None
    tokens: torch.Tensor
    segments: torch.Tensor | None


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_seqlen: int, scale: float
) -> torch.Tensor:
    """``[T, H, d]``, ``[T, Hk, d]``, ``[T, Hk, d]``, int32 ``[B + 1]`` -> ``[T, H, d]``."""
    bounds = tuple(offsets.tolist())
    lengths = tuple(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    if not q.shape[0]:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    if min(lengths) == max(lengths):
        return _dense(q, k, v, len(lengths), lengths[0], None, scale).flatten(0, 1)
    plan = _plan(lengths, BIN_LENGTH)
    out = _run(plan, lengths, q, k, v, scale)
    shared = any(rows.segments is not None for rows in plan)
    if shared and not math.isfinite(out.sum(dtype=torch.float32)):
        # A NaN or infinity of one sequence reaches the others of its row through 0 * NaN: give every sequence its own.
        out = _run(_plan(lengths, 0), lengths, q, k, v, scale)
    return out


def _run(
    plan: tuple[Rows, ...],
    lengths: tuple[int, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    for rows in plan:
        mask = None if rows.segments is None else _mask(lengths, q.dtype)
        mixed = _dense(*_select(q, k, v, rows.gather), rows.count, rows.length, mask, scale).flatten(0, 1)
        if rows.scatter is not None:
            mixed = mixed.index_select(0, rows.scatter)
            if len(plan) == 1:  # every token is here, already in order
                return mixed
        out.index_copy_(0, rows.tokens, mixed)
    return out


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int, length: int, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention inside each row: ``[rows * length, heads, d]`` three times -> ``[rows, length, H, d]``, contiguous."""
    q, k, v = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous()


def _select(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows `index` of all three; in one gather where they are neighbours in one packed QKV buffer."""
    heads, size = q.shape[1:]
    step = heads * size
    fused = (
        q.shape == k.shape
        and q.stride() == k.stride() == v.stride() == (3 * step, size, 1)
        and k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == step * q.element_size()
    )
    if not fused:
        return tuple(x.index_select(0, index) for x in (q, k, v))
    qkv = q.as_strided((q.shape[0], 3 * step), (3 * step, 1)).index_select(0, index)
    return tuple(qkv.view(-1, 3, heads, size).unbind(1))


@lru_cache(maxsize=_PLANS_KEPT)
def _plan(lengths: tuple[int, ...], bin_length: int) -> tuple[Rows, ...]:
    """Sequences up to `bin_length` go to bins, longer ones to groups."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    short: list[int] = []
    groups: dict[int, list[int]] = defaultdict(list)
    for sequence, length in enumerate(lengths):
        if length > bin_length:
            groups[length].append(sequence)
        elif length:
            short.append(sequence)
    plan = [_group(length, [starts[s] for s in members]) for length, members in groups.items()]
    if short:
        plan.append(_bins(short, lengths, starts))
    return tuple(plan)


def _group(length: int, starts: list[int]) -> Rows:
    tokens = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
    return Rows(len(starts), length, gather=tokens, scatter=None, tokens=tokens, segments=None)


def _bins(sequences: list[int], lengths: tuple[int, ...], starts: list[int]) -> Rows:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room for it."""
    row_length = max(min(BIN_LENGTH, sum(lengths[s] for s in sequences)), max(lengths[s] for s in sequences))
    room: list[int] = []
    members: list[list[int]] = []
    for sequence in sorted(sequences, key=lambda s: -lengths[s]):
        need = lengths[sequence]
        fits = [row for row, left in enumerate(room) if left >= need]
        row = min(fits, key=room.__getitem__, default=len(room))
        if row == len(room):
            room.append(row_length)
            members.append([])
        room[row] -= need
        members[row].append(sequence)
    gather = torch.zeros(len(room), row_length, dtype=torch.int64)
    segments = torch.full((len(room), row_length), -1, dtype=torch.int16)
    for row, inside in enumerate(members):
        slot = 0
        for segment, sequence in enumerate(inside):
            end = slot + lengths[sequence]
            gather[row, slot:end] = torch.arange(starts[sequence], starts[sequence] + lengths[sequence])
            segments[row, slot:end] = segment
            slot = end
    gather, used = gather.flatten(), segments.flatten() >= 0
    slots = used.nonzero().flatten()
    tokens, order = gather[slots].sort()
    return Rows(len(room), row_length, gather, slots[order], tokens, segments)


@lru_cache(maxsize=2 * _PLANS_KEPT)
def _mask(lengths: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``[R, 1, L, L]``: 0 inside a sequence, -inf between sequences; unused slots see one another (a row needs a key)."""
    segments = next(rows.segments for rows in _plan(lengths, BIN_LENGTH) if rows.segments is not None)
    apart = segments[:, None, :, None] != segments[:, None, None, :]
    return torch.zeros(apart.shape, dtype=dtype).masked_fill_(apart, float("-inf"))
