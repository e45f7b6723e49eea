"""Attention with a bias that the model makes for all of its layers: MPNet's and T5's, by bucketed distance."""

from __future__ import annotations

from typing import Any

import torch

from ...packing import PackedBatch
from ..deferred import Deferred, DistanceBias, distances, may_defer
from ..guards import Delegated
from ..stack import current_call
from .call import LayerCall
from .kind import AttentionKind


def bias_features(batch: PackedBatch, bias: Any, heads: int) -> dict[str, torch.Tensor]:
    """The keyword argument of `kernels.varlen_attention` for a bias on the scores of a padded batch.

    Args:
        bias: a `DistanceBias`, or `[1 or B, 1 or H, S, S]` by position in the padded rows.

    A distance between tokens is that of the padded row, which a packed sequence keeps unless its row has holes; then, and for
    a bias by position unless all padding is on the right, the bias of the tokens that are there is put together here.
    """
    if isinstance(bias, DistanceBias):
        table = bias.table
        if batch.layout != "holes":
            return {"relative_bias": table}
        return {"bias": batch.remembered(("bias", id(table)), table, lambda: between_tokens(batch, table))}
    if isinstance(bias, Deferred):
        bias = bias.restore()
    rows = (1, batch.batch) if batch.seqlen else (1,)
    size = batch.seqlen or batch.values.shape[0]
    if type(bias) is not torch.Tensor or bias.dim() != 4 or bias.shape[0] not in rows or bias.shape[1] not in (1, heads):
        raise Delegated("the bias on the scores is not a tensor [B, H, S, S]")
    if bias.shape[2:] != (size, size) or not batch.seqlen:
        raise Delegated(f"the bias on the scores is {tuple(bias.shape)}, for rows of {size}")
    return {"bias": batch.remembered(("bias", id(bias)), bias, lambda: by_token(batch, bias))}


def between_tokens(batch: PackedBatch, table: torch.Tensor) -> torch.Tensor:
    """`[H, 2R - 1]` by distance in the padded row -> `[B, H, L, L]` for the tokens of each sequence."""
    positions = batch.positions()
    reach = table.shape[1] // 2
    distance = positions[:, None, :] - positions[:, :, None]  # [B, query, key]
    return table[:, (distance + reach).clamp(0, 2 * reach)].transpose(0, 1)


def by_token(batch: PackedBatch, bias: torch.Tensor) -> torch.Tensor:
    """`[1 or B, 1 or H, S, S]` by position in the padded rows -> `[B, 1 or H, L, L]` by position in the packed ones; `bias`
    itself where all padding is on the right, because positions are the same then."""
    if batch.layout == "right":
        return bias
    return batch.between_tokens(bias.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PositionBias(AttentionKind):
    """Scores plus the layer's argument `position_bias`."""

    reads = frozenset({"position_bias"})

    def features(self, call: LayerCall) -> dict[str, Any]:
        bias = call.arguments.get("position_bias")
        return {} if bias is None else bias_features(call.batch, bias, call.spec.num_heads)


class T5Bias(PositionBias):
    """T5 (https://arxiv.org/abs/1910.10683): the first layer makes the bias of all layers, and hands it on.

    Args:
        shared: False if every layer makes one of its own (UMT5) and none hands it on.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.reads = frozenset({"position_bias"} if shared else ())

    def features(self, call: LayerCall) -> dict[str, Any]:
        bias = call.arguments.get("position_bias") if self.shared else None
        if bias is None:
            bias = self._made_by_layer(call)
        return bias_features(call.batch, bias, call.spec.num_heads)

    def _made_by_layer(self, call: LayerCall) -> DistanceBias:
        attention, batch = call.binding.attention, call.batch
        if not attention.has_relative_attention_bias:
            raise Delegated("no position_bias is given, and this layer has none of its own")
        seqlen = batch.seqlen or batch.max_seqlen
        between = distances(seqlen, batch.offsets.device)
        if self.shared:
            buckets = attention._relative_position_bucket(
                between,
                bidirectional=True,
                num_buckets=attention.relative_attention_num_buckets,
                max_distance=attention.relative_attention_max_distance,
            )
        else:
            buckets = attention._relative_position_bucket(between)
        table = attention.relative_attention_bias(buckets).t().contiguous()
        bias = DistanceBias(lambda: attention.compute_bias(seqlen, seqlen, device=between.device), table)
        if self.shared:
            stack_call = current_call(call.layer._fastencoder.stack) if call.layer is not None else None
            call.arguments["position_bias"] = bias if may_defer(stack_call) else bias.restore()
        return bias
