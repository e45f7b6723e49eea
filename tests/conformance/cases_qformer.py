"""Rows of Q-Formers: queries alone, and queries before words."""

from __future__ import annotations

from typing import Any

from .case import Case, merge
from .cases_post_ln import TEXT

QFORMER = {"encoder_hidden_size": 40, "cross_attention_frequency": 2}


def qformer(package: str, prefix: str, inputs: str = "qformer", **other: Any) -> Case:
    config = merge(TEXT, QFORMER, other.pop("config", {}))
    layer, model, config_class = (f"{prefix}QFormer{part}" for part in ("Layer", "Model", "Config"))
    return Case(package, layer, model, "encoder.layer", inputs, "post", config, config_class, **other)


CASES: list[Case] = [
    qformer("blip_2", "Blip2", "query_embeds", config={"vocab_size": None, "use_qformer_text_input": False}),
    qformer("instructblip", "InstructBlip"),
    qformer("instructblipvideo", "InstructBlipVideo"),
    Case(
        "blip",
        "BlipTextLayer",
        "BlipTextModel",
        "encoder.layer",
        "text",
        "post",
        merge(TEXT, {"is_decoder": False, "hidden_act": "gelu"}),
        module="modeling_blip_text",
        eager_only=True,
    ),
]
