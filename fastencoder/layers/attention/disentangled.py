"""Disentangled attention (DeBERTa, https://arxiv.org/abs/2006.03654): scores of content with position, by bucketed distance."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch

from ...kernels import varlen_attention
from ...kernels._dispatch import on_gpu
from ...namespaces import namespace_of
from ...packing import PackedBatch
from ..deferred import Deferred, PaddingMask, distances
from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind, sequences_of, with_biases

Tables = tuple[torch.Tensor | None, torch.Tensor | None]  # position keys and position queries [H, P, d]


class Disentangled(AttentionKind):
    """DeBERTa-v2 and v3: distances in logarithmic buckets, positions through the projections of content if `share_att_key`.

    A distance i - j between query and key stands for one row of `rel_embeddings`. Only the rows that a batch can reach take
    part. On the CPU the rows that went through their projections are kept from one forward to the next, in
    `binding.memo`: they depend on weights alone.
    """

    reads = frozenset({"relative_pos", "rel_embeddings"})

    def mask(self, mask: Any, arguments: dict[str, Any]) -> Any:
        """The model spells padding out for all pairs of tokens; a query that is padding attends to nothing."""
        if isinstance(mask, PaddingMask):
            return mask.tokens
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
            return mask
        if mask.shape[2] == 1:
            return mask[:, 0, 0] != 0
        if mask.shape[2] == mask.shape[3]:
            pairs = mask[:, 0] != 0
            tokens = pairs.diagonal(dim1=1, dim2=2)
            if torch.equal(pairs, tokens[:, :, None] & tokens[:, None, :]):
                return tokens.contiguous()
        return mask

    def attend(self, call: LayerCall, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.queries_keys_values(call, x)
        batch = call.batch
        scale = (call.spec.head_dim * self.terms(call)) ** -0.5
        features: dict[str, Any] = {}
        if self.sees_positions(call):
            features = self._positions(call, q, k, scale)
        tiles = batch.tiles(call.spec.head_dim, x.dtype)
        return varlen_attention(q, k, v, batch.offsets, batch.max_seqlen, scale, tiles=tiles, **features).flatten(1)

    def terms(self, call: LayerCall) -> int:
        """How many kinds of scores are added up."""
        return 1 + sum(name in call.binding.attention.pos_att_type for name in ("c2p", "p2c"))

    def sees_positions(self, call: LayerCall) -> bool:
        """Whether this call has more than content. Raises Delegated for distances that somebody made."""
        attention, given = call.binding.attention, call.arguments.get("relative_pos")
        if not attention.relative_attention:
            return False
        if given is not None and not isinstance(given, Deferred):
            raise Delegated("relative_pos is given as a tensor")
        if not isinstance(call.arguments.get("rel_embeddings"), torch.Tensor):
            raise Delegated("relative attention without rel_embeddings")
        return "c2p" in attention.pos_att_type or "p2c" in attention.pos_att_type

    def rows(self, call: LayerCall, seqlen: int, device: torch.device) -> tuple[torch.Tensor, int, int]:
        """int32 `[2 * seqlen - 1]`: the row of `rel_embeddings` of every distance; and first and end of those in use."""
        attention = call.binding.attention
        own = namespace_of(type(attention))
        return _bucket_rows(
            own["make_log_bucket_position"],
            seqlen,
            attention.pos_ebd_size,
            attention.position_buckets,
            attention.max_relative_positions,
            device,
        )

    def tables(self, call: LayerCall, embeddings: torch.Tensor) -> Tables:
        """Rows of `rel_embeddings` `[P, D]` as keys and as queries `[P, H * d]`; None for what the layer does not use."""
        attention, slots = call.binding.attention, call.projections.slots
        key = query = None
        if "c2p" in attention.pos_att_type:
            key = slots["key"](embeddings) if attention.share_att_key else attention.pos_key_proj(embeddings)
        if "p2c" in attention.pos_att_type:
            query = slots["query"](embeddings) if attention.share_att_key else attention.pos_query_proj(embeddings)
        return key, query

    def span(self, call: LayerCall) -> int:
        """How many rows of `rel_embeddings` there are to each side of distance 0."""
        return call.binding.attention.pos_ebd_size

    def _positions(self, call: LayerCall, q: torch.Tensor, k: torch.Tensor, scale: float) -> dict[str, Any]:
        batch = call.batch
        holes = batch.layout == "holes"
        seqlen = batch.seqlen if holes else max(batch.max_seqlen, 1)  # padding alone has no distances

        def make() -> tuple[torch.Tensor, int, int]:
            return self.rows(call, seqlen, batch.offsets.device)

        key = ("rows", seqlen, self.span(call))
        rows, first, end = batch.remembered(key, batch.offsets, make)
        pos_key, pos_query = self._tables_of(call, first, end)
        c2p = None if pos_key is None else _products(q, pos_key, scale)
        p2c = None if pos_query is None else _products(k, pos_query, scale)
        columns = batch.remembered((*key, "columns"), rows, lambda: rows - first)
        if not holes:
            return {"disentangled": (c2p, p2c, columns)}
        between = batch.remembered((*key, "between"), columns, lambda: columns_between(batch, columns))
        return {"bias": spelled_out(batch, c2p, p2c, between)}

    def _tables_of(self, call: LayerCall, first: int, end: int) -> Tables:
        """`[H, P, d]` for the rows from `first` to `end`."""
        embeddings = call.arguments["rel_embeddings"][: 2 * self.span(call)]
        if on_gpu(embeddings.device):
            return _by_head(call, self.tables(call, embeddings[first:end]))
        batch, memo = call.batch, call.binding.memo
        known = memo.get("positions")
        if known is not None:
            seen = known[0]
            if not batch.remembered(("equal", id(seen)), embeddings, lambda: torch.equal(seen, embeddings)):
                known = None
        if known is None:
            kept = batch.remembered(("kept",), call.arguments["rel_embeddings"], embeddings.clone)
            known = memo["positions"] = (kept, _by_head(call, self.tables(call, kept)))
        key, query = (None if table is None else table[:, first:end] for table in known[1])
        return key, query


class DisentangledV1(Disentangled):
    """DeBERTa: every distance has a row; positions have projections of their own; queries and values have biases apart."""

    def queries_keys_values(
        self, call: LayerCall, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return with_biases(call, *super().queries_keys_values(call, x))

    def terms(self, call: LayerCall) -> int:
        return 1 + len(call.binding.attention.pos_att_type)

    def sees_positions(self, call: LayerCall) -> bool:
        if any(call.arguments.get(name) is None for name in self.reads):
            return False
        return super().sees_positions(call)

    def rows(self, call: LayerCall, seqlen: int, device: torch.device) -> tuple[torch.Tensor, int, int]:
        span = self.span(call)
        rows = (distances(seqlen, device) + span).clamp(0, 2 * span - 1).to(torch.int32)
        return rows, max(span - seqlen + 1, 0), min(span + seqlen, 2 * span)

    def tables(self, call: LayerCall, embeddings: torch.Tensor) -> Tables:
        attention = call.binding.attention
        key = attention.pos_proj(embeddings) if "c2p" in attention.pos_att_type else None
        query = attention.pos_q_proj(embeddings) if "p2c" in attention.pos_att_type else None
        return key, query

    def span(self, call: LayerCall) -> int:
        return call.binding.attention.max_relative_positions


def _products(x: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    """Queries or keys `[T, H, d]` and a table `[H, P, d]` -> a view `[T, H, P]` of `[H, T, P]`."""
    return torch.bmm(x.transpose(0, 1), (table * scale).to(x.dtype).transpose(1, 2)).transpose(0, 1)


def _by_head(call: LayerCall, tables: Iterable[torch.Tensor | None]) -> Tables:
    dim = call.spec.head_dim
    key, query = (None if table is None else table.unflatten(1, (-1, dim)).transpose(0, 1) for table in tables)
    return key, query


def columns_between(batch: PackedBatch, columns: torch.Tensor) -> torch.Tensor:
    """int32 `[2S - 1]` by distance in the padded row -> int64 `[B, L, L]` for query and key of each sequence."""
    positions = batch.positions()
    distance = positions[:, :, None] - positions[:, None, :]
    return columns[distance + columns.shape[0] // 2].long()


def spelled_out(
    batch: PackedBatch, c2p: torch.Tensor | None, p2c: torch.Tensor | None, between: torch.Tensor
) -> torch.Tensor:
    """The bias `[B, H, L, L]` of rows that have holes. c2p, p2c: `[T, H, P]`."""
    parts = []
    if c2p is not None:
        of_query = sequences_of(batch, c2p)  # [B, L, H, P]
        index = between[:, :, None, :].expand(-1, -1, of_query.shape[2], -1)
        parts.append(of_query.gather(3, index).permute(0, 2, 1, 3))
    if p2c is not None:
        of_key = sequences_of(batch, p2c)
        index = between.transpose(1, 2)[:, :, None, :].expand(-1, -1, of_key.shape[2], -1)
        parts.append(of_key.gather(3, index).permute(0, 2, 3, 1))
    return sum(parts[1:], parts[0])


@lru_cache(maxsize=64)
def _bucket_rows(
    bucket: Any, seqlen: int, span: int, buckets: int, max_position: int, device: torch.device
) -> tuple[torch.Tensor, int, int]:
    with torch.inference_mode(False):
        between = distances(seqlen, device)
        if buckets > 0 and max_position > 0:
            between = bucket(between, buckets, max_position).long()
        rows = (between + span).clamp(0, 2 * span - 1)
        bounds = rows[[0, -1]].tolist()  # buckets rise with the distance
    return rows.to(torch.int32), bounds[0], bounds[1] + 1
