"""Plain PyTorch ``pack`` and ``unpack``."""

from __future__ import annotations

import torch


def pack(hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``[B, S, D]``, ``[T]`` -> ``[T, D]``."""
    return hidden.flatten(0, 1)[indices.long()]


def unpack(values: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """``[T, D]``, ``[T]`` -> ``[B, S, D]``."""
    padded = values.new_zeros(batch * seqlen, values.shape[1])
    padded[indices.long()] = values
    return padded.view(batch, seqlen, values.shape[1])
