"""Rows of the vision (and sound) towers that pack images themselves, and of those that rotate by the positions of patches."""

from __future__ import annotations

from typing import Any

from .case import Case, merge

QWEN = {
    "depth": 2,
    "hidden_size": 48,
    "num_heads": 3,
    "intermediate_size": 80,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
GLM = {**QWEN, "image_size": 24}
TOWER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "patch_size": 4,
}
SOUND = {
    "d_model": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 80,
    "num_mel_bins": 8,
    "output_dim": 32,
}
CONVOLUTIONS = {"n_window": 50, "n_window_infer": 200, "downsample_hidden_size": 8}
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1], "depth": 3}  # windows of 4 by 4 patches, then whole images
POSITIONS = {"num_position_embeddings": 36}
DEEPSTACK = {**POSITIONS, "deepstack_visual_indexes": [0]}
MUSE = {
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "max_position_embeddings": 16,
    "num_hidden_layers": 3,
    "layer_types": ["window_attention", "full_attention", "window_attention"],
}
GROUPED = {"hidden_size": 64, "num_key_value_heads": 2}
STRIP = {"image_size": 24, "insert_layer_id": 0}
VJEPA2 = {
    "crop_size": 12,
    "frames_per_clip": 4,
    "mlp_ratio": 2,
    "num_attention_heads": 2,  # heads of 24: a third of a head is turned by each axis
    "pred_hidden_size": 40,
    "pred_mlp_ratio": 2,
    "pred_num_attention_heads": 2,  # heads of 20, of which 18 are turned
    "pred_num_hidden_layers": 2,
    "intermediate_size": None,
    "image_size": None,
}
NOT_RECORDED = ("last_hidden_state", "hidden_states", "no attentions")  # by the stock model
FLAT = {"cell": (48,)}
FRAMES = {"cell": (96,)}  # patches of two frames
STILL = {"frames": 1}


def qwen(package: str, layer: str, model: str, **other: Any) -> Case:
    config = merge(QWEN, other.pop("config", {}))
    options = {**FRAMES, **other.pop("options", {})}
    return Case(package, layer, model, "blocks", "patches", "pre", config, options=options, more_after=True, **other)


def tower(package: str, layer: str, model: str, stack: str = "layers", **other: Any) -> Case:
    config = merge(TOWER, other.pop("config", {}))
    options = {"cell": (3, 4, 4), "name": "pixel_values", **other.pop("options", {})}
    inputs = other.pop("inputs", "patches")
    return Case(package, layer, model, stack, inputs, "pre", config, options=options, more_after=True, **other)


def sound(package: str, layer: str, model: str, inputs: str, **other: Any) -> Case:
    config = merge(SOUND, other.pop("config", {}))
    return Case(package, layer, model, "layers", inputs, "pre", config, more_after=True, **other)


def vit(package: str, layer: str, model: str, stack: str, **other: Any) -> Case:
    config = merge(TOWER, {"image_size": 16}, other.pop("config", {}))
    inputs = other.pop("inputs", "image")
    return Case(package, layer, model, stack, inputs, "pre", config, more_after=True, **other)


