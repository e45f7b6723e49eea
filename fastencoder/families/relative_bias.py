"""Post-LN layers whose scores have a bias by distance: MPNet (https://arxiv.org/abs/2004.09297)."""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter
from .post_ln import BERT_NAMES

MPNET = Adapter(
    "post",
    (
        replace(
            BERT_NAMES,
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            out="attention.attn.o",
            norm1="attention.LayerNorm",
            heads="attention.attn.num_attention_heads",
            scaling=None,
        ),
    ),
    extra_outputs=0,
    attention="position-bias",
    label="post-LN, relative bias",
)

TABLES: tuple[tuple[Adapter, dict[str, str]], ...] = (
    (MPNET, {"mpnet.modeling_mpnet.MPNetLayer": "mpnet"}),
)
