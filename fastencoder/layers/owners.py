"""Owners that make something for all of their layers: a bias `[B, H, S, S]` above all, which fast layers do not need.

A fast owner runs the original loop. Only the method that makes the tensor is another: it returns a `Deferred` while nobody but
fast layers will see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..eligibility import touched
from .deferred import DistanceBias, owner_may_defer


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


def distances(seqlen: int, device: torch.device) -> torch.Tensor:
    """Of a key from a query, all that there are in a row of `seqlen` tokens: `[2 * seqlen - 1]`."""
    return torch.arange(1 - seqlen, seqlen, device=device)


def row_length(hidden: torch.Tensor) -> int:
    """Positions in a row of `[B, S, *]`; of a jagged nested tensor the longest."""
    return int(hidden.offsets().diff().max()) if hidden.is_nested else hidden.shape[1]  # type: ignore[attr-defined]


# By qualified name of the owner's class.
OWNERS: dict[str, type[FastOwner]] = {
    "transformers.models.mpnet.modeling_mpnet.MPNetEncoder": FastMPNetEncoder,
}
