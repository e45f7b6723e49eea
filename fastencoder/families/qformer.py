"""Post-LN layers that may also look at an image: Q-Former (https://arxiv.org/abs/2301.12597) and BLIP's text layers."""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter, NameMap
from .post_ln import BERT, BERT_NAMES

QFORMER = Adapter(
    "post",
    (
        NameMap(
            query="attention.attention.query",
            key="attention.attention.key",
            value="attention.attention.value",
            out="attention.output.dense",
            norm1="attention.output.LayerNorm",
            up="intermediate_query.dense",
            activation="intermediate_query.intermediate_act_fn",
            down="output_query.dense",
            norm2="output_query.LayerNorm",
            heads="attention.attention.num_attention_heads",
            scaling="attention.attention.scaling",
        ),
    ),
    attention="q-former",
    # Called as they are: the look at the image, and the feed-forward block of the words.
    extra_parameters=("crossattention", "intermediate", "output"),
    label="Q-Former",
)

# A call with encoder_hidden_states, which is one with cross-attention, is delegated.
BLIP_TEXT = replace(BERT, names=(replace(BERT_NAMES, scaling=None),), extra_parameters=("crossattention",))

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (
        QFORMER,
        {
            "blip_2.modeling_blip_2.Blip2QFormerLayer": "blip-2 blip_2_qformer granite_speech granite_speech_plus",
            "instructblip.modeling_instructblip.InstructBlipQFormerLayer": "instructblip instructblip_qformer",
            "instructblipvideo.modeling_instructblipvideo.InstructBlipVideoQFormerLayer": (
                "instructblipvideo instructblipvideo_qformer"
            ),
        },
    ),
    (BLIP_TEXT, {"blip.modeling_blip_text.BlipTextLayer": "blip blip_text_model"}),
]
