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
    c2p, p2c, columns: one or both of the first two with the third, or none.
    rel_h, rel_w: both or neither.
    """

    left: int = UNLIMITED
    right: int = UNLIMITED
    softcap: float | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    interleaved: bool = False
    relative_bias: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    c2p: torch.Tensor | None = None
    p2c: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    rel_h: torch.Tensor | None = None
    rel_w: torch.Tensor | None = None

    @property
    def has_token_terms(self) -> bool:
        """Whether something is added to the scores that depends on the tokens themselves, so that every layer has its
        own."""
        return self.columns is not None or self.rel_h is not None

    @property
    def has_biases(self) -> bool:
        """Whether something is added to the scores."""
        return self.relative_bias is not None or self.bias is not None or self.has_token_terms

    @property
    def adjusts_scores(self) -> bool:
        """Whether a score is more than a product of query and key."""
        return self.softcap is not None or self.has_biases

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
    features: Features, sequence: int, tokens: slice, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """What is added to the scores of one sequence: ``[H or 1, length, length]``, -inf where a query does not see a key; None
    for nothing."""
    positions = torch.arange(tokens.stop - tokens.start, device=device)
    distance = positions - positions[:, None]  # from query to key
    parts = []
    if features.bias is not None:
        bias = features.bias[sequence if features.bias.shape[0] > 1 else 0]
        parts.append(bias[:, : len(positions), : len(positions)].to(dtype))
    if features.relative_bias is not None:
        reach = features.relative_bias.shape[1] // 2  # R - 1
        parts.append(features.relative_bias[:, distance.clamp(-reach, reach) + reach].to(dtype))
    if features.columns is not None:
        column = column_of(features.columns, -distance)
        if features.c2p is not None:
            parts.append(_by_column(features.c2p[tokens], column).to(dtype))
        if features.p2c is not None:
            parts.append(_by_column(features.p2c[tokens], column.T).transpose(1, 2).to(dtype))
    if features.rel_h is not None:
        width = features.rel_w.shape[2]
        for products, place in ((features.rel_h, positions // width), (features.rel_w, positions % width)):
            parts.append(products[tokens].transpose(0, 1)[:, :, place].to(dtype))
    if features.left != UNLIMITED or features.right != UNLIMITED:
        hidden = torch.zeros(distance.shape, dtype=torch.bool, device=device)
        if features.left != UNLIMITED:
            hidden |= distance < -features.left
        if features.right != UNLIMITED:
            hidden |= distance > features.right
        window = torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        parts.append(window[None])
    return sum(parts[1:], parts[0]) if parts else None


def _by_column(products: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Of every token the products in these columns: ``[length, H, P]``, ``[length, n]`` -> ``[H, length, n]``."""
    by_head = products.transpose(0, 1)
    return by_head.gather(2, column.expand(len(by_head), -1, -1))


def column_of(columns: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """int64: the column of ``c2p`` and ``p2c`` for every distance, query minus key."""
    reach = columns.shape[0] // 2  # R - 1
    return columns[distance.clamp(-reach, reach) + reach].long()


def sees_nothing(bias: torch.Tensor) -> torch.Tensor:
    """Queries that every key is hidden from, whose result is zero: ``[..., queries, 1]``."""
    return (bias == float("-inf")).all(dim=-1, keepdim=True)
