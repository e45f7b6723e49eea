"""``varlen_attention`` on CPU, without a loop over sequences: sequences become rows of a few dense attention calls.

Equal lengths need nothing: the packed batch is a dense batch. Otherwise short sequences share rows under a block-diagonal
mask, and longer ones of similar length sit in rows of their own. Sharing costs masked-out products, separate calls cost
their start, so the short and many share and the long and few do not. The plan depends on the lengths alone; it is made once
for a batch and found again by every layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F

from fastencoder.kernels.varlen_attention.cpu_features import attention_with_features
from fastencoder.kernels.varlen_attention.features import PLAIN, Features

SHARED_LENGTH = 96  # tokens in a shared row; longer sequences have rows of their own
_SIMILAR = 0.75  # sequences at least this fraction of the longest one of a call sit in its rows
_PLANS_KEPT = 16


@dataclass(frozen=True, eq=False)
class Rows:
    """One dense attention call, of `count` rows of `length` slots.

    gather: int64 ``[R * L]``, the packed position that each slot reads; unused slots read a token of their own row and are
        masked.
    scatter: int64 ``[R * L]``, the packed position that each slot's result belongs to; T for unused slots.
    segments: int16 ``[R, L]``, which sequence of its row a slot belongs to (-1: unused), or None where no mask is needed.
    shared: whether some row holds several sequences.
    """

    count: int
    length: int
    gather: torch.Tensor
    scatter: torch.Tensor
    segments: torch.Tensor | None
    shared: bool


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_seqlen: int,
    scale: float,
    features: Features = PLAIN,
    tiles: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T, H, d]``, ``[T, Hk, d]``, ``[T, Hk, d]``, int32 ``[B + 1]`` -> ``[T, H, d]``."""
    bounds = tuple(offsets.tolist())
    if features is not PLAIN:
        return attention_with_features(q, k, v, bounds, scale, features)
    lengths = tuple(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    if not q.shape[0]:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    if min(lengths) == max(lengths):
        return _dense(q, k, v, len(lengths), lengths[0], None, scale).flatten(0, 1)
    plan = _plan(lengths, SHARED_LENGTH)
    out = _run(plan, q, k, v, scale)
    if any(rows.shared for rows in plan) and not math.isfinite(out.sum(dtype=torch.float32)):
        # A NaN or infinity of one sequence reaches the others of its row through 0 * NaN: give every sequence its own.
        out = _run(_plan(lengths, 0), q, k, v, scale)
    return out


def _run(
    plan: tuple[Rows, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    tokens = q.shape[0]
    out = torch.empty(tokens + 1, *q.shape[1:], dtype=q.dtype)  # the results of unused slots end in the last row
    for rows in plan:
        mask = None if rows.segments is None else _mask(rows, q.dtype)
        mixed = _dense(*_select(q, k, v, rows.gather), rows.count, rows.length, mask, scale)
        out.index_copy_(0, rows.scatter, mixed.flatten(0, 1))
    return out[:tokens]


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
def _plan(lengths: tuple[int, ...], shared_length: int) -> tuple[Rows, ...]:
    """Sequences up to `shared_length` tokens share rows of that length; longer ones are grouped with similar ones."""
    starts = [0, *accumulate(lengths)]
    longest_first = sorted((s for s, length in enumerate(lengths) if length), key=lambda s: -lengths[s])
    plan = []
    while longest_first:
        longest = lengths[longest_first[0]]
        share = longest <= shared_length
        count = sum(1 for s in longest_first if share or lengths[s] >= _SIMILAR * longest)
        members, longest_first = longest_first[:count], longest_first[count:]
        total = sum(lengths[s] for s in members)
        plan.append(_rows(members, lengths, starts, min(shared_length, total) if share else longest, share))
    return tuple(plan)


def _rows(longest_first: list[int], lengths: tuple[int, ...], starts: list[int], row_length: int, share: bool) -> Rows:
    """Best fit, the longest first: each sequence into the fullest row with room for it, or into a new row."""
    room: list[int] = []
    members: list[list[int]] = []
    for sequence in longest_first:
        fits = [row for row, left in enumerate(room) if share and left >= lengths[sequence]]
        row = min(fits, key=room.__getitem__, default=len(room))
        if row == len(room):
            room.append(row_length)
            members.append([])
        room[row] -= lengths[sequence]
        members[row].append(sequence)
    # Unused slots read a token of their own row: whatever it holds, no other row sees it.
    gather = torch.tensor([starts[inside[0]] for inside in members])[:, None].repeat(1, row_length)
    segments = torch.full((len(room), row_length), -1, dtype=torch.int16)
    for row, inside in enumerate(members):
        slot = 0
        for segment, sequence in enumerate(inside):
            end = slot + lengths[sequence]
            gather[row, slot:end] = torch.arange(starts[sequence], starts[sequence] + lengths[sequence])
            segments[row, slot:end] = segment
            slot = end
    unused = segments < 0
    shared = len(room) < len(longest_first)
    scatter = gather.masked_fill(unused, starts[-1]).flatten()
    needs_mask = shared or bool(unused.any())  # equal lengths, one a row, need none
    return Rows(len(room), row_length, gather.flatten(), scatter, segments if needs_mask else None, shared)


@lru_cache(maxsize=2 * _PLANS_KEPT)
def _mask(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """0 inside a sequence, -inf elsewhere: ``[R, 1, L, L]`` for shared rows, ``[R, 1, 1, L]`` for rows of one sequence.

    In shared rows unused slots see one another, because a query needs a key.
    """
    if rows.shared:
        apart = rows.segments[:, None, :, None] != rows.segments[:, None, None, :]
    else:
        apart = rows.segments[:, None, None, :] < 0
    return torch.zeros(apart.shape, dtype=dtype).masked_fill_(apart, float("-inf"))
