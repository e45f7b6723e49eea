"""BERT's weights in `torch.nn.TransformerEncoder`, a peer on every device."""

from __future__ import annotations

import torch
from torch import nn

ONLY_BERT = "only BERT's layers are copied into nn.TransformerEncoder"


class Nested(nn.Module):
    """A BERT whose layers are `torch.nn.TransformerEncoder`: nested tensors without padding, and one fused call a layer,
    which is what BetterTransformer put into models.

    The fast path's GELU is the tanh form on CUDA, whatever the layer asks for. It applies where both norms of a layer have
    one eps.

    Raises:
        ValueError: the model has no layers like BERT's.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        layers = getattr(getattr(bert, "encoder", None), "layer", None)
        if layers is None or not hasattr(layers[0], "intermediate"):
            raise ValueError(ONLY_BERT)
        config = bert.config
        first = next(bert.parameters())
        empty = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            device=first.device,
            dtype=first.dtype,
        )
        self.embeddings = bert.embeddings
        self.encoder = nn.TransformerEncoder(empty, len(layers), enable_nested_tensor=True, mask_check=False).eval()
        for mine, theirs in zip(self.encoder.layers, layers, strict=True):
            _copy_layer(mine, theirs)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The last hidden state `[B, S, D]`, zero at padding."""
        embedded = self.embeddings(input_ids=inputs["input_ids"])
        mask = inputs.get("attention_mask")
        return self.encoder(embedded, src_key_padding_mask=None if mask is None else mask == 0)


def _copy_layer(mine: nn.TransformerEncoderLayer, theirs: nn.Module) -> None:
    inner = theirs.attention.self
    projections = (inner.query, inner.key, inner.value)
    mine.self_attn.in_proj_weight.copy_(torch.cat([linear.weight for linear in projections]))
    mine.self_attn.in_proj_bias.copy_(torch.cat([linear.bias for linear in projections]))
    for to, source in (
        (mine.self_attn.out_proj, theirs.attention.output.dense),
        (mine.norm1, theirs.attention.output.LayerNorm),
        (mine.linear1, theirs.intermediate.dense),
        (mine.linear2, theirs.output.dense),
        (mine.norm2, theirs.output.LayerNorm),
    ):
        to.weight.copy_(source.weight)
        to.bias.copy_(source.bias)
    mine.norm1.eps, mine.norm2.eps = theirs.attention.output.LayerNorm.eps, theirs.output.LayerNorm.eps
