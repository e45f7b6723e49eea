"""Rows of the families whose attention scores have a bias: MPNet, T5 and its line."""

from __future__ import annotations

from typing import Any

from .case import Case, merge
from .cases_post_ln import SEQ2SEQ_OUTPUTS, TEXT

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
]
