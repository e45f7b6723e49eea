"""Rows of the pre-LN family in vision models: the old names of ViT, fused projections, RMS norms, windows, additive masks."""

from __future__ import annotations

from typing import Any

from .batches import EMPTY, FULL, HOLES, LEFT, RIGHT, SINGLE
from .case import DELEGATES, Case, merge
from .cases_post_ln import TEXT
from .cases_pre_ln import DINO, VISION


def image(package: str, layer: str, model: str, stack: str = "encoder.layer", **other: Any) -> Case:
    config = merge(VISION, other.pop("config", {}))
    return Case(package, layer, model, stack, other.pop("inputs", "image"), "pre", config, **other)


def encoder(package: str, layer: str, model: str, stack: str, config: dict[str, Any], **other: Any) -> Case:
    """An encoder without the rest of its model: hidden states go in."""
    options = {"width": config.get("hidden_size", 48), **other.pop("options", {})}
    return Case(package, layer, model, stack, other.pop("inputs", "hidden"), "pre", config, options=options, **other)


def segmentation(package: str, layer: str, model: str, **other: Any) -> Case:
    """Queries join the tokens before the last block. Its `attn_mask_probs` are 0 here: above that, the last layers get
    a mask for each head, and run the stock forward. They begin at 1 and come with a checkpoint."""
    config = {**DINO, "num_blocks": 1, "num_queries": 3, "num_register_tokens": 1, "num_upscale_blocks": 1}
    config = merge(config, other.pop("config", {}))
    options = {"buffers": {"attn_mask_probs": 0.0}}
    inputs = other.pop("inputs", "image")
    return Case(package, layer, model, "layers", inputs, "pre", config, options=options, more_after=True, **other)


def paddle(package: str, layer: str, config_class: str) -> Case:
    config = {"hidden_size": 48, "num_attention_heads": 3, "depth": 2}
    return encoder(
        package,
        layer,
        "hosts.RecognitionBlocks",
        "svtr_block",
        config,
        config_class=config_class,
        options={"masked": False},
    )


VITPOSE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2}
BLIP = {"stack": "encoder.layers"}
INTERNVL = {"image_size": [16, 16], "patch_size": [4, 4], "attention_bias": True}
PIX2STRUCT = {
    "hidden_size": 48,
    "patch_embed_hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "seq_len": 16,
    "d_kv": 18,
    "d_ff": 80,
}
KOSMOS = {**PIX2STRUCT, "intermediate_size": 80, "head_dim": 24, "seq_len": None, "d_kv": None, "d_ff": None}
LW_DETR = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "num_windows": 4,
    "window_block_indices": [0, 2],
}
RF_DETR = {**DINO, "num_hidden_layers": 3, "num_windows": 2, "out_indices": [2, 3]}

