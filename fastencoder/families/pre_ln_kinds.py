"""Pre-LN layers with another kind of attention: limits of the scores, windows, masks that are added as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..spec import Adapter
from .pre_ln import CLIP_NAMES, DINOV2_NAMES, DINOV2_NESTED_NAMES, VIT_NAMES, with_gated

VIDEOPRISM = Adapter("pre", (replace(VIT_NAMES, heads="", head_dim="attention.head_dim"),), attention="softcap")


def _windows_of_lw_detr(layer: Any) -> int:
    return 1 if layer.window else layer.num_windows


def _windows_of_rf_detr(layer: Any) -> int:
    return layer.num_windows**2 if layer.global_attention else 1


# Windows of one image lie one after the other in the batch. Some layers attend inside each window, others inside the image.
LW_DETR = Adapter(
    "pre",
    (
        replace(
            VIT_NAMES,
            up="intermediate.fc1",
            activation="intermediate.act",
            down="intermediate.fc2",
            scale1="gamma_1",
            scale2="gamma_2",
        ),
    ),
    mask="",
    attention="joined-windows",
    options={"windows": _windows_of_lw_detr},
)
RF_DETR = Adapter(
    "pre",
    with_gated(DINOV2_NAMES, DINOV2_NESTED_NAMES),
    attention="joined-windows",
    options={"windows": _windows_of_rf_detr},
)

# Tiles of an image attend to one another under an additive mask that is not one of padding: tokens see those that are not
# padding, and real tokens see everything.
MLLAMA_NAMES = replace(
    CLIP_NAMES,
    out="self_attn.o_proj",
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    scaling="self_attn.scaling",
)
MLLAMA = Adapter(
    "pre",
    (replace(MLLAMA_NAMES, scale1="gate_attn", scale2="gate_ffn"), MLLAMA_NAMES),
    mask="",
    attention="biased",
    scale_by_tanh=True,
    former_names={"hidden_state": "hidden_states"},  # until transformers 5.20
    keeps_hidden_states=True,
)

# transformers puts a window into the mask of each layer where it makes one. Flash attention is given no window.
MOONSHINE_STREAMING = Adapter(
    "pre",
    (
        replace(
            CLIP_NAMES,
            out="self_attn.o_proj",
            norm1="input_layernorm",
            norm2="post_attention_layernorm",
            heads="",
            head_dim="self_attn.head_dim",
            scaling="self_attn.scaling",
        ),
    ),
    attention="windowed",
    options={"window": "self_attn.sliding_window"},
)

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (
        VIDEOPRISM,
        {
            "videoprism.modeling_videoprism.VideoPrismLayer": (
                "videoprism videoprism_text_model videoprism_vision_model"
            )
        },
    ),
    (LW_DETR, {"lw_detr.modeling_lw_detr.LwDetrViTLayer": "lw_detr lw_detr_vit"}),
    (RF_DETR, {"rf_detr.modeling_rf_detr.RfDetrDinov2Layer": "rf_detr rf_detr_dinov2"}),
    (MLLAMA, {"mllama.modeling_mllama.MllamaVisionEncoderLayer": "mllama mllama_vision_model"}),
    (
        MOONSHINE_STREAMING,
        {
            "moonshine_streaming.modeling_moonshine_streaming.MoonshineStreamingEncoderLayer": (
                "moonshine_streaming moonshine_streaming_encoder"
            )
        },
    ),
]
