"""Decoders of audio codecs, whose layers turn queries and keys of a head by one angle for all positions."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn
from transformers import AutoConfig

import fastencoder

from . import weights
from .fast import calls, reasons
from .measure import FP32_BAR, error

CODECS = {"neucodec": "NeuCodecDecoder", "xcodec2": "Xcodec2Decoder"}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 48,
    "attention_bias": True,
}


def _decoder(package: str, **more: object) -> nn.Module:
    config = AutoConfig.for_model(package, **{**SMALL, **more})
    config.semantic_model_config.hidden_size = 20
    config._attn_implementation = "sdpa"
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    torch.manual_seed(0)
    decoder = getattr(module, CODECS[package])(config).eval()
    weights.sharpen(decoder)
    return decoder


@pytest.mark.parametrize("package", CODECS)
@pytest.mark.parametrize(
    "size", [4, 13]
)  # as many tokens as heads: the tables could be mistaken for those of positions
@torch.no_grad()
def test_decoder_of_a_codec(package: str, size: int) -> None:
    stock = _decoder(package)
    features = torch.randn(3, size, 84, generator=torch.Generator().manual_seed(1))
    weights.calibrate(stock.layers, lambda: stock(features))
    fast = fastencoder.to_fast(copy.deepcopy(stock))
    inner = [[], []]
    for model, found in zip((stock.double(), fast), inner, strict=True):
        model.layers[-1].register_forward_hook(lambda module, args, output, found=found: found.append(output))
    stock(features.double())
    fast(features)
    assert error(inner[1][0], inner[0][0]) <= FP32_BAR
    assert calls(fast) == (2, 0), reasons(fast)


@pytest.mark.parametrize("package", CODECS)
def test_tables_that_scale_are_left_alone(package: str) -> None:
    scaled = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(fastencoder.NotEligibleError, match="yarn"):
        fastencoder.to_fast(_decoder(package, rope_parameters=scaled))