CASES: list[Case] = [
    image(
        "videomae",
        "VideoMAELayer",
        "VideoMAEModel",
        inputs="video",
        config={"num_frames": 4, "tubelet_size": 2, "patch_size": 8},
    ),
    image("yolos", "YolosLayer", "YolosModel", config={"image_size": [16, 16], "num_detection_tokens": 3}),
    image(
        "dpt",
        "DPTViTLayer",
        "DPTModel",
        config={"backbone_out_indices": [0, 1], "neck_hidden_sizes": [8, 8], "reassemble_factors": [1, 1]},
    ),
    encoder(
        "mobilevit",
        "MobileViTTransformerLayer",
        "hosts.MobileViTTransformer",
        "encoder.layer",
        {"hidden_sizes": [48, 60, 72], "num_attention_heads": 3},
        config_class="MobileViTConfig",
        options={"masked": False},
        eager_only=True,
    ),
    encoder(
        "vitpose_backbone",
        "VitPoseBackboneLayer",
        "VitPoseBackboneEncoder",
        "layer",
        VITPOSE,
        config_class="VitPoseBackboneConfig",
        options={"masked": False},
    ),
    encoder(
        "vitpose_backbone",
        "VitPoseBackboneLayer",
        "VitPoseBackboneEncoder",
        "layer",
        {**VITPOSE, "num_experts": 2, "part_features": 36},
        config_class="VitPoseBackboneConfig",
        options={"masked": False, "dataset_index": True},
        tag="experts",
    ),
    Case("flava", "FlavaLayer", "FlavaTextModel", "encoder.layer", "text", "pre", TEXT, tag="text", eager_only=True),
    image("flava", "FlavaLayer", "FlavaImageModel", eager_only=True),
    encoder(
        "vilt",
        "ViltLayer",
        "hosts.MaskedEncoder",
        "encoder.layer",
        {key: value for key, value in VISION.items() if key not in ("image_size", "patch_size")},
        config_class="ViltConfig",
        eager_only=True,
    ),
    image("blip", "BlipEncoderLayer", "BlipVisionModel", eager_only=True, **BLIP),
    image("blip_2", "Blip2EncoderLayer", "Blip2VisionModel", **BLIP),
    image("instructblip", "InstructBlipEncoderLayer", "InstructBlipVisionModel", **BLIP),
    image("instructblipvideo", "InstructBlipVideoEncoderLayer", "InstructBlipVideoVisionModel", **BLIP),
    paddle("pp_ocrv5_mobile_rec", "PPOCRV5MobileRecBlock", "PPOCRV5MobileRecConfig"),
    paddle("pp_ocrv5_server_rec", "PPOCRV5ServerRecBlock", "PPOCRV5ServerRecConfig"),
    paddle("pp_ocrv6_small_rec", "PPOCRV6SmallRecBlock", "PPOCRV6SmallRecConfig"),
    image(
        "mgp_str",
        "MgpstrLayer",
        "MgpstrModel",
        stack="encoder.blocks",
        config={"image_size": [16, 16], "mlp_ratio": 2, "intermediate_size": None, "max_token_length": 5},
        eager_only=True,
    ),
    image(
        "janus",
        "JanusVisionEncoderLayer",
        "JanusVisionModel",
        stack="encoder.layers",
        config={"mlp_ratio": 2, "intermediate_size": None},
    ),
    image(
        "molmo2",
        "Molmo2VisionEncoderLayer",
        "Molmo2VisionModel",
        stack="layers",
        inputs="patch_rows",
        config={"image_size": [16, 16], "head_dim": 16, "num_key_value_heads": 3, "num_position_embeddings": 16},
    ),
    encoder(
        "vjepa2",
        "VJEPA2PoolerSelfAttentionLayer",
        "hosts.AttentivePooler",
        "pooler.self_attention_layers",
        {"hidden_size": 60, "num_attention_heads": 4, "num_pooler_layers": 2},
        config_class="VJEPA2Config",
        options={"masked": False},
        more_after=True,
    ),
    image("internvl", "InternVLVisionLayer", "InternVLVisionModel", config=INTERNVL),
    image(
        "internvl",
        "InternVLVisionLayer",
        "InternVLVisionModel",
        tag="qk_norm",
        config={**INTERNVL, "use_qk_norm": True, "norm_type": "rms_norm"},
    ),
    image("qianfan_ocr", "QianfanOCRVisionLayer", "QianfanOCRVisionModel", stack="layers", config=INTERNVL),
    image(
        "qianfan_ocr",
        "QianfanOCRVisionLayer",
        "QianfanOCRVisionModel",
        tag="qk_norm",
        stack="layers",
        config={**INTERNVL, "use_qk_norm": True},
    ),
    image("aimv2", "Aimv2EncoderLayer", "Aimv2VisionModel", stack="encoder.layers", config={"use_head": False}),
    Case(
        "aimv2",
        "Aimv2EncoderLayer",
        "Aimv2TextModel",
        "encoder.layers",
        "text",
        "pre",
        {**TEXT, "eos_token_id": 2},
        tag="text",
        config_class="Aimv2TextConfig",
        # Where no mask is made, the stock tower is not causal: it says is_causal=False.
        patterns=(RIGHT, LEFT, HOLES, EMPTY, SINGLE, FULL),
        expect=DELEGATES,
        why="the text tower passes a causal mask",
    ),
    image(
        "ovis2",
        "Ovis2VisionEncoderLayer",
        "Ovis2VisionModel",
        stack="transformer.encoder.layers",
        config={"vocab_size": 20, "num_visual_indicator_tokens": 2, "hidden_stride": 1},
        more_after=True,
    ),
    Case(
        "kosmos2_5",
        "Kosmos2_5VisionLayer",
        "Kosmos2_5VisionModel",
        "encoder.layer",
        "flat_patches",
        "pre",
        merge(KOSMOS),
        options={"pixels": 12},
    ),
    Case(
        "pix2struct",
        "Pix2StructVisionLayer",
        "Pix2StructVisionModel",
        "encoder.layer",
        "flat_patches",
        "pre",
        PIX2STRUCT,
        options={"pixels": 12},
    ),
    segmentation("eomt", "EomtLayer", "EomtForUniversalSegmentation"),
    segmentation("eomt", "EomtLayer", "EomtForUniversalSegmentation", tag="swiglu", config={"use_swiglu_ffn": True}),
    segmentation("videomt", "VideomtLayer", "VideomtForUniversalSegmentation", inputs="frames"),
    encoder(
        "lw_detr",
        "LwDetrViTLayer",
        "LwDetrViTEncoder",
        "layer",
        LW_DETR,
        config_class="LwDetrViTConfig",
        inputs="windows",
        options={"windows": 4},
    ),
    encoder(
        "rf_detr",
        "RfDetrDinov2Layer",
        "RfDetrDinov2Encoder",
        "layer",
        RF_DETR,
        config_class="RfDetrDinov2Config",
        inputs="windows",
        options={"windows": 4},
    ),
    encoder(
        "rf_detr",
        "RfDetrDinov2Layer",
        "RfDetrDinov2Encoder",
        "layer",
        {**RF_DETR, "use_swiglu_ffn": True},
        config_class="RfDetrDinov2Config",
        inputs="windows",
        options={"windows": 4},
        tag="swiglu",
    ),
    image(
        "mllama",
        "MllamaVisionEncoderLayer",
        "MllamaVisionModel",
        stack="transformer.layers|global_transformer.layers",
        inputs="tiles",
        config={
            "num_attention_heads": None,
            "attention_heads": 3,
            "num_global_layers": 1,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 2]],
            "vision_output_dim": 96,
        },
        outputs=("last_hidden_state", "not recorded", "not recorded"),
        more_after=True,
    ),
    encoder(
        "oneformer",
        "OneFormerTextTransformerLayer",
        "hosts.OneFormerText",
        "encoder.layers",
        {"text_encoder_width": 48, "text_encoder_num_layers": 2},
        config_class="OneFormerConfig",
        eager_only=True,
    ),
    encoder(
        "bridgetower",
        "BridgeTowerResidualAttention",
        "hosts.BridgeTowerVision",
        "encoder.resblocks",
        {"hidden_size": 128, "num_hidden_layers": 3},
        config_class="BridgeTowerVisionConfig",
        eager_only=True,
    ),
]
