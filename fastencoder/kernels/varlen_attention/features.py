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
    def any(self) -> bool:
        """Whether this is not plain attention."""
        windowed = self.left != UNLIMITED or self.right != UNLIMITED
        return windowed or self.cos is not None or self.adjusts_scores


PLAIN = Features()


def rotate(x: torch.Tensor, features: Features, dtype: torch.dtype) -> torch.Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of queries or keys ``[T, H, d]``, computed in ``dtype`` and
    rounded to x's own."""
    if features.cos is None:
        return x
    cos, sin = (table.to(dtype)[:, None] for table in (features.cos, features.sin))  # [T, 1, r / 2]
    half = cos.shape[-1]
    rotated = x[..., : 2 * half].to(dtype)
    if features.interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    pairs = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pairs, dim=-1).flatten(-2) if features.interleaved else torch.cat(pairs, dim=-1)
    return torch.cat((rotated.to(x.dtype), x[..., 2 * half :]), dim=-1)


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
