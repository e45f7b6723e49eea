"""Rows of the families whose attention scores have a bias."""

from __future__ import annotations

from typing import Any

from .case import Case, merge
from .cases_post_ln import SEQ2SEQ_OUTPUTS, TEXT, WAV2VEC2

T5 = {
    "vocab_size": 60,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "feed_forward_proj": "relu",
}
GATED = {"feed_forward_proj": "gated-gelu"}


def t5(package: str, layer: str, model: str, stack: str = "encoder.block", **other: Any) -> Case:
    inputs = other.pop("inputs", "seq2seq")
    outputs = SEQ2SEQ_OUTPUTS if inputs == "seq2seq" else Case.outputs
    config = merge(T5, other.pop("config", {}))
    return Case(package, layer, model, stack, inputs, "pre", config, outputs=outputs, **other)


DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
# As in v3: 13 tokens reach logarithmic buckets, and distances that share the last one.
V3 = {"position_buckets": 6, "max_relative_positions": 10, "share_att_key": True, "norm_rel_ebd": "layer_norm"}


def deberta(package: str, layer: str, model: str, **other: Any) -> Case:
    config = merge(DEBERTA, other.pop("config", {}))
    return Case(package, layer, model, "encoder.layer", "text", "post", config, eager_only=True, **other)


def deberta_v2(**other: Any) -> Case:
    return deberta("deberta_v2", "DebertaV2Layer", "DebertaV2Model", **other)


BEIT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 16,
    "patch_size": 4,
    "use_relative_position_bias": True,
    "use_mean_pooling": False,
    "drop_path_rate": 0.0,
}
LAYOUT = merge(
    TEXT,
    {
        "coordinate_size": 8,
        "shape_size": 8,
        "max_2d_position_embeddings": 64,
        "visual_embed": False,
        "max_rel_pos": 12,
        "rel_pos_bins": 8,
        "max_rel_2d_pos": 40,
        "rel_2d_pos_bins": 16,
        "pad_token_id": 1,
    },
)


def beit(**other: Any) -> Case:
    return Case("beit", "BeitLayer", "BeitModel", "layers", "image", "pre", merge(BEIT, other.pop("config", {})), **other)


def data2vec(**other: Any) -> Case:
    config = merge(BEIT, other.pop("config", {}))
    names = ("data2vec", "Data2VecVisionLayer", "Data2VecVisionModel", "encoder.layer", "image", "pre")
    return Case(*names, config, module="modeling_data2vec_vision", **other)


def layout_encoder(package: str, layer: str, model: str, **other: Any) -> Case:
    """The encoder by itself: what is in front of it needs detectron2, or is a detector."""
    config = merge(LAYOUT, {"has_relative_attention_bias": True, "has_spatial_attention_bias": True}, other.pop("config", {}))
    other.setdefault("config_class", "LayoutLMv2Config")
    names = (package, layer, model, "layer", "layout", "post")
    return Case(*names, config, options={"page": 60}, eager_only=True, **other)


def layoutlmv2(**other: Any) -> Case:
    no_double = "the stock attention fills float32 scores with float64's minimum: an error"
    return layout_encoder("layoutlmv2", "LayoutLMv2Layer", "LayoutLMv2Encoder", no_double=no_double, **other)


# The gates of WavLM's bias are sigmoids, and its attention never reads its `scaling`.
SUBTLE = {"bar": 0.002, "unread": (".scaling",)}


def wavlm(layer: str, placement: str, **other: Any) -> Case:
    config = merge(WAV2VEC2, {"num_buckets": 16, "max_bucket_distance": 30}, other.pop("config", {}))
    names = ("wavlm", layer, "WavLMModel", "encoder.layers", "audio", placement)
    return Case(*names, config, eager_only=True, options=SUBTLE, **other)


