"""``pack`` and ``unpack`` on CPU: one copy of the real tokens each."""

from __future__ import annotations

import torch


def pack(hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``[B, S, D]``, ``[T]`` -> ``[T, D]``."""
    # index_select takes int32 as it is; reshape is a view of anything whose first two dimensions are collapsible
    return hidden.reshape(-1, hidden.shape[2]).index_select(0, indices)


def unpack(values: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """``[T, D]``, ``[T]`` -> ``[B, S, D]``."""
    rows, dim = batch * seqlen, values.shape[1]
    if values.shape[0] == rows:  # indices ascend without repeats: each position holds its own token
        return values.clone(memory_format=torch.contiguous_format).view(batch, seqlen, dim)
    return values.new_zeros(rows, dim).index_copy_(0, indices.long(), values).view(batch, seqlen, dim)
