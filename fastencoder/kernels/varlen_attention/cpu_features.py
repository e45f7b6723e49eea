"""``varlen_attention`` on CPU with windows, biases and the like: sequences of one length in one dense call.

Queries are taken in blocks, each with the keys that it sees, so that a window costs what it shows, and a bias by distance
is never spelled out for a whole long sequence.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F

from fastencoder.kernels._dispatch import accumulation_dtype
from fastencoder.kernels.varlen_attention.features import (
    Features,
    capped,
    rotate,
    score_bias,
    sees_nothing,
    visible_keys,
)

_QUERIES = 256  # of one call


def attention_with_features(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: tuple[int, ...], scale: float, features: Features
) -> torch.Tensor:
    """``[T, H, d]``, ``[T, Hk, d]``, ``[T, Hk, d]``, first tokens of the sequences and T -> ``[T, H, d]``."""
    dtype = accumulation_dtype(q.dtype)
    q, k = rotate(q, features, dtype), rotate(k, features, dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for length, sequences in _by_length(bounds).items():
        starts = torch.tensor([bounds[sequence] for sequence in sequences])
        rows = starts[:, None] + torch.arange(length)  # [n, length], packed positions
        query, key, value = (x[rows].transpose(1, 2) for x in (q, k, v))  # [n, heads, length, d]
        for first in range(0, length, _QUERIES):
            end = min(first + _QUERIES, length)
            low, high = visible_keys(features, first, end, length)
            bias = score_bias(features, sequences, range(first, end), range(low, high), dtype, q.device)
            mixed = _attend(query[:, :, first:end], key[:, :, low:high], value[:, :, low:high], bias, scale, features)
            out[rows[:, first:end]] = mixed.transpose(1, 2)
    return out


def _by_length(bounds: tuple[int, ...]) -> dict[int, list[int]]:
    groups = defaultdict(list)
    for sequence, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end > start:
            groups[end - start].append(sequence)
    return groups


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, features: Features
) -> torch.Tensor:
    """``[n, H, queries, d]``, ``[n, Hk, keys, d]`` twice, what is added to the scores -> ``[n, H, queries, d]``."""
    if features.softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    else:
        dtype = accumulation_dtype(q.dtype)
        key, value = (x.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = capped(q.to(dtype) @ key.transpose(2, 3) * scale, features)
        weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        out = (weights @ value).to(q.dtype)
    return out if bias is None else out.masked_fill(sees_nothing(bias), 0.0)
