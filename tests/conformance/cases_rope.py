"""Rows of the families with rotary position embedding, and of Gemma's encoders."""

from __future__ import annotations

from typing import Any

from transformers import ResNetConfig

from .case import REFUSED, Case, merge
from .cases_post_ln import TEXT, bert

# Rotation wants heads of an even size; twice three heads share keys and values where the class allows it.
LLAMA = {
    **TEXT,
    "hidden_size": 60,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "pad_token_id": 0,
}
LAYER_TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
WINDOWED = {"num_hidden_layers": 3, "layer_types": LAYER_TYPES[1:]}
SHORT = {"num_hidden_layers": 2, "layer_types": LAYER_TYPES[2:]}
ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 100.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}

DAC = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 2], "codebook_dim": 12, "hidden_size": 32}
# The towers that these models have by default are timm's.
RESNET = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=10)


def flat(package: str, layer: str, model: str, placement: str = "pre", **other: Any) -> Case:
    """The layers are the model's own, without an encoder module around them."""
    config = merge(LLAMA, other.pop("config", {}))
    stack = other.pop("stack", "layers")
    return Case(package, layer, model, stack, other.pop("inputs", "text"), placement, config, **other)


CASES: list[Case] = [
    bert("roformer", "RoFormerLayer", "RoFormerModel", eager_only=True),
    bert(
        "roformer",
        "RoFormerLayer",
        "RoFormerModel",
        tag="odd",
        config={"hidden_size": 50, "num_attention_heads": 5, "embedding_size": 21, "intermediate_size": 37},
        eager_only=True,
    ),
    bert(
        "roformer",
        "RoFormerLayer",
        "RoFormerModel",
        tag="rotary_value",
        config={"rotary_value": True},
        expect=REFUSED,
        why="values are turned as well",
        eager_only=True,
    ),
    flat("nomic_bert", "NomicBertLayer", "NomicBertModel", "post"),
    flat("gte", "GteLayer", "GteModel", "post"),
    flat("jina_embeddings_v3", "JinaEmbeddingsV3Layer", "JinaEmbeddingsV3Model", "post"),
    *(
        Case(
            "modernbert",
            "ModernBertEncoderLayer",
            "ModernBertModel",
            "layers",
            "text",
            "pre",
            merge(
                TEXT,
                {
                    "num_hidden_layers": 4,
                    "layer_types": types,
                    "local_attention": reach * 2,
                    "rope_parameters": ROPES,
                    "pad_token_id": 0,
                    "norm_bias": biases,
                    "attention_bias": biases,
                    "mlp_bias": biases,
                },
            ),
            tag=tag,
        )
        for tag, types, reach, biases in (
            ("", LAYER_TYPES, 2, False),
            ("biases", LAYER_TYPES[::-1], 1, True),
            ("sliding_first", LAYER_TYPES[1:] + LAYER_TYPES[1:2], 3, False),
            ("wide_window", LAYER_TYPES, 50, False),
        )
    ),
    *(
        bert(
            "esm",
            "EsmLayer",
            "EsmModel",
            tag=tag,
            placement="pre",
            config={"pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": kind, "token_dropout": True},
        )
        for tag, kind in (("", "rotary"), ("absolute", "absolute"))
    ),
    flat("eurobert", "EuroBertDecoderLayer", "EuroBertModel"),
    flat(
        "eurobert",
        "EuroBertDecoderLayer",
        "EuroBertModel",
        tag="biases",
        config={"attention_bias": True, "mlp_bias": True},
    ),
    flat(
        "ultrabert",
        "UltrabertDecoderLayer",
        "UltrabertModel",
        config={**WINDOWED, "sliding_window": 2, "rope_parameters": ROPES},
    ),
    bert(
        "evolla",
        "EvollaSaProtLayer",
        "EvollaSaProtProteinEncoder",
        placement="pre",
        config_class="SaProtConfig",
        config={"pad_token_id": 1, "mask_token_id": 4},
    ),
    flat("esmc", "EsmcLayer", "EsmcModel", config={"num_attention_heads": 6, "num_key_value_heads": 6}),
    flat("dia", "DiaEncoderLayer", "DiaEncoder", config_class="DiaEncoderConfig"),
    flat(
        "moonshine",
        "MoonshineEncoderLayer",
        "MoonshineEncoder",
        inputs="seconds",
        config={
            "hidden_size": 60,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": 6,
            "encoder_num_key_value_heads": 6,
            "decoder_num_attention_heads": 6,
            "decoder_num_key_value_heads": 6,
            "pad_head_dim_to_multiple_of": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.6},
        },
    ),
    flat("glmasr", "GlmAsrEncoderLayer", "GlmAsrEncoder", inputs="log_mel", config={"num_mel_bins": 8, "head_dim": 12}),
    *(
        flat(
            package,
            layer,
            model,
            inputs="stacked_frames",
            config={
                "num_key_value_heads": 6,
                "num_mel_bins": 8,
                "subsampling_factor": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.6},
            },
        )
        for package, layer, model in (
            ("nemotron3_diarization", "Nemotron3DiarizationAudioLayer", "Nemotron3DiarizationAudioModel"),
            ("nemotron3_5_transcribe", "Nemotron3_5TranscribeAsrAudioLayer", "Nemotron3_5TranscribeAsrAudioModel"),
        )
    ),
    flat(
        "dots3_note",
        "Dots3NoteAudioLayer",
        "Dots3NoteAudioModel",
        inputs="chunks",
        config={
            "num_key_value_heads": 6,
            "feature_size": 16,
            "downsample_hidden_size": 4,
            "conv_output_size": 8,
            "hop_length": 10,
            "samples_per_token": 80,
            "adapter_input_size": 60,
            "adapter_out_dim": 24,
        },
    ),
    flat(
        "pe_audio",
        "PeAudioEncoderLayer",
        "PeAudioEncoder",
        inputs="waves",
        config={"attention_bias": True, "dac_config": DAC},
        options={"quiet": ("embedder.data_proj", "patch_embedder.resnet_block.block2")},
    ),
    flat(
        "pe_video",
        "PeVideoEncoderLayer",
        "PeVideoEncoder",
        inputs="waves",
        config={"attention_bias": True, "vision_config": RESNET},
    ),
    flat(
        "pe_audio_video",
        "PeAudioVideoEncoderLayer",
        "PeAudioVideoEncoder",
        inputs="waves",
        config={
            "attention_bias": True,
            "audio_config": {**LLAMA, "num_hidden_layers": 0, "dac_config": DAC},
            "video_config": {**LLAMA, "num_hidden_layers": 0, "vision_config": RESNET},
        },
    ),
    flat(
        "t5gemma",
        "T5GemmaEncoderLayer",
        "T5GemmaEncoder",
        config_class="T5GemmaModuleConfig",
        config={
            **SHORT,
            "sliding_window": 2,
            "attn_logit_softcapping": 1.2,
            "query_pre_attn_scalar": 30,
            "attention_bias": True,
            "dropout_rate": 0.0,
            "attn_implementation": "eager",
        },
        options={"quiet": ("embed_tokens",)},
        eager_only=True,
        no_double="float64's minimum in the mask is -inf in the softmax, which is float32: NaN where a query sees no key",
    ),
    flat(
        "t5gemma2",
        "T5Gemma2EncoderLayer",
        "T5Gemma2TextEncoder",
        config={
            **SHORT,
            "sliding_window": 4,
            "query_pre_attn_scalar": 20,
            "attention_bias": True,
            "dropout_rate": 0.0,
            "rope_parameters": ROPES,
        },
        options={"quiet": ("embed_tokens",)},
    ),
    flat(
        "embedding_gemma2",
        "EmbeddingGemma2EncoderLayer",
        "EmbeddingGemma2TextModel",
        config={
            **SHORT,
            "sliding_window": 2,
            "rope_parameters": ROPES,
            "attention_bias": True,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 14,
            "embedding_dim": 22,
        },
        options={"quiet": ("embed_tokens",)},
    ),
    flat(
        "gemma4",
        "Gemma4VisionEncoderLayer",
        "Gemma4VisionModel",
        stack="encoder.layers",
        inputs="placed_patches",
        config={"head_dim": 20, "patch_size": 2, "pooling_kernel_size": 2, "position_embedding_size": 8},
        options={"quiet": ("patch_embedder",)},
    ),
]
