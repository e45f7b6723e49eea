"""Layers whose attention scores have a bias: by distance (MPNet, WavLM, SpeechT5), by boxes on a page (LayoutLM's line, BROS),
by the distance of patches (BEiT, data2vec-vision).
"""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter, NameMap
from .post_ln import BERT_NAMES, WAV2VEC2, WAV2VEC2_NAMES

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
LAYOUT = replace(
    MPNET,
    names=(replace(BERT_NAMES, scaling=None),),
    extra_outputs=None,
    attention="layout-v3",
    label="post-LN, bias by boxes",
)
# With config.fast_qkv the three projections are one, and queries and values have biases of their own.
LAYOUT_V2 = replace(
    LAYOUT,
    names=(replace(LAYOUT.names[0], query="", key="", value="", qkv="attention.self.qkv_linear"), LAYOUT.names[0]),
    attention="layout-v2",
    extra_parameters=("attention.self.q_bias", "attention.self.v_bias"),
)
BROS = replace(LAYOUT, attention="box-bias")

WAVLM = replace(
    WAV2VEC2,
    names=(replace(WAV2VEC2_NAMES, scaling=None),),
    extra_outputs=1,
    gives_back=("position_bias",),
    attention="gated-bias",
    ignores=("index",),
    extra_parameters=tuple(
        f"attention.{name}" for name in ("gru_rel_pos_const", "gru_rel_pos_linear", "rel_attn_embed")
    ),
    label="post-LN, gated relative bias",
)
SPEECHT5 = replace(WAV2VEC2, padding_is_read=False, extra_outputs=0, attention="distance-keys", label="post-LN, relative keys")

BEIT_NAMES = NameMap(
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    norm1="layernorm_before",
    up="mlp.fc1",
    activation="mlp.activation_fn",
    down="mlp.fc2",
    norm2="layernorm_after",
    scale1="lambda_1",
    scale2="lambda_2",
    heads="attention.num_attention_heads",
    scaling="attention.scaling",
)
BEIT = Adapter(
    "pre",
    (BEIT_NAMES,),
    attention="grid",
    extra_parameters=("relative_position_bias",),
    label="pre-LN, bias over the grid",
)
_DATA2VEC_NAMES = replace(
    BEIT_NAMES,
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    out="attention.output.dense",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    heads="attention.attention.num_attention_heads",
    scaling=None,
)
# In eager mode the layer returns no second output; nobody but a caller of the layer itself sees the None that stands there.
DATA2VEC_VISION = replace(
    BEIT,
    names=(_DATA2VEC_NAMES, replace(_DATA2VEC_NAMES, scale1=None, scale2=None)),
    extra_outputs=1,
    attention="grid-in-attention",
    bidirectional=True,
    extra_parameters=("attention.attention.relative_position_bias",),
)

TABLES: tuple[tuple[Adapter, dict[str, str]], ...] = (
    (MPNET, {"mpnet.modeling_mpnet.MPNetLayer": "mpnet"}),
    (LAYOUT, {"layoutlmv3.modeling_layoutlmv3.LayoutLMv3Layer": "layoutlmv3"}),
    (LAYOUT_V2, {"layoutlmv2.modeling_layoutlmv2.LayoutLMv2Layer": "layoutlmv2 layoutxlm"}),
    (
        replace(
            LAYOUT,
            names=(replace(LAYOUT.names[0], norm1="attention.output.norm", norm2="output.norm"),),
            attention="layout-boxes",
        ),
        {"pp_doclayout_v2.modeling_pp_doclayout_v2.PPDocLayoutV2ReadingOrderLayer": "pp_doclayout_v2"},
    ),
    (BROS, {"bros.modeling_bros.BrosLayer": "bros"}),
    (WAVLM, {"wavlm.modeling_wavlm.WavLMEncoderLayer": "wavlm"}),
    (
        replace(WAVLM, norm_placement="pre", label="pre-LN, gated relative bias"),
        {"wavlm.modeling_wavlm.WavLMEncoderLayerStableLayerNorm": "wavlm"},
    ),
    (SPEECHT5, {"speecht5.modeling_speecht5.SpeechT5EncoderLayer": "speecht5"}),
    (BEIT, {"beit.modeling_beit.BeitLayer": "beit zoedepth"}),
    (DATA2VEC_VISION, {"data2vec.modeling_data2vec_vision.Data2VecVisionLayer": "data2vec-vision"}),
)
