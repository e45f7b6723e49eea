"""A mask between tokens beside that of padding: the layers outside of transformers take both."""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.padding import MASKED_BELOW
from ...packing import PackedBatch
from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind
from .position_bias import by_token


class PairMask(AttentionKind):
    """`src_mask` of `nn.TransformerEncoderLayer`: `[S, S]` or `[B * H, S, S]`, True or -inf where a query must not look.

    `is_causal` is a hint there that the mask is a causal one; the mask itself is used. Additive masks with other values are
    left to torch, whose own fused layer does not add them but takes every number for -inf.
    """

    reads = frozenset({"src_mask", "is_causal"})

    def features(self, call: LayerCall) -> dict[str, Any]:
        mask, batch = call.arguments.get("src_mask"), call.batch
        if mask is None:
            if call.arguments.get("is_causal"):
                raise Delegated("is_causal without a mask")
            return {}
        if type(mask) is not torch.Tensor or not batch.seqlen:
            raise Delegated("the mask is not a tensor, or there is no padded form")
        heads, size = call.spec.num_heads, batch.seqlen
        if tuple(mask.shape) not in ((size, size), (batch.batch * heads, size, size)):
            raise Delegated(f"a mask of shape {tuple(mask.shape)}")
        pairs = mask.view(-1, heads, size, size) if mask.dim() == 3 else mask[None, None]
        bias = batch.remembered(("pair mask",), mask, lambda: _additive(batch, pairs))
        if bias is None:
            raise Delegated("an additive mask with other values than 0 and -inf")
        return {"bias": bias}


class CausalFlag(AttentionKind):
    """`is_causal` of timm's blocks: no query sees a key behind its own position."""

    reads = frozenset({"is_causal"})

    def features(self, call: LayerCall) -> dict[str, Any]:
        if not call.arguments.get("is_causal"):
            return {}
        if call.mask is not None:
            raise Delegated("is_causal beside a mask")
        return {"causal": True}


def _additive(batch: PackedBatch, mask: torch.Tensor) -> torch.Tensor | None:
    """0 and -inf `[B or 1, H or 1, L, L]` by position in the packed sequences, from a mask by position in the padded ones;
    None if it holds other numbers."""
    blocked = mask if mask.dtype == torch.bool else mask < MASKED_BELOW
    if mask.dtype != torch.bool and not bool((blocked | (mask == 0)).all()):
        return None
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(blocked, float("-inf"))
    return by_token(batch, bias)
