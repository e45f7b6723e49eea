"""What may be added to plain attention, and how it reads in PyTorch: for the reference and the CPU.

The Triton kernels say the same in ``triton_parts.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

UNLIMITED = -1


class Features(NamedTuple):
    """What :func:`varlen_attention` is asked for beside plain attention; shapes are those of its arguments.

    left, right: how far a query sees, in tokens; causal attention has ``right = 0``.
    cos, sin: both or neither.
    """

    left: int = UNLIMITED
    right: int = UNLIMITED
    softcap: float | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    interleaved: bool = False
    relative_bias: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def adjusts_scores(self) -> bool:
        """Whether a score is more than a product of query and key."""
        return self.softcap is not None or self.relative_bias is not None or self.bias is not None

    @property
    def masks(self) -> bool:
        """Whether there is more than a product of rotated queries and keys: a window, or something done to the scores."""
        return self.left != UNLIMITED or self.right != UNLIMITED or self.adjusts_scores

    @property
    def any(self) -> bool:
        """Whether this is not plain attention."""
        return self.cos is not None or self.masks


PLAIN = Features()


def rotate(x: torch.Tensor, features: Features, dtype: torch.dtype) -> torch.Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of queries or keys ``[T, H, d]``, computed in ``dtype`` and
    rounded to x's own."""
    if features.cos is None:
        return x
    cos, sin = (table.to(dtype)[:, None] for table in (features.cos, features.sin))  # [T, 1, r / 2]
    half = cos.shape[-1]
    wide = x.to(dtype)
    first, second = _pairs(wide, half, features.interleaved)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    turned_first, turned_second = _pairs(out, half, features.interleaved)
    turned_first.copy_(first * cos).addcmul_(second, sin, value=-1)
    turned_second.copy_(second * cos).addcmul_(first, sin)
    out[..., 2 * half :] = wide[..., 2 * half :]
    return out.to(x.dtype)


def _pairs(x: torch.Tensor, half: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and second dimensions of the pairs that are rotated."""
    if interleaved:
        return x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def capped(scores: torch.Tensor, features: Features) -> torch.Tensor:
    """Scores bent to stay between ``-softcap`` and ``softcap`` (Gemma 2, arXiv 2408.00118)."""
    return scores if features.softcap is None else features.softcap * torch.tanh(scores / features.softcap)


def visible_keys(features: Features, first: int, end: int, length: int) -> tuple[int, int]:
    """First and end of the keys that some query from `first` to `end` sees in a sequence of `length` tokens."""
    low = 0 if features.left == UNLIMITED else max(0, first - features.left)
    high = length if features.right == UNLIMITED else min(length, end + features.right)
    return low, high


def score_bias(
    features: Features, sequences: list[int], queries: range, keys: range, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """What is added to the scores of these queries and keys: ``[B or 1, H or 1, queries, keys]``, -inf where a query does
    not see a key; None for nothing."""
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    distance = torch.arange(keys.start, keys.stop, device=device) - query
    parts = []
    if features.bias is not None:
        shared = features.bias.shape[0] == 1
        bias = features.bias if shared else features.bias[torch.tensor(sequences, device=device)]
        parts.append(bias[:, :, queries.start : queries.stop, keys.start : keys.stop].to(dtype))
    if features.relative_bias is not None:
        reach = features.relative_bias.shape[1] // 2  # R - 1
        parts.append(features.relative_bias[:, distance.clamp(-reach, reach) + reach][None].to(dtype))
    if features.left != UNLIMITED or features.right != UNLIMITED:
        hidden = torch.zeros(distance.shape, dtype=torch.bool, device=device)
        if features.left != UNLIMITED:
            hidden |= distance < -features.left
        if features.right != UNLIMITED:
            hidden |= distance > features.right
        window = torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        parts.append(window[None, None])
    return sum(parts[1:], parts[0]) if parts else None


def sees_nothing(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Queries that every key is hidden from, whose result is zero: ``[B or 1, H or 1, queries, 1]``; None without a
    bias."""
    return None if bias is None else (bias == float("-inf")).all(dim=-1, keepdim=True)
