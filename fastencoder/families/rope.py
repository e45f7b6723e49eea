"""Encoders with rotary position embedding (https://arxiv.org/abs/2104.09864) along one axis, post-LN and pre-LN."""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter, NameMap
from .post_ln import BERT_NAMES

ROFORMER = Adapter(
    "post",
    (replace(BERT_NAMES, scaling=None),),
    attention="rope-roformer",
    extra_outputs=1,
    requires={"attention.self.rotary_value": False},
    label="post-LN, rotary",
)

LLAMA_NAMES = NameMap(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    norm1="input_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    activation="mlp.act_fn",
    down="mlp.down_proj",
    norm2="post_attention_layernorm",
    head_dim="self_attn.head_dim",
    scaling="self_attn.scaling",
)
NOMIC_NAMES = replace(LLAMA_NAMES, norm1="post_attention_layernorm", norm2="post_mlp_layernorm")
NOMIC = Adapter("post", (NOMIC_NAMES,), attention="rope", label="post-LN, rotary")
JINA_NAMES = replace(NOMIC_NAMES, gate="", up="mlp.fc1", activation="mlp.activation_fn", down="mlp.fc2")
JINA = replace(NOMIC, names=(JINA_NAMES,))

# Queries are scaled before they are turned, which changes nothing but the place of the factor.
ESM = Adapter(
    "pre",
    (
        replace(
            BERT_NAMES,
            norm1="attention.LayerNorm",
            activation="",
            norm2="LayerNorm",
            scaling=None,
        ),
    ),
    attention="rope",
    activation="gelu",
    options={"rotary": ("attention.self.position_embedding_type", "rotary")},
    requires={"attention.self.scaling": 1.0},
    label="pre-LN, rotary",
)

LLAMA = Adapter("pre", (LLAMA_NAMES,), attention="rope", label="pre-LN, rotary")
ULTRABERT = replace(
    LLAMA,
    attention="rope-windowed",
    options={"window": "self_attn.sliding_window"},
    label="pre-LN, rotary, windowed",
)

# Of layers with windows and without, the first has no norm before its attention.
MODERNBERT = Adapter(
    "pre",
    (
        NameMap(
            qkv="attn.Wqkv",
            out="attn.Wo",
            norm1="attn_norm",
            up="mlp.Wi",
            activation="mlp.act",
            down="mlp.Wo",
            norm2="mlp_norm",
            head_dim="attn.head_dim",
        ),
    ),
    attention="rope-windowed",
    gated_up="first",
    options={"window": "attn.sliding_window"},
    label="pre-LN, rotary, windowed",
)

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (ROFORMER, {"roformer.modeling_roformer.RoFormerLayer": "roformer"}),
    (
        NOMIC,
        {
            "nomic_bert.modeling_nomic_bert.NomicBertLayer": "nomic_bert",
            "gte.modeling_gte.GteLayer": "gte",
        },
    ),
    (JINA, {"jina_embeddings_v3.modeling_jina_embeddings_v3.JinaEmbeddingsV3Layer": "jina_embeddings_v3"}),
    (MODERNBERT, {"modernbert.modeling_modernbert.ModernBertEncoderLayer": "modernbert colmodernvbert modernvbert"}),
    (ESM, {"esm.modeling_esm.EsmLayer": "esm"}),
    (LLAMA, {"eurobert.modeling_eurobert.EuroBertDecoderLayer": "eurobert"}),
    (ULTRABERT, {"ultrabert.modeling_ultrabert.UltrabertDecoderLayer": "ultrabert ultravbert"}),
]
