"""Vision and audio blocks that take packed tokens: `[T, D]` and the cumulative lengths of images, windows or chunks of sound.

All are pre-LN; most turn queries and keys by the positions of patches in their grid, as Qwen2-VL
(https://arxiv.org/abs/2409.12191) does.
"""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter, NameMap
from .post_ln import BART_NAMES
from .pre_ln import CLIP_NAMES

QWEN2_VL_NAMES = NameMap(
    qkv="attn.qkv",
    out="attn.proj",
    norm1="norm1",
    up="mlp.fc1",
    activation="mlp.act",
    down="mlp.fc2",
    norm2="norm2",
    heads="attn.num_heads",
    scaling="attn.scaling",
)
QWEN3_VL_NAMES = replace(QWEN2_VL_NAMES, up="mlp.linear_fc1", activation="mlp.act_fn", down="mlp.linear_fc2")
QWEN2_5_VL_NAMES = replace(
    QWEN2_VL_NAMES, gate="mlp.gate_proj", up="mlp.up_proj", activation="mlp.act_fn", down="mlp.down_proj"
)
NORMED_NAMES = replace(QWEN2_5_VL_NAMES, query_norm="attn.q_norm", key_norm="attn.k_norm")
# A block of experts, or one with clamped gates: called as it is.
_WHOLE = {"gate": "", "up": "", "activation": "", "down": "", "feed_forward": "mlp"}
SIGLIP_NAMES = replace(CLIP_NAMES, scaling="self_attn.scaling")
KIMI_NAMES = replace(QWEN2_VL_NAMES, qkv="", query="attn.q_proj", key="attn.k_proj", value="attn.v_proj")
INKLING2_NAMES = replace(
    SIGLIP_NAMES, norm1="layernorm_before", norm2="layernorm_after", scale1="lambda_1", scale2="lambda_2"
)
LFM3_NAMES = NameMap(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    out="self_attn.out_proj",
    norm1="operator_norm",
    feed_forward="feed_forward",
    norm2="ffn_norm",
    heads="self_attn.num_heads",
    scaling="self_attn.scaling",
)

PACKED = Adapter(
    "pre", (QWEN2_VL_NAMES,), offsets="cu_seqlens", ignores=("max_seqlen",), label="pre-LN MHA on packed tokens"
)
QWEN2_VL = replace(PACKED, attention="rope-vision", label="pre-LN MHA on packed patches, with rotation")


def _rotating(names: NameMap, *others: NameMap) -> Adapter:
    return replace(QWEN2_VL, names=(names, *others))


def _plain(names: NameMap) -> Adapter:
    return replace(PACKED, names=(names,))


TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (
        QWEN2_VL,
        {
            "qwen2_vl.modeling_qwen2_vl.Qwen2VLVisionBlock": "qwen2_vl qwen2_vl_vision colqwen2",
            "ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeVisionBlock": (
                "ernie4_5_vl_moe ernie4_5_vl_moe_vision"
            ),
        },
    ),
    (
        _rotating(QWEN2_5_VL_NAMES),
        {
            "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionBlock": "qwen2_5_vl qwen2_5_vl_vision hyperclovax_vision_v2",
            "glm4v.modeling_glm4v.Glm4vVisionBlock": "glm4v glm4v_vision glm46v glmga",
            "glm4v_moe.modeling_glm4v_moe.Glm4vMoeVisionBlock": "glm4v_moe glm4v_moe_vision",
        },
    ),
    (
        _rotating(replace(QWEN2_5_VL_NAMES, kv_heads="attn.num_key_value_heads")),
        {"exaone4_5.modeling_exaone4_5.Exaone4_5_VisionBlock": "exaone4_5 exaone4_5_vision"},
    ),
    (
        _rotating(replace(QWEN2_5_VL_NAMES, qkv="", query="attn.q", key="attn.k", value="attn.v")),
        {
            "qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniVisionBlock": (
                "qwen2_5_omni qwen2_5_omni_thinker qwen2_5_omni_vision_encoder"
            )
        },
    ),
    (
        _rotating(QWEN3_VL_NAMES),
        {
            "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionBlock": "qwen3_vl qwen3_vl_vision cosmos3_omni",
            "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionBlock": "qwen3_vl_moe qwen3_vl_moe_vision",
            "qwen3_5.modeling_qwen3_5.Qwen3_5VisionBlock": "qwen3_5 qwen3_5_vision",
            "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeVisionBlock": "qwen3_5_moe qwen3_5_moe_vision",
            "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionBlock": (
                "qwen3_omni_moe_thinker qwen3_omni_moe_vision_encoder"
            ),
            "qwen4_exp.modeling_qwen4_exp.Qwen4ExpVisionBlock": "qwen4_exp_vision",
            "cohere_compass.modeling_cohere_compass.CohereCompassVisionBlock": "cohere_compass_vision",
        },
    ),
    (_rotating(NORMED_NAMES), {"glm_ocr.modeling_glm_ocr.GlmOcrVisionBlock": "glm_ocr glm_ocr_vision"}),
    (
        _rotating(NORMED_NAMES, replace(NORMED_NAMES, **_WHOLE)),
        {"dots3_note.modeling_dots3_note.Dots3NoteVisionBlock": "dots3_note dots3_note_vision_encoder"},
    ),
    (
        _rotating(replace(NORMED_NAMES, **_WHOLE)),
        {"glm5_next.modeling_glm5_next.Glm5NextVisionBlock": "glm5_next glm5_next_vision"},
    ),
    (
        _rotating(KIMI_NAMES),
        {
            "kimi_k25.modeling_kimi_k25.Kimi_K25VisionEncoderLayer": "kimi_k25 kimi_k25_vision",
            "muse_glimmer.modeling_muse_glimmer.MuseGlimmerVisionEncoderLayer": "muse_glimmer muse_glimmer_vision",
            "muse_spark.modeling_muse_spark.MuseSparkVisionEncoderLayer": "muse_spark muse_spark_vision",
        },
    ),
    (
        _rotating(SIGLIP_NAMES),
        {
            "paddleocr_vl.modeling_paddleocr_vl.PaddleOCRVisionEncoderLayer": "paddleocr_vl paddleocr_vl_vision",
            "video_llama_3.modeling_video_llama_3.VideoLlama3VisionEncoderLayer": "video_llama_3 video_llama_3_vision",
        },
    ),
    # Up to transformers 5.17 its images are rows [B, S, D], all of one size, and its factor has another name.
    (
        _rotating(SIGLIP_NAMES, CLIP_NAMES),
        {"minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLVisionEncoderLayer": "minimax_m3_vl minimax_m3_vl_vision"},
    ),
    (
        replace(QWEN2_VL, names=(INKLING2_NAMES,), attention="rope-vision-interleaved"),
        {"inkling2.modeling_inkling2.Inkling2VisionEncoderLayer": "inkling2 inkling2_vision"},
    ),
    # Layers of convolutions stand between those of attention.
    (
        replace(
            QWEN2_VL,
            names=(LFM3_NAMES,),
            requires={"is_attention_layer": True},
            ignores=("max_seqlen", "grid_thw"),
        ),
        {"lfm3_vl.modeling_lfm3_vl.Lfm3VlVisionLayer": "lfm3_vl lfm3_vl_vision"},
    ),
    (
        _plain(replace(QWEN2_VL_NAMES, activation="mlp.activation_fn")),
        {"glm_image.modeling_glm_image.GlmImageVisionBlock": "glm_image glm_image_vision"},
    ),
    (
        _plain(CLIP_NAMES),
        {"cosmos3_edge.modeling_cosmos3_edge.Cosmos3EdgeVisionEncoderLayer": "cosmos3_edge cosmos3_edge_vision"},
    ),
    (
        _plain(SIGLIP_NAMES),
        {
            "minicpm_ocr.modeling_minicpm_ocr.MiniCPMOcrVisionEncoderLayer": "minicpm_ocr minicpm_ocr_vision",
            "minicpmv4_6.modeling_minicpmv4_6.MiniCPMV4_6VisionEncoderLayer": "minicpmv4_6 minicpmv4_6_vision",
            "minicpmv4_7.modeling_minicpmv4_7.MiniCPMV4_7VisionEncoderLayer": "minicpmv4_7 minicpmv4_7_vision",
        },
    ),
    (
        _plain(replace(SIGLIP_NAMES, out="self_attn.o_proj")),
        {"hunyuan_vl.modeling_hunyuan_vl.HunYuanVLVisionBlock": "hunyuan_vl_vision"},
    ),
    (
        replace(_plain(BART_NAMES), clamp="always", extra_outputs=0),
        {
            "qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniAudioEncoderLayer": (
                "qwen2_5_omni qwen2_5_omni_thinker qwen2_5_omni_audio_encoder"
            ),
            "qwen3_asr.modeling_qwen3_asr.Qwen3ASRAudioEncoderLayer": "qwen3_asr qwen3_asr_encoder",
            "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeAudioEncoderLayer": (
                "qwen3_omni_moe_thinker qwen3_omni_moe_audio_encoder"
            ),
        },
    ),
]
