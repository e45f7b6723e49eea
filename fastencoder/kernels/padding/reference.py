"""Plain PyTorch ``read_mask`` and ``token_positions``. They do not wait for the device either."""

from __future__ import annotations

import torch

from fastencoder.kernels.padding import BIAS, DIFFERS, MASKED_BELOW


def read_mask(mask: torch.Tensor, batch: int, seqlen: int, marks: str = "tokens") -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, S]`` or ``[B or 1, 1, 1 or S, S]`` -> bool ``[B, S]``, int32 ``[B]``."""
    if mask.dim() == 2:
        tokens = mask.bool() if marks == "tokens" else mask == 0
        return tokens, tokens.sum(dim=1, dtype=torch.int32)
    rows = mask[:, 0, 0].expand(batch, seqlen) if mask.shape[2] else mask.new_empty(batch, seqlen)
    tokens = rows if rows.dtype == torch.bool else rows == 0
    summary = tokens.sum(dim=1, dtype=torch.int32)
    if rows.is_floating_point():
        is_bias = ~(tokens | (rows <= MASKED_BELOW)).all(dim=1)
        summary = torch.where(is_bias, BIAS, summary)
    if is_materialised(mask):
        differs = (mask != mask[:, :, :1]).flatten(1).any(dim=1)  # of each sequence, or of the one row for all
        summary = torch.where(differs, DIFFERS, summary)
    return tokens, summary


def is_materialised(mask: torch.Tensor) -> bool:
    """Whether a mask ``[B or 1, 1, 1 or S, S]`` has memory of its own for every query."""
    return mask.shape[2] > 1 and mask.stride(2) != 0


def token_positions(tokens: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
    """bool ``[B, S]``, int32 ``[B + 1]``, T -> int32 ``[T]``."""
    flat = tokens.flatten()
    # The offsets say how many there are before each sequence; a running count over the batch says the same.
    slot = torch.where(flat, flat.cumsum(0) - 1, count)  # padding is written to one slot more, and dropped
    positions = torch.empty(count + 1, dtype=torch.int32, device=flat.device)
    positions.scatter_(0, slot, torch.arange(flat.numel(), dtype=torch.int32, device=flat.device))
    return positions[:count]
