"""RMSNorm before and after each block ("sandwich"), rotary position embedding, windows: Gemma's encoders.

Gemma 2 (https://arxiv.org/abs/2408.00118), T5Gemma (https://arxiv.org/abs/2504.06225).
"""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter
from .rope import LLAMA_NAMES, QK_NORMS

T5GEMMA_NAMES = replace(
    LLAMA_NAMES,
    norm1="pre_self_attn_layernorm",
    output_norm1="post_self_attn_layernorm",
    norm2="pre_feedforward_layernorm",
    output_norm2="post_feedforward_layernorm",
)
T5GEMMA = Adapter(
    "pre",
    (T5GEMMA_NAMES,),
    attention="rope-windowed-softcap",
    options={"window": "self_attn.sliding_window"},
    label="sandwich RMSNorm, rotary",
)
# It keeps the attribute of a softcap, and leaves it out.
T5GEMMA2 = replace(T5GEMMA, names=(replace(T5GEMMA_NAMES, **QK_NORMS),), attention="rope-windowed")

GEMMA3_NAMES = replace(
    T5GEMMA_NAMES,
    norm1="input_layernorm",
    output_norm1="post_attention_layernorm",
    value_norm="self_attn.v_norm",
    **QK_NORMS,
)
EMBEDDING_GEMMA2 = replace(
    T5GEMMA,
    names=(GEMMA3_NAMES,),
    attention="rope-per-layer-input",
    extra_parameters=("ple_block", "layer_scalar"),
)
GEMMA4_VISION = Adapter(
    "pre",
    (
        replace(
            GEMMA3_NAMES,
            **{
                slot: getattr(GEMMA3_NAMES, slot) + ".linear"
                for slot in ("query", "key", "value", "out", "gate", "up", "down")
            },
            attention_module="self_attn",
        ),
    ),
    attention="rope-axial",
    requires={"self_attn.q_proj.use_clipped_linears": False, "mlp.up_proj.use_clipped_linears": False},
    label="sandwich RMSNorm, rotary",
)

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (T5GEMMA, {"t5gemma.modeling_t5gemma.T5GemmaEncoderLayer": "t5gemma"}),
    (T5GEMMA2, {"t5gemma2.modeling_t5gemma2.T5Gemma2EncoderLayer": "t5gemma2"}),
    (
        EMBEDDING_GEMMA2,
        {
            "embedding_gemma2.modeling_embedding_gemma2.EmbeddingGemma2EncoderLayer": (
                "embedding_gemma2 embedding_gemma2_text"
            )
        },
    ),
    (GEMMA4_VISION, {"gemma4.modeling_gemma4.Gemma4VisionEncoderLayer": "gemma4_vision"}),
]
