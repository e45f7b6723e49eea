"""Encoders that are no models by themselves, each in a module that is called like one: hidden states and a mask in, a
dictionary out."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn


def _class(package: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)


class BridgeTowerVision(nn.Module):
    """Hidden states `[S, B, D]`; the mask marks padding."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.encoder = _class("bridgetower", "BridgeTowerTransformer")(config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        padding = None if attention_mask is None else attention_mask == 0
        every = self.encoder(hidden_states.transpose(0, 1), padding)
        return {"last_hidden_state": every[-1].transpose(0, 1), "hidden_states": [h.transpose(0, 1) for h in every]}


class OneFormerText(nn.Module):
    """Hidden states `[S, B, D]`; the mask marks padding. transformers' own loop passes none."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        width, depth = config.text_encoder_width, config.text_encoder_num_layers
        self.encoder = _class("oneformer", "OneFormerTextTransformer")(width, depth, heads=3, layer_norm_eps=1e-5)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        hidden_states = hidden_states.transpose(0, 1)
        if attention_mask is None:
            hidden_states = self.encoder(hidden_states)
        else:
            for layer in self.encoder.layers:
                hidden_states = layer(hidden_states, key_padding_mask=attention_mask == 0)
        return {"last_hidden_state": hidden_states.transpose(0, 1)}


class MobileViTTransformer(nn.Module):
    """The transformer of one stage, without the convolutions around it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.encoder = _class("mobilevit", "MobileViTTransformer")(config, config.hidden_sizes[0], num_stages=2)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"last_hidden_state": self.encoder(hidden_states)}


class AttentivePooler(nn.Module):
    """V-JEPA 2's pooler: self-attention, and one query for each video."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.pooler = _class("vjepa2", "VJEPA2AttentivePooler")(config)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"last_hidden_state": self.pooler(hidden_states)[:, None]}


class RecognitionBlocks(nn.Module):
    """PaddleOCR's blocks without the convolutions around them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        package = config.model_type
        block = {
            "pp_ocrv5_mobile_rec": "PPOCRV5MobileRecBlock",
            "pp_ocrv5_server_rec": "PPOCRV5ServerRecBlock",
            "pp_ocrv6_small_rec": "PPOCRV6SmallRecBlock",
        }[package]
        self.svtr_block = nn.ModuleList(_class(package, block)(config) for _ in range(config.depth))

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> dict[str, Any]:
        for block in self.svtr_block:
            hidden_states = block(hidden_states)
        return {"last_hidden_state": hidden_states}


class MaskedEncoder(nn.Module):
    """An encoder that takes an additive mask, of a model that has images or a backbone before it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        name = {"tvp": "TvpEncoder", "vilt": "ViltEncoder"}[config.model_type]
        self.encoder = _class(config.model_type, name)(config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> dict[str, Any]:
        if attention_mask is not None:
            attention_mask = (1 - attention_mask[:, None, None].to(hidden_states.dtype)) * -1e4
        return self.encoder(hidden_states, attention_mask, return_dict=True, **others)
