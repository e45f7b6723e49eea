"""Vision transformers for images of one size whose attention turns queries and keys by the positions of patches. All pre-LN."""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter, NameMap
from .pre_ln import CLIP_NAMES, VIT_NAMES

DINOV3_NAMES = NameMap(
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    norm1="norm1",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    activation="mlp.act_fn",
    down="mlp.down_proj",
    norm2="norm2",
    heads="attention.num_heads",
    scaling="attention.scaling",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
)
LABEL = "pre-LN MHA with rotation by patch"
# The first map is that of config.use_gated_mlp.
DINOV3 = Adapter(
    "pre", (DINOV3_NAMES, replace(DINOV3_NAMES, gate="")), attention="rope-vision-prefix", label=LABEL
)
# Without config.use_qk_norm an Identity stands where a norm would.
_SAPIENS2_NAMES = replace(DINOV3_NAMES, scale2=None)
_SAPIENS2_NORMED_NAMES = replace(_SAPIENS2_NAMES, query_norm="attention.q_norm", key_norm="attention.k_norm")
SAPIENS2_NAMES = tuple(
    replace(names, gate=gate)
    for names in (_SAPIENS2_NORMED_NAMES, _SAPIENS2_NAMES)
    for gate in (DINOV3_NAMES.gate, "")
)
PIXTRAL_NAMES = replace(
    DINOV3_NAMES,
    norm1="attention_norm",
    gate="feed_forward.gate_proj",
    up="feed_forward.up_proj",
    activation="feed_forward.act_fn",
    down="feed_forward.down_proj",
    norm2="ffn_norm",
    scale1=None,
    scale2=None,
)
LLAMA4_NAMES = replace(
    CLIP_NAMES,
    out="self_attn.o_proj",
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    scaling=None,  # it has the attribute and leaves the factor to the attention function
)
STEP3_NAMES = replace(
    CLIP_NAMES, norm1="layernorm_before", norm2="layernorm_after", scale1="lambda_1", scale2="lambda_2"
)
SAM3_NAMES = replace(VIT_NAMES, norm1="layer_norm1", norm2="layer_norm2")
VJEPA2_NAMES = NameMap(
    query="attention.query",
    key="attention.key",
    value="attention.value",
    out="attention.proj",
    norm1="norm1",
    up="mlp.fc1",
    activation="mlp.activation",
    down="mlp.fc2",
    norm2="norm2",
    heads="attention.num_attention_heads",
    scaling="attention.scaling",
)

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (DINOV3, {"dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": "dinov3_vit chmv2"}),
    (
        replace(DINOV3, names=SAPIENS2_NAMES),
        {"sapiens2.modeling_sapiens2.Sapiens2Layer": "sapiens2"},
    ),
    # Its loop predicts masks between its last layers, and puts query tokens before them.
    (replace(DINOV3, keeps_hidden_states=True), {"eomt_dinov3.modeling_eomt_dinov3.EomtDinov3Layer": "eomt_dinov3"}),
    (
        Adapter("pre", (PIXTRAL_NAMES,), attention="rope-vision-blocks", label=LABEL),
        {"pixtral.modeling_pixtral.PixtralAttentionLayer": "pixtral mistral3 mistral_large4 lighton_ocr"},
    ),
    # It is given a mask and never reads it.
    (
        Adapter(
            "pre",
            (LLAMA4_NAMES,),
            mask="",
            ignores=("attention_mask",),
            attention="rope-complex",
            extra_outputs=0,
            label=LABEL,
        ),
        {"llama4.modeling_llama4.Llama4VisionEncoderLayer": "llama4 llama4_vision_model"},
    ),
    (
        Adapter("pre", (CLIP_NAMES,), attention="rope-vision", label=LABEL),
        {"mlcd.modeling_mlcd.MLCDEncoderLayer": "mlcd mlcd_vision_model"},
    ),
    (
        Adapter("pre", (STEP3_NAMES,), attention="rope-vision", label=LABEL),
        {"step3p7.modeling_step3p7.Step3p7VisionEncoderLayer": "step3p7 step3p5_vision"},
    ),
    (
        Adapter(
            "pre",
            (SAM3_NAMES,),
            grid="channels last",
            attention="rope-vision-windows",
            extra_parameters=("rotary_emb", "position_ids"),
            keeps_hidden_states=True,
            label=LABEL,
        ),
        {
            "sam3.modeling_sam3.Sam3ViTLayer": (
                "sam3 sam3_lite_text sam3_tracker sam3_tracker_video sam3_video sam3_vision_model sam3_vit_model"
            )
        },
    ),
    (
        Adapter("pre", (VJEPA2_NAMES,), attention="rope-vjepa", extra_outputs=1, label=LABEL),
        {"vjepa2.modeling_vjepa2.VJEPA2Layer": "vjepa2"},
    ),
]
