"""Owners that make something for all of their layers: a bias `[B, H, S, S]` above all, which fast layers do not need.

A fast owner runs the original loop. Only the method that makes the tensor is another: it returns a `Deferred` while nobody but
fast layers will see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..eligibility import touched
from .deferred import Deferred, DistanceBias, PaddingMask, distances, owner_may_defer


class FastOwner(nn.Module):
    """Mixed in before the owner's own class (see `classes.fast_class`)."""

    original_class: type[nn.Module]


class FastMPNetEncoder(FastOwner):
    """One bias for all layers, by bucketed distance (https://arxiv.org/abs/2004.09297)."""

    def compute_position_bias(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        table, original = self.relative_attention_bias, super().compute_position_bias
        if args or kwargs or not owner_may_defer(self) or type(table) is not nn.Embedding or touched(table):
            return original(x, *args, **kwargs)
        buckets = self.relative_position_bucket(distances(row_length(x), x.device))
        return DistanceBias(lambda: original(x), table(buckets).t().contiguous())


class FastDebertaEncoder(FastOwner):
    """Masks and distances for all pairs of tokens (https://arxiv.org/abs/2006.03654), which nobody needs."""

    def get_attention_mask(self, attention_mask: torch.Tensor) -> Any:
        original = super().get_attention_mask
        if attention_mask.dim() != 2 or not owner_may_defer(self):
            return original(attention_mask)
        return PaddingMask(lambda: original(attention_mask), attention_mask != 0)

    def get_rel_pos(self, hidden_states: torch.Tensor, query_states: Any = None, relative_pos: Any = None) -> Any:
        original = super().get_rel_pos
        if not (self.relative_attention and query_states is relative_pos is None and owner_may_defer(self)):
            return original(hidden_states, query_states, relative_pos)
        return Deferred(lambda: original(hidden_states))


def row_length(hidden: torch.Tensor) -> int:
    """Positions in a row of `[B, S, *]`; of a jagged nested tensor the longest."""
    return int(hidden.offsets().diff().max()) if hidden.is_nested else hidden.shape[1]  # type: ignore[attr-defined]


# By qualified name of the owner's class.
OWNERS: dict[str, type[FastOwner]] = {
    "transformers.models.mpnet.modeling_mpnet.MPNetEncoder": FastMPNetEncoder,
    "transformers.models.deberta.modeling_deberta.DebertaEncoder": FastDebertaEncoder,
    "transformers.models.sew_d.modeling_sew_d.SEWDTransformerEncoder": FastDebertaEncoder,
    "transformers.models.deberta_v2.modeling_deberta_v2.DebertaV2Encoder": FastDebertaEncoder,
}
