"""``read_mask`` and ``token_positions`` on CPU, where a look at a value costs nothing."""

from __future__ import annotations

import numpy as np
import torch

from fastencoder.kernels.padding import BIAS, DIFFERS, MASKED_BELOW
from fastencoder.kernels.padding.reference import is_materialised


def read_mask(mask: torch.Tensor, batch: int, seqlen: int, marks: str = "tokens") -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, S]`` or ``[B or 1, 1, 1 or S, S]`` -> bool ``[B, S]``, int32 ``[B]``."""
    if mask.dim() == 2:
        tokens = mask.bool() if marks == "tokens" else mask == 0
        return tokens, tokens.sum(dim=1, dtype=torch.int32)
    rows = mask[:, 0, 0].expand(batch, seqlen) if mask.shape[2] else mask.new_empty(batch, seqlen)
    tokens = rows if rows.dtype == torch.bool else rows == 0
    if is_materialised(mask) and _differs(mask):
        return tokens, torch.full((batch,), DIFFERS, dtype=torch.int32)
    if rows.is_floating_point() and not torch.all(tokens | (rows <= MASKED_BELOW)):
        return tokens, torch.full((batch,), BIAS, dtype=torch.int32)
    return tokens, tokens.sum(dim=1, dtype=torch.int32)


def _differs(mask: torch.Tensor) -> bool:
    """Whether any query has another mask than the first one. Each comparison is the faster one for its type."""
    if mask.dtype == torch.bool:
        return bool((mask != mask[:, :, :1]).any())
    return not torch.equal(mask, mask[:, :, :1].expand_as(mask))


def token_positions(tokens: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
    """bool ``[B, S]``, int32 ``[B + 1]``, T -> int32 ``[T]``."""
    # Several times faster than torch.nonzero, which takes two steps for every token.
    positions = np.flatnonzero(tokens.numpy())
    if len(positions) != count:
        raise ValueError(f"there are {len(positions)} tokens, not {count}")
    return torch.from_numpy(positions.astype(np.int32))
