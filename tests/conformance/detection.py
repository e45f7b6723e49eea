"""The attention over one feature map of RT-DETR's line, without the detector around it."""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch
from torch import nn


class FeatureMap(nn.Module):
    """`module.layer_class(config)` on a feature map `[B, D, h, w]`; its output as hidden states `[B, h * w, D]`."""

    def __init__(self, config: types.SimpleNamespace) -> None:
        super().__init__()
        package = f"transformers.models.{config.package}"
        real = getattr(importlib.import_module(f"{package}.configuration_{config.package}"), config.config_class)
        modelling = importlib.import_module(f"{package}.modeling_{config.package}")
        self.config = real(**config.of_model)
        self.config._attn_implementation = getattr(config, "_attn_implementation", "sdpa")
        self.inner = getattr(modelling, config.model_class)(self.config)

    def forward(self, feature_map: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": self.inner(feature_map).flatten(2).transpose(1, 2)}


class Omdet(nn.Module):
    """OmDet-Turbo's stack of layers on flat tokens, with positions."""

    def __init__(self, config: types.SimpleNamespace) -> None:
        super().__init__()
        from transformers.models.omdet_turbo import configuration_omdet_turbo, modeling_omdet_turbo

        self.config = configuration_omdet_turbo.OmDetTurboConfig(**config.of_model)
        self.inner = modeling_omdet_turbo.OmDetTurboEncoder(self.config)

    def forward(self, feature_map: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        tokens = feature_map.flatten(2).transpose(1, 2)
        positions = torch.sin(torch.arange(tokens[:1].numel()) * 0.37).view_as(tokens[:1]).to(tokens.dtype)
        return {"last_hidden_state": self.inner(tokens, pos_embed=positions)[0]}
