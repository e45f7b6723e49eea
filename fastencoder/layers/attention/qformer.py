"""Q-Former (https://arxiv.org/abs/2301.12597): learned queries and words attend to one another, then go ways of their own."""

from __future__ import annotations

import torch

from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind, FeedForward


class QFormer(AttentionKind):
    """The first `query_length` tokens of each row are queries. In some layers they look at the image, through a module that is
    called as it is; then queries and words have a feed-forward block each, that of the words called as it is.
    """

    reads = frozenset({"query_length", "encoder_hidden_states", "encoder_attention_mask"})

    def after(self, call: LayerCall, x: torch.Tensor, feed_forward: FeedForward) -> torch.Tensor:
        layer, batch, length = call.layer, call.batch, call.arguments.get("query_length") or 0
        if not isinstance(length, int) or length > batch.seqlen:
            raise Delegated("query_length is not a number of tokens")
        if not batch.seqlen:
            raise Delegated("the tokens are packed, and their queries are not known")
        queries, words = batch.remembered(("q-former", length), batch.offsets, lambda: _split(call, length))
        if queries.shape[0] != batch.batch * length:
            raise Delegated("some queries are masked out")
        out = torch.empty_like(x)
        if length:
            mixed = x.index_select(0, queries)
            if layer.has_cross_attention:
                mixed = self._look_at_image(call, mixed.view(batch.batch, length, -1)).flatten(0, 1)
            out.index_copy_(0, queries, feed_forward(call, mixed).to(x.dtype))
        if words.shape[0]:
            if not hasattr(layer, "intermediate"):
                raise Delegated("this Q-Former takes no words")
            spoken = x.index_select(0, words).to(call.projections.dtype)
            out.index_copy_(0, words, layer.feed_forward_chunk(spoken[None])[0].to(x.dtype))
        return out

    def _look_at_image(self, call: LayerCall, queries: torch.Tensor) -> torch.Tensor:
        image = call.arguments.get("encoder_hidden_states")
        if image is None:
            raise Delegated("no encoder_hidden_states for the cross-attention")
        seen = call.layer.crossattention(
            queries.to(call.projections.dtype),
            attention_mask=call.mask,
            encoder_hidden_states=image,
            encoder_attention_mask=call.arguments.get("encoder_attention_mask"),
        )
        return seen.to(queries.dtype)


def _split(call: LayerCall, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed tokens, int64, that are queries and those that are words."""
    batch = call.batch
    if batch.indices is None:
        position = torch.arange(batch.batch * batch.seqlen, device=batch.offsets.device) % batch.seqlen
    else:
        position = batch.indices % batch.seqlen
    is_query = position < length
    return is_query.nonzero()[:, 0], (~is_query).nonzero()[:, 0]
