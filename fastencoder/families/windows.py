"""Vision transformers whose attention stays inside windows: Swin's line, and the line of ViTDet and SAM.

Swin (https://arxiv.org/abs/2103.14030), SwinV2 (https://arxiv.org/abs/2111.09883), ViTDet (https://arxiv.org/abs/2203.16527),
Segment Anything (https://arxiv.org/abs/2304.02643).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..spec import Adapter, NameMap
from .pre_ln import VIT_NAMES

# Only Swin itself has the names of ViT's layers.
_BIAS = "attention.relative_position_bias"
SWIN = Adapter(
    "pre",
    (VIT_NAMES,),
    attention="shifted-windows",
    options={"bias": _BIAS},
    extra_parameters=(_BIAS,),
    extra_outputs=1,
    label="shifted windows",
)
OLD_SWIN_NAMES = NameMap(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    norm1="layernorm_before",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    norm2="layernorm_after",
    heads="attention.self.num_attention_heads",
)
_POSITIONS = ("attention.self.relative_position_bias_table", "attention.self.relative_position_index")
OLD_SWIN = replace(
    SWIN, names=(OLD_SWIN_NAMES,), options={"bias": "attention.self"}, extra_parameters=_POSITIONS, extra_outputs=0
)
_MADE_POSITIONS = ("logit_scale", "continuous_position_bias_mlp", "relative_coords_table", "relative_position_index")
SWIN_V2 = replace(
    OLD_SWIN,
    norm_placement="residual",
    attention="cosine-windows",
    extra_parameters=tuple(f"attention.self.{name}" for name in _MADE_POSITIONS),
)

SAM_NAMES = NameMap(
    qkv="attn.qkv",
    out="attn.proj",
    norm1="layer_norm1",
    up="mlp.lin1",
    activation="mlp.act",
    down="mlp.lin2",
    norm2="layer_norm2",
    heads="attn.num_attention_heads",
    scaling="attn.scale",
)


def _sam_program(layer: Any) -> Adapter:
    """The attention class for torch's fused function leaves the scale to that function."""
    return SAM_FUSED if type(layer.attn).__name__.endswith("SdpaAttention") else SAM_EAGER


SAM_EAGER = Adapter(
    "pre",
    (SAM_NAMES,),
    attention="decomposed-windows",
    grid="channels last",
    extra_parameters=("attn.rel_pos_h", "attn.rel_pos_w"),
    keeps_hidden_states=True,
    label="windows, decomposed",
)
SAM_FUSED = replace(SAM_EAGER, names=(replace(SAM_NAMES, scaling=None),))
SAM = replace(SAM_EAGER, choose=_sam_program)

VITDET_NAMES = replace(
    SAM_NAMES,
    qkv="attention.qkv",
    out="attention.proj",
    norm1="norm1",
    up="mlp.fc1",
    down="mlp.fc2",
    norm2="norm2",
    heads="attention.num_heads",
    scaling="attention.scale",
)
VITDET = replace(
    SAM_EAGER,
    names=(VITDET_NAMES,),
    grid="channels first",
    extra_parameters=("attention.rel_pos_h", "attention.rel_pos_w"),
    extra_outputs=0,
    requires={"use_residual_block": False},
)
SEGGPT_NAMES = replace(
    SAM_NAMES,
    qkv="attention.qkv",
    out="attention.proj",
    norm1="layernorm_before",
    norm2="layernorm_after",
    heads="attention.num_attention_heads",
    scaling="attention.scale",
)
# With feature_ensemble the prompts' outputs are averaged inside the layer: such a call is delegated.
SEGGPT = replace(
    VITDET, names=(SEGGPT_NAMES,), grid="channels last", extra_outputs=1, requires={}, ignores=("ensemble_cond",)
)

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (SWIN, {"swin.modeling_swin.SwinLayer": "swin grounding-dino mask2former mm-grounding-dino oneformer"}),
    (
        OLD_SWIN,
        {
            "donut.modeling_donut_swin.DonutSwinLayer": "donut-swin",
            "clap.modeling_clap.ClapAudioLayer": "clap clap_audio_model",
            "maskformer.modeling_maskformer_swin.MaskFormerSwinLayer": "maskformer maskformer-swin",
        },
    ),
    (
        SWIN_V2,
        {
            "swinv2.modeling_swinv2.Swinv2Layer": "swinv2",
            "swin2sr.modeling_swin2sr.Swin2SRLayer": "swin2sr",
        },
    ),
    (
        SAM,
        {
            "sam.modeling_sam.SamVisionLayer": "sam sam_vision_model deepseek_vl_hybrid",
            "sam_hq.modeling_sam_hq.SamHQVisionLayer": "sam_hq sam_hq_vision_model",
            "got_ocr2.modeling_got_ocr2.GotOcr2VisionLayer": "got_ocr2 got_ocr2_vision",
            "slanext.modeling_slanext.SLANeXtVisionLayer": "slanext slanext_vision",
            "pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionLayer": "pp_formulanet pp_formulanet_vision",
            "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionLayer": (
                "deepseek_ocr2_vision deepseek_ocr2_sam_vision_model"
            ),
            "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionLayer": (
                "unlimited_ocr unlimited_ocr_vision unlimited_ocr_sam_vision_model"
            ),
        },
    ),
    (VITDET, {"vitdet.modeling_vitdet.VitDetLayer": "vitdet"}),
    (SEGGPT, {"seggpt.modeling_seggpt.SegGptLayer": "seggpt"}),
]
