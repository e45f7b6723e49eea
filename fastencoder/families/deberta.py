"""DeBERTa (https://arxiv.org/abs/2006.03654), DeBERTa-v2/v3 (https://arxiv.org/abs/2111.09543) and SEW-D
(https://arxiv.org/abs/2109.06870): post-LN, disentangled attention.

DeBERTa's loops keep every layer's output, whether or not somebody asked their model for it. The convolution of v2-xlarge runs
between the first layer and the second as it is; around it, layers take and return padded hidden states.
"""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter
from .post_ln import BERT_NAMES

V2 = Adapter(
    "post",
    (
        replace(
            BERT_NAMES,
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
            scaling=None,
        ),
    ),
    extra_outputs=1,
    attention="disentangled",
    extra_parameters=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
    keeps_hidden_states=True,
    kept_for="DebertaV2Model",
    works_between="conv",
    label="post-LN, disentangled",
)
V1 = replace(
    V2,
    names=(replace(V2.names[0], query="", key="", value="", qkv="attention.self.in_proj"),),
    attention="disentangled-v1",
    kept_for="DebertaModel",
    qkv_order="heads",
    extra_parameters=tuple(f"attention.self.{name}" for name in ("q_bias", "v_bias", "pos_proj", "pos_q_proj")),
)

TABLES: tuple[tuple[Adapter, dict[str, str]], ...] = (
    (V2, {"deberta_v2.modeling_deberta_v2.DebertaV2Layer": "deberta-v2"}),
    (
        replace(V2, extra_outputs=None, keeps_hidden_states=False),
        {"sew_d.modeling_sew_d.SEWDLayer": "sew-d"},
    ),
    (V1, {"deberta.modeling_deberta.DebertaLayer": "deberta"}),
)
