"""Rows of the pre-LN family: ViT names, DINOv2 names, CLIP names, BART names, wav2vec2 stable-LN names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .case import DELEGATES, Case, merge
from .cases_post_ln import ROBERTA, SEQ2SEQ, SEQ2SEQ_OUTPUTS, TEXT, WAV2VEC2, bert

VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 16,
    "patch_size": 4,
}
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
MEL = {
    "d_model": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 80,
    "num_mel_bins": 8,
    "max_source_positions": 12,
}
MEL_HIDDEN = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "num_mel_bins": 8,
    "max_source_positions": 12,
}
NESTED_VISION = "encoder.layers/vision_model.encoder.layers"
NESTED_TEXT = "encoder.layers/text_model.encoder.layers"
CAUSAL = "the text tower passes is_causal=True and a causal mask: each call runs the stock forward"

LAST = "its pooled output is the last position, also where that is padding: batches with padding run the stock forward"


def vit(package: str, layer: str, model: str, stack: str = "layers", **other: Any) -> Case:
    config = merge(VISION, other.pop("config", {}))
    return Case(package, layer, model, stack, other.pop("inputs", "image"), "pre", config, **other)


def dino(package: str, layer: str, model: str, stack: str = "encoder.layer", **other: Any) -> Case:
    config = merge(DINO, other.pop("config", {}))
    return Case(package, layer, model, stack, "image", "pre", config, **other)


def tower(package: str, layer: str, model: str, stack: str = "encoder.layers", **other: Any) -> Case:
    """A vision tower with CLIP's names."""
    config = merge(VISION, other.pop("config", {}))
    return Case(package, layer, model, stack, other.pop("inputs", "image"), "pre", config, **other)


def text_tower(package: str, layer: str, model: str, stack: str = "encoder.layers", **other: Any) -> Case:
    """A text tower with CLIP's names."""
    config = merge(TEXT, {"eos_token_id": 2}, other.pop("config", {}))
    return Case(package, layer, model, stack, "text", "pre", config, tag="text", **other)


def causal_tower(package: str, layer: str, model: str, **other: Any) -> Case:
    return text_tower(package, layer, model, expect=DELEGATES, why=CAUSAL, **other)


def bart(package: str, layer: str, model: str, **other: Any) -> Case:
    config = merge(SEQ2SEQ, other.pop("config", {}))
    return Case(package, layer, model, "encoder.layers", "seq2seq", "pre", config, outputs=SEQ2SEQ_OUTPUTS, **other)


