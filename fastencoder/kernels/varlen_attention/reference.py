"""Plain PyTorch ``varlen_attention``: one sequence at a time."""

from __future__ import annotations

import torch

from fastencoder.kernels._dispatch import accumulation_dtype
from fastencoder.kernels.varlen_attention.features import PLAIN, Features, capped, rotate, score_bias, sees_nothing


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
    """``[T, H, d]``, ``[T, Hk, d]``, ``[T, Hk, d]``, ``[B + 1]`` -> ``[T, H, d]``."""
    dtype = accumulation_dtype(q.dtype)
    queries_per_key = q.shape[1] // k.shape[1]
    q, k = rotate(q, features, dtype), rotate(k, features, dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bounds = offsets.tolist()
    for sequence, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        query = q[start:end].to(dtype).transpose(0, 1)  # [H, s, d]
        key, value = (
            x[start:end].to(dtype).transpose(0, 1).repeat_interleave(queries_per_key, dim=0)  # [H, s, d]
            for x in (k, v)
        )
        scores = capped(query @ key.transpose(1, 2) * scale, features)  # [H, s, s]
        bias = score_bias(features, sequence, slice(start, end), dtype, q.device)
        if bias is not None:
            scores = scores + bias
        weights = torch.softmax(scores, dim=-1)
        if bias is not None:
            weights = weights.masked_fill(sees_nothing(bias), 0.0)
        out[start:end] = (weights @ value).transpose(0, 1)
    return out
