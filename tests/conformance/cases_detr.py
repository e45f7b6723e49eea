"""Rows of detectors' encoders: DETR's line over flat feature maps, RT-DETR's line over one small map."""

from __future__ import annotations

from typing import Any

from .case import Case

DETR = {
    "d_model": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 80,
    "decoder_layers": 1,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 80,
    "activation_function": "gelu",
}
RT_DETR = {"encoder_hidden_dim": 48, "num_attention_heads": 3, "encoder_ffn_dim": 80, "encoder_layers": 2}
OMDET = {
    "encoder_hidden_dim": 48,
    "num_attention_heads": 3,
    "encoder_dim_feedforward": 80,
    "encoder_layers": 2,
    "encoder_feedforward_activation": "gelu",
}


def flat(package: str, layer: str, model: str, positions: str = "spatial_position_embeddings", **other: Any) -> Case:
    config = {**DETR, **other.pop("config", {})}
    placement = other.pop("placement", "post")
    options = {"width": 48, "positions": positions}
    return Case(package, layer, model, "layers", "flat_map", placement, config, options=options, **other)


def one_map(package: str, prefix: str) -> Case:
    config = {
        "package": package,
        "config_class": f"{prefix}Config",
        "model_class": f"{prefix}AIFILayer",
        "of_model": RT_DETR,
    }
    options = {"width": 48}
    layer, stack = f"{prefix}EncoderLayer", "inner.layers"
    return Case(package, layer, "FeatureMap", stack, "feature_map", "post", config, options=options, where="detection")


CASES: list[Case] = [
    flat("detr", "DetrEncoderLayer", "DetrEncoder"),
    flat("conditional_detr", "ConditionalDetrEncoderLayer", "ConditionalDetrEncoder"),
    flat(
        "dab_detr",
        "DabDetrEncoderLayer",
        "DabDetrEncoder",
        "object_queries",
        config={"hidden_size": 48, "d_model": None},
        eager_only=True,
    ),
    flat(
        "table_transformer",
        "TableTransformerEncoderLayer",
        "TableTransformerEncoder",
        "object_queries",
        placement="pre",
        eager_only=True,
    ),
    one_map("rt_detr", "RTDetr"),
    one_map("rt_detr_v2", "RTDetrV2"),
    one_map("d_fine", "DFine"),
    one_map("deimv2", "Deimv2"),
    one_map("pp_doclayout_v2", "PPDocLayoutV2"),
    one_map("pp_doclayout_v3", "PPDocLayoutV3"),
    one_map("pp_doclayout_v4", "PPDocLayoutV4"),
    Case(
        "omdet_turbo",
        "OmDetTurboEncoderLayer",
        "Omdet",
        "inner.layers",
        "feature_map",
        "post",
        {"of_model": OMDET},
        options={"width": 48},
        where="detection",
    ),
]
