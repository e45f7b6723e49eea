"""Layers outside of transformers: `torch.nn.TransformerEncoderLayer`, and the block of timm's vision transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..spec import Adapter, NameMap

TORCH_NAMES = NameMap(
    qkv="self_attn.in_proj_weight",
    out="self_attn.out_proj",
    norm1="norm1",
    up="linear1",
    activation="activation",
    down="linear2",
    norm2="norm2",
    heads="self_attn.num_heads",
)


def _two_activations(layer: Any) -> str | None:
    """torch's own fused layer does not call the activation: it goes by a number that was noted when the layer was made."""
    activation, noted = layer.activation, layer.activation_relu_or_gelu
    if isinstance(activation, nn.GELU) and activation.approximate != "none":
        return "torch computes its GELU with tanh in one of its two code paths and with erf in the other"
    relu = activation is F.relu or isinstance(activation, nn.ReLU)
    gelu = activation is F.gelu or isinstance(activation, nn.GELU)
    if noted != (1 if relu else 2 if gelu else 0):
        return "its activation was replaced, and torch's own fused path does not know"
    return None


def _torch_adapter(norm_first: bool, batch_first: bool) -> Adapter:
    return Adapter(
        "pre" if norm_first else "post",
        (TORCH_NAMES,),
        mask="src_key_padding_mask",
        mask_marks="padding",
        attention="pair-mask",
        time_major=not batch_first,
        requires={"norm_first": norm_first, "self_attn.batch_first": batch_first, "self_attn.add_zero_attn": False},
        refuses=_two_activations,
    )


_TORCH = {(first, batch): _torch_adapter(first, batch) for first in (False, True) for batch in (False, True)}


def _torch_program(layer: Any) -> Adapter:
    return _TORCH[bool(layer.norm_first), bool(layer.self_attn.batch_first)]


TORCH = replace(_TORCH[False, True], choose=_torch_program, label="MHA")

TIMM_NAMES = NameMap(
    qkv="attn.qkv",
    out="attn.proj",
    norm1="norm1",
    norm2="norm2",
    heads="attn.num_heads",
    head_dim="attn.head_dim",
)
_TIMM_MLP = dict(up="mlp.fc1", activation="mlp.act", down="mlp.fc2")
# Parts that are an Identity where a block has none.
_TIMM_OPTIONAL = {
    "query_norm": "attn.q_norm",
    "key_norm": "attn.k_norm",
    "mixed_norm": "attn.norm",
    "inner_norm": "mlp.norm",
    "scale1": "ls1.gamma",
    "scale2": "ls2.gamma",
}
_TIMM_SOURCES = ("activations", "attention", "drop", "layer_scale", "mlp", "norm")
_TIMM_GATED = ("timm.layers.mlp.GluMlp", "timm.layers.mlp.SwiGLU")


def _class(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _other_timm_parts(layer: Any) -> str | None:
    if _class(layer.attn) != "timm.layers.attention.Attention":
        return f"its attention is a {_class(layer.attn)}, and only timm.layers.attention.Attention is this family"
    if getattr(layer.attn, "gate", None) is not None:
        return "its attention is gated (attn.gate)"
    if _class(layer.mlp) not in ("timm.layers.mlp.Mlp", *_TIMM_GATED):
        return f"its feed-forward block is a {_class(layer.mlp)}, which is not known to work on each token by itself"
    if isinstance(layer.ls1, nn.Identity) != isinstance(layer.ls2, nn.Identity):
        return "only one of its two blocks has a LayerScale"
    return None


def _timm_program(layer: Any) -> Adapter:
    gated = _class(layer.mlp) in _TIMM_GATED
    present = []
    for slot, path in _TIMM_OPTIONAL.items():
        owner, _, name = path.partition(".")
        module = getattr(layer, owner) if name == "gamma" else getattr(getattr(layer, owner), name, None)
        if module is not None and not isinstance(module, nn.Identity) and not (gated and owner == "mlp"):
            present.append(slot)
    return _timm_adapter(tuple(present), gated, bool(layer.attn.fused_attn))


@cache
def _timm_adapter(present: tuple[str, ...], gated: bool, fused: bool) -> Adapter:
    names = replace(TIMM_NAMES, **{slot: _TIMM_OPTIONAL[slot] for slot in present})
    names = replace(names, scaling=None if fused else "attn.scale")  # torch's function takes its own scale
    names = replace(names, feed_forward="mlp") if gated else replace(names, **_TIMM_MLP)
    return replace(TIMM, names=(names,), choose=None)


TIMM = Adapter(
    "pre",
    (replace(TIMM_NAMES, **_TIMM_MLP),),
    mask="attn_mask",
    mask_marks="pairs",
    attention="causal-flag",
    sources=tuple(f"timm.layers.{name}" for name in _TIMM_SOURCES),
    refuses=_other_timm_parts,
    choose=_timm_program,
)

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (TORCH, {"torch.nn.modules.transformer.TransformerEncoderLayer": ""}),
    (TIMM, {"timm.models.vision_transformer.Block": ""}),
]
