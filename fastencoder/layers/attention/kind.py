"""Plain attention, and what the other kinds change in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...kernels import varlen_attention
from ...packing import PackedBatch
from .call import LayerCall

FeedForward = Callable[[LayerCall, torch.Tensor], torch.Tensor]  # the block with its residual and norm, on any tokens


class AttentionKind:
    """Softmax attention inside each sequence. Other kinds override `features`, or all of `attend`.

    Attributes:
        reads: the arguments of a layer's `forward` that this kind gives a meaning to. Any other argument that is given
            delegates the call to the original forward.
    """

    reads: frozenset[str] = frozenset()

    def geometry(self, hidden: torch.Tensor, mask: torch.Tensor | None, marks: str) -> PackedBatch:
        """Where the tokens of `hidden` `[B, S, D]` are (`PackedBatch.geometry`). May raise NotAPaddingMask."""
        return PackedBatch.geometry(hidden, mask, marks)

    def mask(self, mask: Any, arguments: dict[str, Any]) -> Any:
        """The mask that a layer was given, in a form that `PackedBatch.geometry` reads. What is more than a mask may be moved
        to `arguments`."""
        return mask

    def features(self, call: LayerCall) -> dict[str, Any]:
        """Keyword arguments of `kernels.varlen_attention` for this call. May raise Delegated."""
        return {}

    def attend(self, call: LayerCall, x: torch.Tensor) -> torch.Tensor:
        """Attention up to, not including, its output projection: `[T, D]` -> `[T, H * d]`."""
        q, k, v = self.queries_keys_values(call, x)
        batch, spec = call.batch, call.spec
        tiles = batch.tiles(spec.head_dim, x.dtype)
        features = self.features(call)
        return varlen_attention(
            q, k, v, batch.offsets, batch.max_seqlen, call.binding.scale, tiles=tiles, **features
        ).flatten(1)

    def after(self, call: LayerCall, x: torch.Tensor, feed_forward: FeedForward) -> torch.Tensor:
        """What a post-LN layer does behind its attention block: `[T, D]` -> `[T, D]`."""
        return feed_forward(call, x)

    def queries_keys_values(
        self, call: LayerCall, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[T, D]` -> `[T, H, d]` and twice `[T, Hk, d]`, with the norms of queries and keys."""
        q, k, v = call.projections.qkv(x)
        norms = call.binding.norms
        if "query_norm" in norms:
            q = _normed(call, "query_norm", q)
        if "key_norm" in norms:
            k = _normed(call, "key_norm", k)
        if "value_norm" in norms:
            v = _normed(call, "value_norm", v)
        return q, k, v

    def finish(self, call: LayerCall, x: torch.Tensor) -> torch.Tensor:
        """What the layer does with the output `[T, D]` of its two blocks. May raise Delegated."""
        return x


def with_biases(
    call: LayerCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and values `[T, H, d]` plus the attention's `q_bias` and `v_bias`, of one projection that has no bias."""
    attention, shape = call.binding.attention, q.shape[1:]
    return q + attention.q_bias.view(shape).to(q.dtype), k, v + attention.v_bias.view(shape).to(v.dtype)


def sequences_of(batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    """Packed `[T, *]` as `[B, L, *]`, `L = max_seqlen`; behind the end of a sequence stands the data of other tokens."""
    if batch.indices is None and batch.seqlen:
        return x.unflatten(0, (batch.batch, batch.seqlen))

    def make() -> torch.Tensor:
        counted = torch.arange(batch.max_seqlen, device=x.device)
        return (batch.offsets[:-1, None] + counted).clamp(max=x.shape[0] - 1)

    return x[batch.remembered(("slots",), batch.offsets, make)]


def _normed(call: LayerCall, slot: str, x: torch.Tensor) -> torch.Tensor:
    """Queries, keys or values `[T, H, d]`, normalised over each head, or over all of them if the norm's weight is as wide."""
    weight = getattr(call.binding.norms[slot], "weight", None)
    width = x.shape[2] if weight is None else weight.shape[0]
    normed, _ = call.norm(slot, x.reshape(-1, width))
    return normed.view(x.shape)