CASES: list[Case] = [
    deberta_v2(config=V3),
    deberta_v2(config={"relative_attention": False, "pos_att_type": None}, tag="content_only"),
    deberta_v2(config={"pos_att_type": ["c2p"], "hidden_size": 45, "num_attention_heads": 5}, tag="c2p"),
    deberta_v2(config={**V3, "share_att_key": False, "pos_att_type": ["p2c"]}, tag="p2c"),
    deberta_v2(
        config={**V3, "share_att_key": False, "max_position_embeddings": 170},
        options={"size": 160},
        tag="own_projections",
    ),
    deberta_v2(config={**V3, "conv_kernel_size": 3, "conv_act": "gelu", "num_hidden_layers": 3}, tag="convolution"),
    deberta("deberta", "DebertaLayer", "DebertaModel"),
    deberta("deberta", "DebertaLayer", "DebertaModel", config={"max_relative_positions": 5}, tag="clamped"),
    deberta("deberta", "DebertaLayer", "DebertaModel", config={"relative_attention": False}, tag="content_only"),
    Case("mpnet", "MPNetLayer", "MPNetModel", "encoder.layer", "text", "post", TEXT, eager_only=True),
    Case(
        "mpnet",
        "MPNetLayer",
        "MPNetModel",
        "encoder.layer",
        "text",
        "post",
        merge(TEXT, {"hidden_size": 45, "num_attention_heads": 5, "max_position_embeddings": 170}),
        options={"size": 160},  # beyond the distances that have a bucket of their own
        tag="long",
        eager_only=True,
    ),
    t5("t5", "T5Block", "T5Model"),
    t5("t5", "T5Block", "T5EncoderModel", inputs="text", config={**GATED, "num_layers": 3}, tag="gated_encoder"),
    t5("t5", "T5Block", "T5EncoderModel", inputs="text", config={"d_kv": 20, "num_heads": 5}, tag="wide"),
    t5("mt5", "MT5Block", "MT5Model", config=GATED),
    t5("umt5", "UMT5Block", "UMT5Model", config=GATED),
    t5("pop2piano", "Pop2PianoBlock", "Pop2PianoStack", "block", inputs="text", config={**GATED, "use_cache": False}),
    t5(
        "udop",
        "UdopBlock",
        "UdopEncoderModel",
        inputs="text_with_boxes",
        config={
            "max_2d_position_embeddings": 64,
            "relative_attention_num_buckets": 32,  # the tables of words and boxes are one
            "relative_attention_max_distance": 128,
        },
    ),
    beit(),
    beit(config={"use_relative_position_bias": False, "use_shared_relative_position_bias": True}, tag="shared"),
    beit(config={"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0}, tag="both"),
    beit(config={"use_relative_position_bias": False}, tag="without"),
    data2vec(),
    data2vec(config={"use_relative_position_bias": False, "use_shared_relative_position_bias": True}, tag="shared"),
    data2vec(config={"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0}, tag="both"),
    wavlm("WavLMEncoderLayer", "post"),
    wavlm("WavLMEncoderLayerStableLayerNorm", "pre", config={"do_stable_layer_norm": True}),
    Case(
        "bros",
        "BrosLayer",
        "BrosModel",
        "encoder.layer",
        "text_with_boxes",
        "post",
        merge(TEXT, {"hidden_size": 64, "num_attention_heads": 2, "bbox_scale": 10.0}),
        eager_only=True,
    ),
    Case(
        "layoutlmv3",
        "LayoutLMv3Layer",
        "LayoutLMv3Model",
        "encoder.layer",
        "text_with_boxes",
        "post",
        LAYOUT,
        options={"page": 60},
        eager_only=True,
    ),
    Case(
        "layoutlmv3",
        "LayoutLMv3Layer",
        "LayoutLMv3Model",
        "encoder.layer",
        "text_with_boxes",
        "post",
        merge(LAYOUT, {"has_spatial_attention_bias": False}),
        options={"page": 60},
        eager_only=True,
        tag="order_only",
    ),
    Case(
        "speecht5",
        "SpeechT5EncoderLayer",
        "SpeechT5Encoder",
        "layers",
        "hidden_states",
        "post",
        {
            "hidden_size": 48,
            "encoder_layers": 2,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 80,
            "encoder_max_relative_position": 7,
        },
        eager_only=True,
    ),
    layoutlmv2(config={"fast_qkv": True}),
    layoutlmv2(config={"fast_qkv": False}, tag="separate"),
    layout_encoder(
        "pp_doclayout_v2",
        "PPDocLayoutV2ReadingOrderLayer",
        "PPDocLayoutV2ReadingOrderEncoder",
        config_class="PPDocLayoutV2ReadingOrderConfig",
        no_double="the stock model makes float32 positions for its projection of boxes",
    ),
    Case(
        "sew_d",
        "SEWDLayer",
        "SEWDModel",
        "encoder.encoder.layer",
        "audio",
        "post",
        merge(WAV2VEC2, {"squeeze_factor": 2, "position_buckets": 6, "max_position_embeddings": 10}),
        eager_only=True,
        more_after=True,
    ),
]
