"""Pre-LN multi-head attention in vision models, beside those with the plain names of ViT, CLIP and DINOv2.

Most of these layers take no mask: images are not padded. Gated feed-forward blocks are those of "GLU Variants Improve
Transformer" (https://arxiv.org/abs/2002.05202).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..spec import Adapter, NameMap
from .pre_ln import CLIP_NAMES, DINOV2_NAMES, VIT_NAMES, with_gated

# ViT's names before transformers 5.
OLD_VIT_NAMES = NameMap(
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    out="attention.output.dense",
    norm1="layernorm_before",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    norm2="layernorm_after",
    heads="attention.attention.num_attention_heads",
    scaling="attention.attention.scaling",
)
OLD_VIT = Adapter("pre", (OLD_VIT_NAMES,), mask="")
OLD_VIT_MASKED = Adapter("pre", (OLD_VIT_NAMES,), extra_outputs=0)
# One feed-forward block, or a mixture whose expert is chosen for each image.
VITPOSE = replace(
    OLD_VIT,
    names=(
        replace(OLD_VIT_NAMES, up="mlp.fc1", activation="mlp.activation", down="mlp.fc2"),
        replace(OLD_VIT_NAMES, up="", activation="", down="", feed_forward="mlp"),
    ),
    chosen_by="dataset_index",
)

FUSED_CLIP_NAMES = replace(CLIP_NAMES, query="", key="", value="", qkv="self_attn.qkv", out="self_attn.projection")
FUSED_CLIP = Adapter("pre", (FUSED_CLIP_NAMES,), mask="")
# The text line recognisers of PaddleOCR: a mask may be given, and is not looked at.
PP_OCR = replace(
    FUSED_CLIP, names=(replace(FUSED_CLIP_NAMES, activation="mlp.activation"),), ignores=("attention_mask",)
)
MGP_STR = Adapter(
    "pre",
    (
        NameMap(
            qkv="attn.qkv",
            out="attn.proj",
            norm1="norm1",
            up="mlp.fc1",
            activation="mlp.act",
            down="mlp.fc2",
            norm2="norm2",
            heads="attn.num_heads",
            scaling="attn.scale",
        ),
    ),
    mask="",
    extra_outputs=1,
)

JANUS = Adapter("pre", (replace(CLIP_NAMES, out="self_attn.projection_layer"),))
MOLMO2 = Adapter(
    "pre",
    (
        replace(
            CLIP_NAMES, out="self_attn.o_proj", heads="", head_dim="self_attn.head_dim", scaling="self_attn.scaling"
        ),
    ),
)
VJEPA2_POOLER = Adapter("pre", (replace(CLIP_NAMES, activation="mlp.activation"),), extra_outputs=1)

INTERNVL_NAMES = replace(
    VIT_NAMES,
    out="attention.projection_layer",
    heads="attention.num_heads",
    scaling="attention.scale",
    scale1="lambda_1",
    scale2="lambda_2",
    query_norm="attention.q_norm",
    key_norm="attention.k_norm",
)
INTERNVL = Adapter("pre", (INTERNVL_NAMES,), mask="")

AIMV2 = Adapter(
    "pre",
    (
        NameMap(
            query="attention.q_proj",
            key="attention.k_proj",
            value="attention.v_proj",
            out="attention.out_proj",
            norm1="rms_norm1",
            gate="ffn.gate_proj",
            up="ffn.up_proj",
            activation="ffn.act_fn",
            down="ffn.down_proj",
            norm2="rms_norm2",
            heads="attention.num_heads",
            scaling="attention.scale",
        ),
    ),
)
PIX2STRUCT_NAMES = NameMap(
    query="attention.query",
    key="attention.key",
    value="attention.value",
    out="attention.output",
    norm1="pre_attention_layer_norm",
    gate="mlp.wi_0",
    up="mlp.wi_1",
    activation="mlp.act",
    down="mlp.wo",
    norm2="pre_mlp_layer_norm",
    heads="attention.n_heads",
    scaling="attention.scaling",
)
KOSMOS2_5 = Adapter("pre", (PIX2STRUCT_NAMES,))
PIX2STRUCT = Adapter("pre", (PIX2STRUCT_NAMES,), extra_outputs=1)

# Queries join the tokens between two layers: each layer is given what the loop has made.
EOMT_NAMES = replace(DINOV2_NAMES, out="attention.out_proj", heads="attention.num_heads", scaling="attention.scale")
EOMT = Adapter(
    "pre", with_gated(EOMT_NAMES, replace(EOMT_NAMES, activation="mlp.activation")), keeps_hidden_states=True
)

MULTIHEAD_NAMES = NameMap(
    qkv="self_attn.in_proj_weight",
    out="self_attn.out_proj",
    norm1="layer_norm1",
    up="mlp.fc1",
    activation="mlp.activation_fn",
    down="mlp.fc2",
    norm2="layer_norm2",
    heads="self_attn.num_heads",
)


def _multihead(path: str) -> dict[str, Any]:
    """What an `nn.MultiheadAttention` at `path` must be like."""
    return {f"{path}.batch_first": False, f"{path}.add_zero_attn": False, f"{path}.bias_k": None}


ONEFORMER_TEXT = Adapter(
    "pre",
    (MULTIHEAD_NAMES,),
    mask="key_padding_mask",
    mask_marks="padding",
    time_major=True,
    requires=_multihead("self_attn"),
)
BRIDGETOWER = Adapter(
    "pre",
    (
        NameMap(
            qkv="attn.in_proj_weight",
            out="attn.out_proj",
            norm1="ln_1",
            up="mlp.c_fc",
            activation="mlp.gelu",
            down="mlp.c_proj",
            norm2="ln_2",
            heads="attn.num_heads",
        ),
    ),
    mask_marks="padding",
    time_major=True,
    requires={**_multihead("attn"), "attn_mask": None},
    keeps_hidden_states=True,
)

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (
        OLD_VIT,
        {
            "videomae.modeling_videomae.VideoMAELayer": "videomae",
            "dpt.modeling_dpt.DPTViTLayer": "dpt",
            "mobilevit.modeling_mobilevit.MobileViTTransformerLayer": "mobilevit",
        },
    ),
    # Positions may be added once more behind every layer.
    (replace(OLD_VIT, works_between="interpolation"), {"yolos.modeling_yolos.YolosLayer": "yolos"}),
    (
        OLD_VIT_MASKED,
        {
            "flava.modeling_flava.FlavaLayer": "flava flava_image_model flava_multimodal_model flava_text_model",
            "vilt.modeling_vilt.ViltLayer": "vilt",
        },
    ),
    (VITPOSE, {"vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneLayer": "vitpose vitpose_backbone"}),
    (
        FUSED_CLIP,
        {
            "blip.modeling_blip.BlipEncoderLayer": "blip blip_vision_model",
            "blip_2.modeling_blip_2.Blip2EncoderLayer": "blip-2 blip_2_vision_model",
            "instructblip.modeling_instructblip.InstructBlipEncoderLayer": "instructblip instructblip_vision_model",
            "instructblipvideo.modeling_instructblipvideo.InstructBlipVideoEncoderLayer": (
                "instructblipvideo instructblipvideo_vision_model"
            ),
        },
    ),
    (
        PP_OCR,
        {
            "pp_ocrv5_mobile_rec.modeling_pp_ocrv5_mobile_rec.PPOCRV5MobileRecBlock": "pp_ocrv5_mobile_rec",
            "pp_ocrv5_server_rec.modeling_pp_ocrv5_server_rec.PPOCRV5ServerRecBlock": "pp_ocrv5_server_rec",
            "pp_ocrv6_small_rec.modeling_pp_ocrv6_small_rec.PPOCRV6SmallRecBlock": "pp_ocrv6_small_rec",
        },
    ),
    (MGP_STR, {"mgp_str.modeling_mgp_str.MgpstrLayer": "mgp-str"}),
    (JANUS, {"janus.modeling_janus.JanusVisionEncoderLayer": "janus janus_vision_model"}),
    (MOLMO2, {"molmo2.modeling_molmo2.Molmo2VisionEncoderLayer": "molmo2 molmo2_vision"}),
    (VJEPA2_POOLER, {"vjepa2.modeling_vjepa2.VJEPA2PoolerSelfAttentionLayer": "vjepa2"}),
    (
        INTERNVL,
        {
            "internvl.modeling_internvl.InternVLVisionLayer": "internvl internvl_vision",
            "qianfan_ocr.modeling_qianfan_ocr.QianfanOCRVisionLayer": "qianfan_ocr qianfan_ocr_vision",
        },
    ),
    (
        AIMV2,
        {
            "aimv2.modeling_aimv2.Aimv2EncoderLayer": "aimv2 aimv2_text_model aimv2_vision_model",
            "ovis2.modeling_ovis2.Ovis2VisionEncoderLayer": "ovis2 ovis2_vision",
        },
    ),
    (KOSMOS2_5, {"kosmos2_5.modeling_kosmos2_5.Kosmos2_5VisionLayer": "kosmos-2.5 kosmos_2_5_vision_model"}),
    (PIX2STRUCT, {"pix2struct.modeling_pix2struct.Pix2StructVisionLayer": "pix2struct pix2struct_vision_model"}),
    (
        EOMT,
        {
            "eomt.modeling_eomt.EomtLayer": "eomt",
            "videomt.modeling_videomt.VideomtLayer": "videomt",
        },
    ),
    (ONEFORMER_TEXT, {"oneformer.modeling_oneformer.OneFormerTextTransformerLayer": "oneformer"}),
    (
        BRIDGETOWER,
        {"bridgetower.modeling_bridgetower.BridgeTowerResidualAttention": "bridgetower bridgetower_vision_model"},
    ),
]
