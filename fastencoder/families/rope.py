"""Encoders with rotary position embedding (https://arxiv.org/abs/2104.09864) along one axis, post-LN and pre-LN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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

DIA_NAMES = NameMap(
    query="self_attention.q_proj",
    key="self_attention.k_proj",
    value="self_attention.v_proj",
    out="self_attention.o_proj",
    norm1="pre_sa_norm",
    up="mlp.gate_up_proj",
    activation="mlp.activation_fn",
    down="mlp.down_proj",
    norm2="post_sa_norm",
    head_dim="self_attention.head_dim",
    scaling="self_attention.scaling",
)
DIA = replace(LLAMA, names=(DIA_NAMES,), gated_up="first")
DOTS_NAMES = replace(LLAMA_NAMES, gate="", up="mlp.gate_up_proj", activation="mlp.activation_fn")
DOTS = replace(LLAMA, names=(DOTS_NAMES,), gated_up="first")

FC_NAMES = replace(LLAMA_NAMES, gate="", up="mlp.fc1", activation="mlp.activation_fn", down="mlp.fc2")
GLM_ASR = replace(LLAMA, names=(replace(FC_NAMES, activation="mlp.act_fn"),))
MOONSHINE = replace(LLAMA, names=(FC_NAMES,), attention="rope-neighbours")
NEMOTRON_NAMES = replace(FC_NAMES, norm1="layer_norm1", norm2="layer_norm2")
NEMOTRON = replace(LLAMA, names=(NEMOTRON_NAMES,))

QK_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
NEMOTRON_QK = replace(LLAMA, names=(replace(NEMOTRON_NAMES, **QK_NORMS),))
LLAMA_QK_NAMES = replace(LLAMA_NAMES, **QK_NORMS)
ESMC = replace(LLAMA, names=(LLAMA_QK_NAMES,), divisor="scaling_factor")
PE = replace(LLAMA, names=(LLAMA_QK_NAMES,), attention="rope-neighbours")


# These codecs give their layers one angle for each head instead of one for each position: queries and keys of a head are turned
# alike, and the angle between them stays what it was. Convolutions follow the layers.
def _does_not_only_turn(layer: Any) -> str | None:
    kind = layer.self_attn.config.rope_parameters["rope_type"]
    return None if kind == "default" else f"rotary embedding of the kind {kind!r} may scale queries and keys as well"


CODEC = Adapter(
    "pre",
    (FC_NAMES,),
    ignores=("position_embeddings",),
    refuses=_does_not_only_turn,
    padding_is_read=True,
    label="pre-LN MHA",
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
    (
        ESM,
        {
            "esm.modeling_esm.EsmLayer": "esm",
            "evolla.modeling_evolla.EvollaSaProtLayer": "evolla",
        },
    ),
    (LLAMA, {"eurobert.modeling_eurobert.EuroBertDecoderLayer": "eurobert"}),
    (DIA, {"dia.modeling_dia.DiaEncoderLayer": "dia dia_encoder"}),
    (DOTS, {"dots3_note.modeling_dots3_note.Dots3NoteAudioLayer": "dots3_note dots3_note_audio_encoder"}),
    (GLM_ASR, {"glmasr.modeling_glmasr.GlmAsrEncoderLayer": "glmasr glmasr_encoder"}),
    (MOONSHINE, {"moonshine.modeling_moonshine.MoonshineEncoderLayer": "moonshine"}),
    (
        NEMOTRON,
        {
            "nemotron3_diarization.modeling_nemotron3_diarization.Nemotron3DiarizationAudioLayer": (
                "nemotron3_diarization nemotron3_diarization_audio"
            )
        },
    ),
    (
        NEMOTRON_QK,
        {
            "nemotron3_5_transcribe.modeling_nemotron3_5_transcribe.Nemotron3_5TranscribeAsrAudioLayer": (
                "nemotron3_5_transcribe_asr_audio nemotron3_5_transcribe_audio"
            )
        },
    ),
    (ESMC, {"esmc.modeling_esmc.EsmcLayer": "esmc esmfold2"}),
    (
        PE,
        {
            "pe_audio.modeling_pe_audio.PeAudioEncoderLayer": "pe_audio pe_audio_encoder",
            "pe_video.modeling_pe_video.PeVideoEncoderLayer": "pe_video pe_video_encoder",
            "pe_audio_video.modeling_pe_audio_video.PeAudioVideoEncoderLayer": "pe_audio_video pe_audio_video_encoder",
        },
    ),
    (
        CODEC,
        {
            "neucodec.modeling_neucodec.NeuCodecDecoderLayer": "neucodec",
            "xcodec2.modeling_xcodec2.Xcodec2DecoderLayer": "xcodec2",
        },
    ),
    (ULTRABERT, {"ultrabert.modeling_ultrabert.UltrabertDecoderLayer": "ultrabert ultravbert"}),
]
