"""Tokens that were packed before they reached the model, `[1, T, D]` with `cu_seq_lens_q`, in a layer's original forward.

Flash attention keeps such sequences apart by itself. transformers' other attention functions do not look at the lengths, and
would let every token see every sequence: they are given a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..eligibility import attention_implementation
from ..spec import Adapter
from .arguments import first_parameter, read_arguments


def within_sequences(
    layer: nn.Module, original_class: type, adapter: Adapter, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call on packed tokens with a mask under which each token sees its own sequence alone.

    Raises:
        RuntimeError: the layer's mask has another form.
    """
    implementation = attention_implementation(layer, adapter.names[0])
    if implementation is not None and "flash" in implementation:
        return args, kwargs
    given = read_arguments(original_class, args, kwargs)
    hidden, mask = given[first_parameter(original_class)], given.get(adapter.mask)
    readable = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4)
    if not (adapter.mask and readable) or adapter.mask_marks == "pairs" or hidden.dim() != 3 or hidden.shape[0] != 1:
        raise RuntimeError(
            f"{original_class.__name__} has to run its original forward, which cannot keep packed sequences (cu_seq_lens_q) "
            "apart: give the model padded input and an attention mask."
        )
    apart = _apart(given["cu_seq_lens_q"], hidden)
    if mask is not None and mask.dtype == torch.bool:
        apart = mask & (apart == 0)
    elif mask is not None:
        apart = torch.maximum(mask + apart, torch.full_like(apart, torch.finfo(apart.dtype).min))  # not infinite
    given[adapter.mask] = apart
    return (), given


def _apart(offsets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """What is added to the scores: `[1, 1, T, T]`, 0 within a sequence."""
    token = torch.arange(hidden.shape[1], device=hidden.device, dtype=offsets.dtype)
    sequence = torch.bucketize(token, offsets.to(hidden.device), right=True)
    other = sequence[:, None] != sequence
    zeros = torch.zeros(other.shape, dtype=hidden.dtype, device=hidden.device)
    return zeros.masked_fill_(other, torch.finfo(hidden.dtype).min)[None, None]