def stable(package: str, layer: str, model: str) -> Case:
    config = {**WAV2VEC2, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    return Case(package, layer, model, "encoder.layers", "audio", "pre", config)


def pre_ln_bert(package: str, layer: str, model: str, **other: Any) -> Case:
    return replace(bert(package, layer, model, **other), placement="pre")


def seamless(package: str, layer: str, model: str) -> Case:
    config = {
        "vocab_size": 60,
        "hidden_size": 48,
        "encoder_layers": 2,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 80,
        "max_position_embeddings": 40,
        "encoder_layerdrop": 0.0,
        "scale_embedding": False,
    }
    return Case(package, layer, model, "layers", "text", "pre", config)


CASES: list[Case] = [
    vit("vit", "ViTLayer", "ViTModel"),
    vit(
        "vit", "ViTLayer", "ViTModel", tag="no_qkv_bias", config={"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"}
    ),
    vit("deit", "DeiTLayer", "DeiTModel"),
    vit(
        "audio_spectrogram_transformer",
        "ASTLayer",
        "ASTModel",
        inputs="spectrogram",
        config={"max_length": 16, "num_mel_bins": 12, "frequency_stride": 4, "time_stride": 4},
    ),
    vit("ijepa", "IJepaLayer", "IJepaModel"),
    vit("vit_mae", "ViTMAELayer", "ViTMAEModel", options={"noise": 16}, config={"mask_ratio": 0.5}),
    vit("vit_msn", "ViTMSNLayer", "ViTMSNModel"),
    vit(
        "vivit",
        "VivitLayer",
        "VivitModel",
        inputs="video",
        config={"num_frames": 4, "tubelet_size": [2, 8, 8], "patch_size": None},
    ),
    dino("pixio", "PixioLayer", "PixioModel", stack="layers", config={"n_cls_tokens": 2}),
    vit(
        "videoprism",
        "VideoPrismLayer",
        "VideoPrismVisionModel",
        stack="spatial_layers|temporal_layers",
        inputs="video",
        options={"name": "pixel_values_videos"},
        config={
            "num_frames": 4,
            "tubelet_size": [1, 8, 8],
            "num_spatial_layers": 2,
            "num_temporal_layers": 1,
            "num_auxiliary_layers": 1,
            "hidden_act": "gelu",
            "patch_size": None,
            "num_hidden_layers": None,
            "attn_logit_softcapping": 1.5,
        },
        eager_only=True,
    ),
    dino("dinov2", "Dinov2Layer", "Dinov2Model"),
    dino(
        "dinov2",
        "Dinov2Layer",
        "Dinov2Model",
        tag="swiglu",
        config={"use_swiglu_ffn": True},
    ),
    dino("dinov2_with_registers", "Dinov2WithRegistersLayer", "Dinov2WithRegistersModel"),
    dino(
        "radio",
        "RadioLayer",
        "RadioModel",
        config={"max_img_size": 32, "summary_idxs": [0, 1], "mlp_ratio": 2.0},
    ),
    dino("tipsv2", "Tipsv2VisionLayer", "Tipsv2VisionModel"),
    tower("clip", "CLIPEncoderLayer", "CLIPVisionModel"),
    causal_tower("clip", "CLIPEncoderLayer", "CLIPTextModel"),
    tower("siglip", "SiglipEncoderLayer", "SiglipVisionModel"),
    text_tower("siglip", "SiglipEncoderLayer", "SiglipTextModel", padding_delegates=True, why=LAST),
    tower(
        "siglip2",
        "Siglip2EncoderLayer",
        "Siglip2VisionModel",
        inputs="naflex",
        config={"num_patches": 16, "image_size": None},
    ),
    text_tower("siglip2", "Siglip2EncoderLayer", "Siglip2TextModel", padding_delegates=True, why=LAST),
    tower("altclip", "AltCLIPEncoderLayer", "AltCLIPVisionModel"),
    tower("chinese_clip", "ChineseCLIPVisionLayer", "ChineseCLIPVisionModel"),
    tower("clipseg", "CLIPSegEncoderLayer", "CLIPSegVisionModel"),
    causal_tower("clipseg", "CLIPSegEncoderLayer", "CLIPSegTextModel"),
    tower("metaclip_2", "MetaClip2EncoderLayer", "MetaClip2VisionModel"),
    causal_tower("metaclip_2", "MetaClip2EncoderLayer", "MetaClip2TextModel"),
    tower("owlvit", "OwlViTEncoderLayer", "OwlViTVisionModel", stack=NESTED_VISION),
    causal_tower("owlvit", "OwlViTEncoderLayer", "OwlViTTextModel", stack=NESTED_TEXT),
    tower("owlv2", "Owlv2EncoderLayer", "Owlv2VisionModel", stack=NESTED_VISION),
    causal_tower("owlv2", "Owlv2EncoderLayer", "Owlv2TextModel", stack=NESTED_TEXT),
    causal_tower("x_clip", "XCLIPEncoderLayer", "XCLIPTextModel"),
    causal_tower("groupvit", "GroupViTEncoderLayer", "GroupViTTextModel", stack=NESTED_TEXT, eager_only=True),
    tower(
        "groupvit",
        "GroupViTEncoderLayer",
        "GroupViTVisionModel",
        stack="vision_model.encoder.stages.0.layers|vision_model.encoder.stages.1.layers",
        config={"depths": [2, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 4]},
        options={"attentions": "not of the layers"},  # but of its grouping blocks
        eager_only=True,
    ),
    tower("kosmos2", "Kosmos2VisionEncoderLayer", "Kosmos2VisionModel", stack="encoder.layers/model.encoder.layers"),
    tower(
        "idefics",
        "IdeficsVisionEncoderLayer",
        "IdeficsVisionTransformer",
        module="vision",
        config_class="IdeficsVisionConfig",
        config={"embed_dim": 48, "hidden_size": None},
        eager_only=True,
    ),
    tower("idefics2", "Idefics2EncoderLayer", "Idefics2VisionTransformer", inputs="patch_grid"),
    tower("idefics3", "Idefics3EncoderLayer", "Idefics3VisionTransformer", inputs="patch_grid"),
    tower("smolvlm", "SmolVLMEncoderLayer", "SmolVLMVisionTransformer", inputs="patch_grid"),
    tower("git", "GitVisionEncoderLayer", "GitVisionModel", stack=NESTED_VISION, eager_only=True),
    tower(
        "granite_docling",
        "GraniteDoclingEncoderLayer",
        "GraniteDoclingVisionModel",
        config={"out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]},
    ),
    text_tower(
        "sam3_lite_text",
        "Sam3LiteTextTextEncoderLayer",
        "Sam3LiteTextTextModel",
        stack="layers",
        config={"use_repmixer_blocks": False, "projection_dim": 24},
    ),
    text_tower(
        "tipsv2",
        "Tipsv2TextEncoderLayer",
        "Tipsv2TextModel",
        config={"scale_sqrt_depth": False},
    ),
    tower(
        "unlimited_ocr",
        "UnlimitedOcrEncoderLayer",
        "UnlimitedOcrVisionEncoder",
        inputs="patch_embeds",
    ),
    pre_ln_bert("megatron_bert", "MegatronBertLayer", "MegatronBertModel", eager_only=True),
    pre_ln_bert("xlm_roberta_xl", "XLMRobertaXLLayer", "XLMRobertaXLModel", config=ROBERTA),
    pre_ln_bert("roberta_prelayernorm", "RobertaPreLayerNormLayer", "RobertaPreLayerNormModel", config=ROBERTA),
    seamless("seamless_m4t", "SeamlessM4TEncoderLayer", "SeamlessM4TEncoder"),
    seamless("seamless_m4t_v2", "SeamlessM4Tv2EncoderLayer", "SeamlessM4Tv2Encoder"),
    Case(
        "moonshine_streaming",
        "MoonshineStreamingEncoderLayer",
        "MoonshineStreamingEncoder",
        "layers",
        "streaming",
        "pre",
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "sample_rate": 1600,
            "sliding_windows": [[4, 2], [9, 0]],
        },
    ),
    bart("mbart", "MBartEncoderLayer", "MBartModel"),
    bart("m2m_100", "M2M100EncoderLayer", "M2M100Model", config={"scale_embedding": False}),
    bart("pegasus", "PegasusEncoderLayer", "PegasusModel"),
    bart("blenderbot", "BlenderbotEncoderLayer", "BlenderbotModel"),
    Case("whisper", "WhisperEncoderLayer", "WhisperEncoder", "layers", "mel", "pre", MEL),
    Case(
        "speech_to_text",
        "Speech2TextEncoderLayer",
        "Speech2TextEncoder",
        "layers",
        "filterbank",
        "pre",
        {
            "d_model": 48,
            "encoder_layers": 2,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 80,
            "conv_channels": 24,
            "input_feat_per_channel": 8,
            "num_conv_layers": 1,
            "conv_kernel_sizes": [5],
            "max_source_positions": 60,
        },
        eager_only=True,
    ),
    Case("qwen2_audio", "Qwen2AudioEncoderLayer", "Qwen2AudioEncoder", "layers", "mel", "pre", MEL),
    Case("voxtral", "VoxtralEncoderLayer", "VoxtralEncoder", "layers", "mel", "pre", MEL_HIDDEN),
    Case(
        "audioflamingo3",
        "AudioFlamingo3EncoderLayer",
        "AudioFlamingo3Encoder",
        "layers",
        "mel_masked",
        "pre",
        MEL_HIDDEN,
    ),
    Case(
        "moss_transcribe_diarize",
        "MossTranscribeDiarizeAudioLayer",
        "MossTranscribeDiarizeAudioModel",
        "layers",
        "mel",
        "pre",
        MEL_HIDDEN,
    ),
    stable("wav2vec2", "Wav2Vec2EncoderLayerStableLayerNorm", "Wav2Vec2Model"),
    stable("hubert", "HubertEncoderLayerStableLayerNorm", "HubertModel"),
    stable("unispeech", "UniSpeechEncoderLayerStableLayerNorm", "UniSpeechModel"),
    stable("unispeech_sat", "UniSpeechSatEncoderLayerStableLayerNorm", "UniSpeechSatModel"),
]
