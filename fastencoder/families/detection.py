"""Encoders of detectors: multi-head attention over a feature map, whose positions are added to queries and keys in each layer.

DETR (https://arxiv.org/abs/2005.12872) and RT-DETR's attention over its smallest map (https://arxiv.org/abs/2304.08069).
"""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter, NameMap

# Queries and keys are not projected from what values are.
_OPTIONS = {"separate_qkv": True}

DETR_NAMES = NameMap(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    norm1="self_attn_layer_norm",
    up="mlp.fc1",
    activation="mlp.activation_fn",
    down="mlp.fc2",
    norm2="final_layer_norm",
    head_dim="self_attn.head_dim",
    scaling="self_attn.scaling",
)
DETR = Adapter("post", (DETR_NAMES,), attention="spatial-positions", options=_OPTIONS, label="DETR")
# With normalize_before the feed-forward block is added to its own normalised input: no family's program.
RT_DETR = replace(DETR, requires={"normalize_before": False})
D_FINE_NAMES = replace(DETR_NAMES, up="mlp.layers.0", activation="mlp.act", down="mlp.layers.1")
D_FINE = replace(RT_DETR, names=(D_FINE_NAMES,))

OLD_NAMES = replace(
    DETR_NAMES,
    out="self_attn.out_proj",
    up="fc1",
    activation="activation_fn",
    down="fc2",
    heads="self_attn.num_heads",
    head_dim="",
)
OLD = replace(DETR, names=(OLD_NAMES,), attention="object-queries", extra_outputs=0)
OMDET_NAMES = replace(
    OLD_NAMES,
    query="self_attn.query",
    key="self_attn.key",
    value="self_attn.value",
    heads="self_attn.num_attention_heads",
    scaling=None,
)

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (
        DETR,
        {
            "detr.modeling_detr.DetrEncoderLayer": "detr",
            "conditional_detr.modeling_conditional_detr.ConditionalDetrEncoderLayer": "conditional_detr",
        },
    ),
    (
        RT_DETR,
        {
            "rt_detr.modeling_rt_detr.RTDetrEncoderLayer": "rt_detr",
            "rt_detr_v2.modeling_rt_detr_v2.RTDetrV2EncoderLayer": "rt_detr_v2",
            "pp_doclayout_v2.modeling_pp_doclayout_v2.PPDocLayoutV2EncoderLayer": "pp_doclayout_v2",
            "pp_doclayout_v3.modeling_pp_doclayout_v3.PPDocLayoutV3EncoderLayer": "pp_doclayout_v3",
            "pp_doclayout_v4.modeling_pp_doclayout_v4.PPDocLayoutV4EncoderLayer": "pp_doclayout_v4",
        },
    ),
    (
        D_FINE,
        {
            "d_fine.modeling_d_fine.DFineEncoderLayer": "d_fine",
            "deimv2.modeling_deimv2.Deimv2EncoderLayer": "deimv2",
        },
    ),
    # Its loop computes a scale for the positions from each layer's output.
    (replace(OLD, keeps_hidden_states=True), {"dab_detr.modeling_dab_detr.DabDetrEncoderLayer": "dab-detr"}),
    (
        replace(OLD, norm_placement="pre"),
        {"table_transformer.modeling_table_transformer.TableTransformerEncoderLayer": "table-transformer"},
    ),
    (
        replace(OLD, names=(OMDET_NAMES,), attention="position-embeddings"),
        {"omdet_turbo.modeling_omdet_turbo.OmDetTurboEncoderLayer": "omdet-turbo"},
    ),
]
