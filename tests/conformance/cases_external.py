"""Rows of layers outside of transformers: torch's own encoder layer, and timm's vision transformer block."""

from __future__ import annotations

from typing import Any

from . import batches
from .case import Case, merge

TORCH = {"d_model": 48, "nhead": 3, "dim_feedforward": 80, "dropout": 0.1, "batch_first": True}
TIMM = {"dim": 48, "num_heads": 3, "mlp_ratio": 2.0, "qkv_bias": True}
# torch's loop asks its layers for nested tensors where their number of heads is even and their padding on the right.
NESTED = {"nested": True, "layer": {"nhead": 2}}


def torch_encoder(tag: str, placement: str = "post", **other: Any) -> Case:
    config = other.pop("config", {})
    layer = merge(TORCH, {"norm_first": placement == "pre"}, config.pop("layer", {}))
    return Case(
        "torch",
        "TransformerEncoderLayer",
        "TorchEncoder",
        "encoder.layers",
        "text",
        placement,
        {"layer": layer, "layers": 2, "norm": False, "nested": False, "mask": "bool", "pairs": "none", **config},
        home="torch.nn.modules.transformer",
        where="external",
        tag=tag,
        **other,
    )


def timm(tag: str = "", **block: Any) -> Case:
    return Case(
        "timm",
        "Block",
        "TimmEncoder",
        "blocks",
        "text",
        "pre",
        {"block": merge(TIMM, block), "fused": tag != "eager"},
        home="timm.models.vision_transformer",
        where="external",
        tag=tag,
    )


CASES: list[Case] = [
    torch_encoder("post"),
    torch_encoder("pre", "pre", config={"norm": True}),
    torch_encoder("time-major", config={"layer": {"batch_first": False, "activation": "gelu"}, "mask": "float"}),
    torch_encoder("time-major-pre", "pre", config={"layer": {"batch_first": False, "bias": False}}),
    torch_encoder("nested", config=NESTED),
    torch_encoder("nested-pre", "pre", config={**NESTED, "norm": True}, more_after=True),
    torch_encoder(
        "causal",
        config={"pairs": "causal"},
        patterns=(batches.NONE, batches.SINGLE, batches.FULL, batches.ONES),
        why="where a row begins with padding, a causal mask leaves torch's own layers nothing but NaN",
    ),
    torch_encoder("by-head", "pre", config={"pairs": "by head"}),
    timm(),
    timm("eager"),
    timm("normed", qk_norm=True, scale_mlp_norm=True, dim=64, num_heads=2),
    timm("scaled", scale_attn_norm=True, init_values=0.5),
    timm("gated", mlp_layer="SwiGLU", init_values=0.5),
]
