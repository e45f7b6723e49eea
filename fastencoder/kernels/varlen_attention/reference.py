"""Plain PyTorch ``varlen_attention``: one sequence at a time."""

from __future__ import annotations

import torch

from fastencoder.kernels._dispatch import accumulation_dtype


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_seqlen: int, scale: float
) -> torch.Tensor:
    """``[T, H, d]``, ``[T, Hk, d]``, ``[T, Hk, d]``, ``[B + 1]`` -> ``[T, H, d]``."""
    dtype = accumulation_dtype(q.dtype)
    queries_per_key = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bounds = offsets.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        query = q[start:end].to(dtype).transpose(0, 1)  # [H, s, d]
        key, value = (
            x[start:end].to(dtype).transpose(0, 1).repeat_interleave(queries_per_key, dim=0)  # [H, s, d]
            for x in (k, v)
        )
        weights = torch.softmax(query @ key.transpose(1, 2) * scale, dim=-1)  # [H, s, s]
        out[start:end] = (weights @ value).transpose(0, 1)
    return out
