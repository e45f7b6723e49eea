"""What a head needs beside the config and the inputs of its encoder's conformance row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import ResNetConfig, RTDetrResNetConfig

from .cases_detr import DETR as DETR_LAYERS
from .cases_detr import RT_DETR
from .cases_post_ln import TEXT, WAV2VEC2
from .cases_pre_ln import DINO, VISION
from .cases_pre_ln_vision import VITPOSE as VITPOSE_LAYERS
from .cases_vision import VJEPA2


@dataclass(frozen=True)
class Setup:
    """For a model class, or for all of a model type."""

    config: dict[str, Any] = field(default_factory=dict)  # beside the row's; all of it for a type without a row
    inputs: tuple[str, ...] = ()  # of heads_inputs.py, in place of the row's
    options: dict[str, Any] = field(default_factory=dict)  # for them
    delegates: str = ""  # why layers run their original forward: part of the reason that they give
    no_double: str = ""  # why the stock model cannot run in fp64; its fp32 form is the reference then
    quiet: tuple[str, ...] = ()  # modules whose output would drown what the layers add


TEXT_TOWER = {**TEXT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
TOWERS = {"text_config": TEXT_TOWER, "vision_config": VISION, "projection_dim": 20}
BOTH = ("text", "image")
CAUSAL = "causal"
READ = "what follows the layers reads"
BACKBONE = ResNetConfig(
    num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
)
STAGES = ResNetConfig(
    num_channels=3,
    embedding_size=8,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage1", "stage2", "stage3", "stage4"],
)
DINOV2 = {**DINO, "num_hidden_layers": 4}
VITPOSE = {
    **VITPOSE_LAYERS,
    "model_type": "vitpose_backbone",
    "image_size": [64, 32],
    "patch_size": [16, 16],  # its patches overlap by a padding that is written for this size
    "out_indices": [2],
}
DETR = {**DETR_LAYERS, "num_queries": 5, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
DETR["backbone_config"] = BACKBONE
IMAGES = {"size": (32, 48)}
MASKED_IMAGES = ("image", "pixel_mask")
IMAGE = ("image",)
LARGE = {"size": (64, 64)}
PYRAMID = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]}
VISION_LAYERS = {key: value for key, value in VISION.items() if key not in ("image_size", "patch_size")}
XVECTOR = {"tdnn_dim": (24, 24), "tdnn_kernel": (5, 3), "tdnn_dilation": (1, 2), "xvector_output_dim": 16}
SPEAKER = Setup(XVECTOR, inputs=("waves",), delegates=READ)
RT = {
    **RT_DETR,
    "backbone_config": RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    ),
    "encoder_in_channels": [16, 16, 16],
    "d_model": 48,
    "decoder_in_channels": [48, 48, 48],
    "decoder_layers": 1,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 80,
    "num_queries": 6,
}
GROUPS = {"depths": [1, 2, 1], "num_group_tokens": [6, 3, 0], "num_output_groups": [6, 3, 3]}
LM = "the head is of a language model, with an encoder of images or sound in front of it that has a row of its own"

SETUPS: dict[str, Setup] = {
    # two towers
    **{name: Setup(TOWERS, BOTH, delegates=CAUSAL) for name in ("clip", "metaclip_2")},
    **{f"{name}ForImageClassification": Setup(TOWERS, IMAGE) for name in ("CLIP", "MetaClip2", "Siglip")},
    **{name: Setup(TOWERS, BOTH) for name in ("altclip", "chinese_clip", "tipsv2")},
    **{name: Setup({**TOWERS, "projection_dim": 48}, BOTH, delegates=CAUSAL) for name in ("owlvit", "owlv2")},
    "siglip": Setup(TOWERS, BOTH, delegates=READ),
    "aimv2": Setup(TOWERS, BOTH, delegates="differs between queries"),
    "align": Setup(
        {
            "text_config": TEXT_TOWER,
            "projection_dim": 32,
            "vision_config": {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 32},
        },
        BOTH,
        {"size": (32, 32)},
    ),
    "blip": Setup(
        {
            "text_config": {**TEXT_TOWER, "encoder_hidden_size": 48, "projection_dim": 20},
            "vision_config": VISION,
            "projection_dim": 20,
            "image_text_hidden_size": 20,
        },
        BOTH,
    ),
    "clipseg": Setup(
        {**TOWERS, "extract_layers": [0, 1], "reduce_dim": 12, "decoder_num_attention_heads": 3},
        BOTH,
        delegates=CAUSAL,
    ),
    "flava": Setup(
        {
            "text_config": TEXT_TOWER,
            "image_config": VISION,
            "multimodal_config": VISION_LAYERS,
            "hidden_size": 48,
            "projection_dim": 20,
        },
        BOTH,
    ),
    "groupvit": Setup(
        {
            "text_config": TEXT_TOWER,
            "vision_config": {**VISION, **GROUPS},
            "projection_dim": 20,
            "projection_intermediate_dim": 30,
        },
        BOTH,
        delegates=CAUSAL,
    ),
    "ViltForQuestionAnswering": Setup({**VISION, "max_image_length": -1}, BOTH),
    # what reads padding behind the layers
    "RoFormerForMultipleChoice": Setup(delegates=READ),
    "CanineForMultipleChoice": Setup(delegates=READ),
    "SplinterForQuestionAnswering": Setup(no_double="its start and end logits are not finite in fp64"),
    "TapasForQuestionAnswering": Setup(delegates=READ),
    **{f"{name}ForXVector": SPEAKER for name in ("Data2VecAudio", "UniSpeechSat", "Wav2Vec2", "WavLM")},
    # sound
    "SpeechT5ForSpeechToText": Setup(
        {**WAV2VEC2, "vocab_size": 60, "decoder_layers": 1, "decoder_attention_heads": 3, "decoder_ffn_dim": 80},
        ("waves",),
    ),
    # images
    "VJEPA2ForVideoClassification": Setup({**VJEPA2, "patch_size": 4, "num_hidden_layers": 2}, ("clip",)),
    **{
        f"{name}ForMaskedImageModeling": Setup({"image_size": 32}, IMAGE, {"size": (32, 32)})
        for name in ("Swin", "Swinv2")
    },
    **{f"{name}ForSemanticSegmentation": Setup(PYRAMID) for name in ("Beit", "Data2VecVision")},
    **{
        f"MobileViTFor{head}": Setup({"image_size": 128}, IMAGE, {"size": (128, 128)})
        for head in ("ImageClassification", "SemanticSegmentation")
    },
    "depth_anything": Setup(
        {
            "backbone_config": {
                **DINOV2,
                "model_type": "dinov2",
                "out_indices": [1, 2, 3, 4],
                "reshape_hidden_states": False,
            },
            "patch_size": 4,
            "reassemble_hidden_size": 48,
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 12,
            "head_hidden_size": 8,
            "depth_estimation_type": "metric",  # the other kind ends in a ReLU, behind which nothing may be left
        },
        IMAGE,
    ),
    "vitpose": Setup({"backbone_config": VITPOSE, "num_labels": 5}, IMAGE, {"size": (64, 32)}),
    # detectors
    **{
        f"{name}ForObjectDetection": Setup(DETR, MASKED_IMAGES, IMAGES)
        for name in ("Detr", "ConditionalDetr", "TableTransformer")
    },
    "DabDetrForObjectDetection": Setup(
        {**DETR, "hidden_size": 48, "d_model": None},
        MASKED_IMAGES,
        IMAGES,
        no_double="the stock model makes float32 positions for its decoder",
    ),
    "DetrForSegmentation": Setup(
        {**DETR, "d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "backbone_config": STAGES},
        MASKED_IMAGES,
        {"size": (64, 96)},
    ),
    **{name: Setup(RT, IMAGE, LARGE) for name in ("rt_detr", "pp_doclayout_v4")},
    **{name: Setup({**RT, "decoder_layers": 2}, IMAGE, LARGE) for name in ("rt_detr_v2", "d_fine", "deimv2")},
}

# Model class or model type -> part of the error that keeps the stock model from running here.
NOT_RUN: dict[str, str] = {
    "layoutlmv2": "ImportError",  # detectron2 makes its images into tokens
}

# Why no tiny model was made -> model classes and model types.
_NOT_BUILT: dict[str, str] = {
    LM: (
        "audioflamingo3 glmasr granite_speech granite_speech_plus llama4 mllama modernvbert moss_transcribe_diarize "
        "qwen2_audio qwen3_5 qwen3_asr ultravbert voxtral blip-2 BlipForQuestionAnswering"
    ),
    "its encoder has a row of its own; the decoder behind it has a config that was not made small": (
        "dia moonshine_streaming t5gemma t5gemma2 nemotron3_diarization"
    ),
    "the layers that run are those of a conformer, at the level of attention: tests/test_attention_level.py": (
        "SeamlessM4TForSpeechToText SeamlessM4Tv2ForSpeechToText"
    ),
    "its encoder has a row of its own; of the detector or the depth decoder behind it no small config was made": (
        "chmv2 grounding-dino lw_detr mask2former maskformer mm-grounding-dino omdet-turbo pp_doclayout_v2 pp_doclayout_v3 "
        "rf_detr zoedepth "
        "OneFormerForUniversalSegmentation Sapiens2ForSemanticSegmentation Sapiens2ForPoseEstimation "
    ),
    "its towers have rows of their own; the model of both wants patches with masks, frames or spectrograms": (
        "siglip2 videoprism clap sam3 sam3_lite_text XCLIPModel"
    ),
}
NOT_BUILT: dict[str, str] = {name: why for why, names in _NOT_BUILT.items() for name in names.split()}
