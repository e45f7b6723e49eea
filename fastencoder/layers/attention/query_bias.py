"""Attention whose bias depends on the query as well: WavLM, BROS, SpeechT5. It is another one in every layer."""

from __future__ import annotations

from typing import Any

import torch

from ...kernels import varlen_attention
from ...packing import PackedBatch
from ..deferred import DistanceBias, distances, may_defer
from ..guards import Delegated
from ..stack import current_call
from .call import LayerCall
from .disentangled import columns_between, spelled_out
from .kind import AttentionKind, sequences_of
from .position_bias import between_tokens


class QueryBias(AttentionKind):
    """What these kinds share: `bias_of` is asked with the layer's input and queries."""

    def bias_of(self, call: LayerCall, x: torch.Tensor, q: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of `kernels.varlen_attention`. x: `[T, D]`, what goes into the attention; q: `[T, H, d]`."""
        raise NotImplementedError

    def attend(self, call: LayerCall, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.queries_keys_values(call, x)
        batch = call.batch
        features = self.bias_of(call, x, q)
        tiles = batch.tiles(call.spec.head_dim, x.dtype)
        return varlen_attention(
            q, k, v, batch.offsets, batch.max_seqlen, call.binding.scale, tiles=tiles, **features
        ).flatten(1)


class GatedBias(QueryBias):
    """WavLM (https://arxiv.org/abs/2110.13900): the first layer makes one bias by bucketed distance for all layers, and each
    layer multiplies it with a gate for every query and head."""

    reads = frozenset({"position_bias"})

    def bias_of(self, call: LayerCall, x: torch.Tensor, q: torch.Tensor) -> dict[str, Any]:
        batch = call.batch
        bias = call.arguments.get("position_bias")
        if bias is None:
            bias = self._made_by_layer(call)
        if not isinstance(bias, DistanceBias):
            raise Delegated("position_bias is given as a tensor")
        table = bias.table
        between = batch.remembered(("between", id(table)), table, lambda: between_tokens(batch, table))  # [B or 1, H, L, L]
        gates = sequences_of(batch, self._gates(call, x)).transpose(1, 2)  # [B, H, L]
        return {"bias": gates[..., None] * between.to(gates.dtype)}

    def _gates(self, call: LayerCall, x: torch.Tensor) -> torch.Tensor:
        """`[T, D]` -> `[T, H]`."""
        attention = call.binding.attention
        heads = x.to(call.projections.dtype).unflatten(1, (call.spec.num_heads, -1))
        halves = attention.gru_rel_pos_linear(heads).unflatten(2, (2, 4)).sum(-1)  # [T, H, 2]
        first, second = torch.sigmoid(halves).unbind(-1)
        return first * (second * attention.gru_rel_pos_const.flatten() - 1.0) + 2.0

    def _made_by_layer(self, call: LayerCall) -> DistanceBias:
        attention, batch = call.binding.attention, call.batch
        if not hasattr(attention, "rel_attn_embed"):
            raise Delegated("no position_bias is given, and this layer has none of its own")
        seqlen, rows = batch.seqlen or batch.max_seqlen, batch.batch
        buckets = attention._relative_positions_bucket(distances(seqlen, batch.offsets.device))

        def make() -> torch.Tensor:
            return attention.compute_bias(seqlen, seqlen).repeat(rows, 1, 1)

        bias = DistanceBias(make, attention.rel_attn_embed(buckets).t().contiguous())
        stack_call = current_call(call.layer._fastencoder.stack) if call.layer is not None else None
        call.arguments["position_bias"] = bias if may_defer(stack_call) else bias.restore()
        return bias


class BoxBias(QueryBias):
    """BROS (https://arxiv.org/abs/2108.04539): every query attends to where the other boxes lie, seen from its own.

    `bbox_pos_emb` has a vector `[d]` for every pair of tokens.
    """

    reads = frozenset({"bbox_pos_emb"})

    def bias_of(self, call: LayerCall, x: torch.Tensor, q: torch.Tensor) -> dict[str, Any]:
        batch, embeddings = call.batch, call.arguments.get("bbox_pos_emb")
        size = batch.seqlen * batch.seqlen * batch.batch * call.spec.head_dim
        if not isinstance(embeddings, torch.Tensor) or not size or embeddings.numel() != size:
            raise Delegated("bbox_pos_emb is not a vector for every pair of positions")
        pairs = batch.remembered(("pairs", id(embeddings)), embeddings, lambda: _pairs(batch, embeddings))
        queries = sequences_of(batch, q) * call.binding.scale
        return {"bias": torch.einsum("bihd,bijd->bhij", queries, pairs.to(q.dtype))}


def _pairs(batch: PackedBatch, embeddings: torch.Tensor) -> torch.Tensor:
    """`[S, S, B, d]`, in any shape -> `[B, L, L, d]` for the tokens of each sequence."""
    pairs = embeddings.reshape(batch.seqlen, batch.seqlen, batch.batch, -1).permute(2, 0, 1, 3)
    if batch.layout == "right":
        return pairs[:, : batch.max_seqlen, : batch.max_seqlen]
    return batch.between_tokens(pairs)


class DistanceKeys(QueryBias):
    """SpeechT5's encoder, after Shaw et al. (https://arxiv.org/abs/1803.02155): queries attend to keys by distance.

    `position_bias` `[S, S, d]` holds the key of every pair of positions; it depends on their distance alone.
    """

    reads = frozenset({"position_bias"})

    def bias_of(self, call: LayerCall, x: torch.Tensor, q: torch.Tensor) -> dict[str, Any]:
        batch, given = call.batch, call.arguments.get("position_bias")
        if given is None:
            return {}
        if not isinstance(given, torch.Tensor) or given.shape != (batch.seqlen, batch.seqlen, call.spec.head_dim):
            raise Delegated("position_bias is not a vector for every pair of positions")
        keys = batch.remembered(("keys", id(given)), given, lambda: _by_distance(given))
        if keys is None:
            raise Delegated("position_bias is not a function of the distance")
        holes = batch.layout == "holes"
        reach = batch.seqlen if holes else max(batch.max_seqlen, 1)  # padding alone has no distances
        keys = keys[batch.seqlen - reach : batch.seqlen + reach - 1] * call.binding.scale
        products = (q.transpose(0, 1) @ keys.t().to(q.dtype)).transpose(0, 1)  # [T, H, 2 * reach - 1]
        key = ("columns", id(given))
        columns = batch.remembered(
            key, given, lambda: torch.arange(2 * reach - 1, dtype=torch.int32, device=given.device)
        )
        if not holes:
            return {"disentangled": (products, None, columns)}
        between = batch.remembered((*key, "between"), columns, lambda: columns_between(batch, columns))
        return {"bias": spelled_out(batch, products, None, between)}


def _by_distance(pairs: torch.Tensor) -> torch.Tensor | None:
    """`[S, S, d]` by query and key -> `[2S - 1, d]` by their distance, ascending; None if that does not say it all."""
    if not torch.equal(pairs[1:, 1:], pairs[:-1, :-1]):
        return None
    return torch.cat((pairs[0, 1:].flip(0), pairs[:, 0]))