PACKED: list[Case] = [
    qwen(
        "qwen2_vl",
        "Qwen2VLVisionBlock",
        "Qwen2VisionTransformerPretrainedModel",
        config={"embed_dim": 48, "mlp_ratio": 2, "intermediate_size": None, "out_hidden_size": None, "hidden_size": 32},
    ),
    qwen("qwen2_5_vl", "Qwen2_5_VLVisionBlock", "Qwen2_5_VisionTransformerPretrainedModel", config=WINDOWS),
    qwen("qwen2_5_omni", "Qwen2_5OmniVisionBlock", "Qwen2_5OmniVisionEncoder", config=WINDOWS),
    qwen("qwen3_vl", "Qwen3VLVisionBlock", "Qwen3VLVisionModel", config=DEEPSTACK),
    qwen("qwen3_vl_moe", "Qwen3VLMoeVisionBlock", "Qwen3VLMoeVisionModel", config=DEEPSTACK),
    qwen("qwen3_5", "Qwen3_5VisionBlock", "Qwen3_5VisionModel", config=POSITIONS),
    qwen("qwen3_5_moe", "Qwen3_5MoeVisionBlock", "Qwen3_5MoeVisionModel", config=POSITIONS),
    qwen("qwen3_omni_moe", "Qwen3OmniMoeVisionBlock", "Qwen3OmniMoeVisionEncoder", config=DEEPSTACK),
    qwen("qwen4_exp", "Qwen4ExpVisionBlock", "Qwen4ExpVisionModel", config=POSITIONS),
    qwen("cohere_compass", "CohereCompassVisionBlock", "CohereCompassVisionModel", config=DEEPSTACK),
    qwen(
        "exaone4_5",
        "Exaone4_5_VisionBlock",
        "Exaone4_5_VisionModel",
        config={**WINDOWS, **GROUPED, "num_heads": 4},
    ),
    qwen(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeVisionBlock",
        "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        config={"temporal_patch_size": None, "out_hidden_size": None},
        options=FLAT,
    ),
    qwen("glm4v", "Glm4vVisionBlock", "Glm4vVisionModel", config=GLM, options=STILL),
    qwen("glm4v_moe", "Glm4vMoeVisionBlock", "Glm4vMoeVisionModel", config=GLM, options=STILL),
    qwen("glm_ocr", "GlmOcrVisionBlock", "GlmOcrVisionModel", config=GLM),
    qwen("glm5_next", "Glm5NextVisionBlock", "Glm5NextVisionModel", config={**GLM, "swiglu_limit": 0.5}),
    qwen(
        "glm_image",
        "GlmImageVisionBlock",
        "GlmImageVisionModel",
        config={"temporal_patch_size": None, "out_hidden_size": None, "image_size": 24},
        options={**FLAT, **STILL, "name": "pixel_values"},
    ),
    tower(
        "kimi_k25",
        "Kimi_K25VisionEncoderLayer",
        "Kimi_K25VisionModel",
        config={"pos_emb_height": 6, "pos_emb_width": 6},
        options={"frames": 2},
    ),
    tower("muse_glimmer", "MuseGlimmerVisionEncoderLayer", "MuseGlimmerVisionModel", config=MUSE, options=FRAMES),
    tower("muse_spark", "MuseSparkVisionEncoderLayer", "MuseSparkVisionModel", config=MUSE, options=FRAMES),
    tower(
        "paddleocr_vl",
        "PaddleOCRVisionEncoderLayer",
        "PaddleOCRVisionModel",
        "vision_model.encoder.layers",
        config={"image_size": 24},
        options={"row": True},
    ),
    tower(
        "video_llama_3",
        "VideoLlama3VisionEncoderLayer",
        "VideoLlama3VisionModel",
        "encoder.layers",
        options={**FLAT, "merge_sizes": 2},
    ),
    tower(
        "minimax_m3_vl",
        "MiniMaxM3VLVisionEncoderLayer",
        "MiniMaxM3VLVisionModel",
        config={"temporal_patch_size": 2, "image_size": 24},
        options=FRAMES,
    ),
    tower(
        "inkling2",
        "Inkling2VisionEncoderLayer",
        "Inkling2VisionModel",
        options={"cell": (8, 8, 3), "grid": "image_grid_thw"},
        config={"posemb_grid_size": 6, "text_hidden_size": 32, "projection_hidden_dim": 40},
    ),
    tower(
        "lfm3_vl",
        "Lfm3VlVisionLayer",
        "Lfm3VlVisionModel",
        config={**GROUPED, "num_attention_heads": 4, "layer_types": ["full_attention", "full_attention"]},
        options=FRAMES,
    ),
    tower(
        "dots3_note",
        "Dots3NoteVisionBlock",
        "Dots3NoteVisionModel",
        "blocks",
        config={
            "pyramid_num_routed": [-1, 4],
            "moe_intermediate_size": 40,
            "num_local_experts": 4,
            "adapter_in_dim": 48,
            "adapter_out_dim": 32,
        },
        no_double="the product of its experts' weights has no fp64",
    ),
    tower(
        "cosmos3_edge",
        "Cosmos3EdgeVisionEncoderLayer",
        "Cosmos3EdgeVisionModel",
        "encoder.layers",
        config={"num_patches": 36},
        options=FLAT,
        outputs=NOT_RECORDED,
    ),
    tower(
        "hunyuan_vl",
        "HunYuanVLVisionBlock",
        "HunYuanVLVisionTransformer",
        config={"max_image_size": 24, "out_hidden_size": 32, "text_hidden_size": 32},
        options={**FLAT, **STILL},
        outputs=NOT_RECORDED,
    ),
    tower(
        "minicpm_ocr",
        "MiniCPMOcrVisionEncoderLayer",
        "MiniCPMOcrVisionModel",
        "encoder.layers",
        inputs="strip",
        config=STRIP,
        outputs=NOT_RECORDED,
    ),
    tower(
        "minicpmv4_6",
        "MiniCPMV4_6VisionEncoderLayer",
        "MiniCPMV4_6VisionModel",
        "encoder.layers",
        inputs="strip",
        config=STRIP,
        outputs=NOT_RECORDED,
    ),
    tower(
        "minicpmv4_7",
        "MiniCPMV4_7VisionEncoderLayer",
        "MiniCPMV4_7VisionModel",
        "encoder.layers",
        inputs="strip",
        config=STRIP,
        outputs=NOT_RECORDED,
    ),
    sound(
        "qwen2_5_omni",
        "Qwen2_5OmniAudioEncoderLayer",
        "Qwen2_5OmniAudioEncoder",
        "mel_chunks",
        config={"n_window": 8, "max_source_positions": 40},
    ),
    sound(
        "qwen3_omni_moe",
        "Qwen3OmniMoeAudioEncoderLayer",
        "Qwen3OmniMoeAudioEncoder",
        "mel_chunks",
        config={**CONVOLUTIONS, "max_source_positions": 40},
        options={"lengths": [230, 100, 57, 420]},
    ),
    sound(
        "qwen3_asr",
        "Qwen3ASRAudioEncoderLayer",
        "Qwen3ASREncoder",
        "mel_rows",
        config=CONVOLUTIONS,
    ),
]
ROTATING: list[Case] = [
    vit("dinov3_vit", "DINOv3ViTLayer", "DINOv3ViTModel", "model.layer", config={"num_register_tokens": 2}),
    vit(
        "dinov3_vit",
        "DINOv3ViTLayer",
        "DINOv3ViTModel",
        "model.layer",
        tag="gated",
        config={"use_gated_mlp": True, "hidden_act": "silu", "key_bias": True},
    ),
    vit("sapiens2", "Sapiens2Layer", "Sapiens2Model", "model.layer", config={"use_qk_norm": True}),
    vit(
        "sapiens2",
        "Sapiens2Layer",
        "Sapiens2Model",
        "model.layer",
        tag="grouped",
        config={
            "use_qk_norm": False,
            "use_gated_mlp": False,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads_per_layer": [2, 4],
        },
    ),
    vit("pixtral", "PixtralAttentionLayer", "PixtralVisionModel", "transformer.layers", inputs="image_sizes"),
    vit(
        "llama4",
        "Llama4VisionEncoderLayer",
        "Llama4VisionModel",
        "model.layers",
        config={"intermediate_size": 192, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
        options={"attentions": "after hidden states", "unread": (".scaling",)},
    ),
    vit(
        "eomt_dinov3",
        "EomtDinov3Layer",
        "EomtDinov3ForUniversalSegmentation",
        "layers",
        inputs="annealed",
        config={"num_hidden_layers": 3, "num_blocks": 1, "num_queries": 5, "num_register_tokens": 2},
    ),
    vit(
        "sam3",
        "Sam3ViTLayer",
        "Sam3ViTModel",
        "layers",
        # 7 by 7 patches in windows of 3, which are filled up; then all of the image
        config={"image_size": 28, "window_size": 3, "global_attn_indexes": [1], "pretrain_image_size": 16},
    ),
    vit("mlcd", "MLCDEncoderLayer", "MLCDVisionModel", "encoder.layers/vision_model.encoder.layers"),
    vit(
        "step3p7",
        "Step3p7VisionEncoderLayer",
        "Step3p7VisionModel",
        "layers",
        config={"max_position_embeddings": 16},
    ),
    vit("vjepa2", "VJEPA2Layer", "VJEPA2Model", "encoder.layer", inputs="clip", config=VJEPA2),
    vit(
        "vjepa2",
        "VJEPA2Layer",
        "VJEPA2Predictor",
        "layer",
        inputs="clip_tokens",
        config=VJEPA2,
        config_class="VJEPA2Config",
        tag="predictor",
    ),
]
CASES: list[Case] = [*PACKED, *ROTATING]
