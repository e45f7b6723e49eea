"""T5's encoder (https://arxiv.org/abs/1910.10683): pre-RMSNorm, unscaled scores with a bias by bucketed distance, no biases
in projections, ReLU (T5) or a gated activation (T5 1.1, mT5). UMT5 (https://arxiv.org/abs/2304.09151) has a bias in each layer.

Decoders are made of the same classes; only blocks with `is_decoder=False` are meant here.
"""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter, NameMap

_ATTENTION = "layer.0.SelfAttention"
_FEED_FORWARD = "layer.1.DenseReluDense"
GATED_NAMES = NameMap(
    query=f"{_ATTENTION}.q",
    key=f"{_ATTENTION}.k",
    value=f"{_ATTENTION}.v",
    out=f"{_ATTENTION}.o",
    norm1="layer.0.layer_norm",
    gate=f"{_FEED_FORWARD}.wi_0",
    up=f"{_FEED_FORWARD}.wi_1",
    activation=f"{_FEED_FORWARD}.act",
    down=f"{_FEED_FORWARD}.wo",
    norm2="layer.1.layer_norm",
    heads=f"{_ATTENTION}.n_heads",
    scaling=f"{_ATTENTION}.scaling",
)
NAMES = replace(GATED_NAMES, gate="", up=f"{_FEED_FORWARD}.wi")

T5 = Adapter(
    "pre",
    (NAMES, GATED_NAMES),
    extra_outputs=2,
    gives_back=("position_bias",),
    attention="t5",
    clamp="each-block",
    may_stay_wide=True,
    extra_parameters=(f"{_ATTENTION}.relative_attention_bias",),
    label="T5",
)
UMT5 = replace(T5, extra_outputs=None, gives_back=(), attention="t5-own")

TABLES: tuple[tuple[Adapter, dict[str, str]], ...] = (
    (
        T5,
        {
            "t5.modeling_t5.T5Block": "t5",
            "mt5.modeling_mt5.MT5Block": "mt5",
            "pop2piano.modeling_pop2piano.Pop2PianoBlock": "pop2piano",
            "udop.modeling_udop.UdopBlock": "udop",
        },
    ),
    (UMT5, {"umt5.modeling_umt5.UMT5Block": "umt5"}),
)
