"""``varlen_attention`` on CPU: in the C++ extension, or without a Python loop over sequences in plain PyTorch.

In plain PyTorch sequences become rows of a few dense attention calls. ``rows.py`` says which, ``cpu_masks.py`` what is
added to their scores. Long rows with a mask take their queries in blocks, each with the keys that it sees, so that a window
costs what it shows, and a bias by distance is never spelled out for a whole long sequence.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastencoder.kernels._dispatch import accumulation_dtype
from fastencoder.kernels.varlen_attention import cpu_native
from fastencoder.kernels.varlen_attention.cpu_masks import CACHE_BYTES, MaskCache, mask
from fastencoder.kernels.varlen_attention.features import (
    PLAIN,
    UNLIMITED,
    Features,
    capped,
    rotate,
    sees_nothing,
    visible_keys,
)
from fastencoder.kernels.varlen_attention.rows import Limits, Rows, plan_rows

SHARED_LENGTH = 96  # tokens in a shared row; longer sequences have rows of their own
_QUERIES = 256  # of one call at most, where there is a mask
_MASK_BYTES = 16 * 2**20  # of one call

_masks = MaskCache()


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
    if cpu_native.runs(q, k, v, features):
        return cpu_native.varlen_attention(q, k, v, offsets, max_seqlen, scale, features)
    bounds = offsets.tolist()
    lengths = tuple(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    longest = max(lengths, default=0)
    if not longest:
        return torch.empty(q.shape, dtype=q.dtype)
    features = _that_matter(features, longest)
    if features.cos is not None:
        dtype = accumulation_dtype(q.dtype)
        q, k = rotate(q, features, dtype), rotate(k, features, dtype)
    limits = Limits(SHARED_LENGTH)
    if features.masks:
        limits = Limits(SHARED_LENGTH, _QUERIES, _MASK_BYTES // (4 * q.shape[1]))
    plan = plan_rows(lengths, limits)
    out = _run(plan, q, k, v, scale, features)
    if any(rows.shared for rows in plan) and not math.isfinite(out[: bounds[-1]].sum(dtype=torch.float32)):
        # A NaN or infinity of one sequence reaches the others of its row through 0 * NaN: give every sequence its own.
        out = _run(plan_rows(lengths, limits._replace(shared=0)), q, k, v, scale, features)
    return out


def _that_matter(features: Features, longest: int) -> Features:
    """Without a window that shows every key to every query."""
    left, right = (UNLIMITED if side >= longest - 1 else side for side in (features.left, features.right))
    return features if (left, right) == features[:2] else features._replace(left=left, right=right)


def _run(
    plan: tuple[Rows, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    features: Features,
) -> torch.Tensor:
    tokens, heads = q.shape[:2]
    cached = sum(rows.cells for rows in plan) * heads * 4 <= CACHE_BYTES
    if len(plan) == 1 and plan[0].scatter == slice(0, tokens):
        return _mix(plan[0], q, k, v, scale, features, cached).flatten(0, 1)
    out = torch.empty(tokens + 1, *q.shape[1:], dtype=q.dtype)  # the results of unused slots end in the last row
    for rows in plan:
        mixed = _mix(rows, *_select(q, k, v, rows.gather), scale, features, cached).flatten(0, 1)
        if isinstance(rows.scatter, slice):
            out[rows.scatter] = mixed
        else:
            out.index_copy_(0, rows.scatter, mixed)
    return out[:tokens]


def _mix(
    rows: Rows,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    features: Features,
    cached: bool,
) -> torch.Tensor:
    """Attention inside each row: ``[R * L, heads, d]`` three times -> ``[R, L, H, d]``, contiguous."""
    q, k, v = (x.unflatten(0, (rows.count, rows.length)).transpose(1, 2) for x in (q, k, v))
    dtype = accumulation_dtype(q.dtype) if features.masks else q.dtype
    make = _masks.mask if cached else mask
    everyone = range(rows.length)
    if rows.length <= _QUERIES or not features.masks:
        return _attend(q, k, v, make(rows, features, everyone, everyone, dtype), scale, features).contiguous()
    out = torch.empty(rows.count, rows.length, *q.shape[1::2], dtype=q.dtype)
    fit = _MASK_BYTES // (4 * q.shape[1] * rows.length)
    step = min(_QUERIES, max(32, fit))
    for first in range(0, rows.length, step):
        queries = range(first, min(first + step, rows.length))
        keys = range(*visible_keys(features, queries.start, queries.stop, rows.length))
        added = make(rows, features, queries, keys, dtype)
        block, seen = slice(queries.start, queries.stop), slice(keys.start, keys.stop)
        out[:, block] = _attend(q[:, :, block], k[:, :, seen], v[:, :, seen], added, scale, features)
    return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor | None, scale: float, features: Features
) -> torch.Tensor:
    """``[n, H, queries, d]``, ``[n, Hk, keys, d]`` twice, what is added to the scores -> ``[n, queries, H, d]``."""
    if features.softcap is None:
        # A query that sees no key gets zero here.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)
    dtype = accumulation_dtype(q.dtype)
    key, value = (x.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = capped(q.to(dtype) @ key.transpose(2, 3) * scale, features)
    if added is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        weights = torch.softmax(scores + added, dim=-1).masked_fill_(sees_nothing(added), 0.0)
    return (weights @ value).to(q.dtype).transpose(1, 2)


def _select(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor | slice) -> tuple[torch.Tensor, ...]:
    """Rows `index` of all three; in one gather where they are neighbours in one packed QKV buffer."""
    if isinstance(index, slice):
        return q[index], k[index], v[index]
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
