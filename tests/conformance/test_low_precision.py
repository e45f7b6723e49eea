"""bf16 and fp16: at most twice the error of the stock model of the same dtype, both against the stock model in fp32."""

from __future__ import annotations

import copy

import pytest
import torch

import fastencoder

from . import batches, measure
from .cases import BY_ID
from .fast import calls, reasons, stock_of

NAMED = (
    "detr.DetrEncoderLayer",
    "sam.SamVisionLayer",
    "swin.SwinLayer",
    "torch.TransformerEncoderLayer.nested",
    "bert.BertLayer",
    "distilbert.TransformerBlock",
    "albert.AlbertLayer",
    "bart.BartEncoderLayer",
    "wav2vec2.Wav2Vec2EncoderLayer",
    "vit.ViTLayer",
    "dinov2.Dinov2Layer",
    "clip.CLIPEncoderLayer",
    "siglip2.Siglip2EncoderLayer",
    "mbart.MBartEncoderLayer",
    "whisper.WhisperEncoderLayer",
    "wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm",
    "mpnet.MPNetLayer",
    "t5.T5Block.gated_encoder",
    "deberta_v2.DebertaV2Layer",
    "deberta.DebertaLayer",
    "beit.BeitLayer",
    "wavlm.WavLMEncoderLayer",
    "qwen2_5_vl.Qwen2_5_VLVisionBlock",
    "dinov3_vit.DINOv3ViTLayer",
    "vjepa2.VJEPA2Layer",
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMED)
def test_error_is_at_most_twice_the_stock_one(name: str, dtype: torch.dtype) -> None:
    case = BY_ID[name]
    stock32 = stock_of(case)
    stock = copy.deepcopy(stock32).to(dtype)
    fast = fastencoder.to_fast(copy.deepcopy(stock32)).to(dtype)
    for pattern in batches.patterns(case):
        # Errors of one small batch are a matter of luck: the norm is taken over several.
        errors = torch.zeros(2, dtype=torch.float64)
        for seed in range(4):
            batch = batches.build(case, stock32, pattern, seed=seed)
            exact = measure.last_real(case, measure.run(stock32, batch), batch).double()
            for index, model in enumerate((fast, stock)):
                value = measure.last_real(case, measure.run(model, batch.to(dtype)), batch)
                assert value.dtype == dtype
                errors[index] += (value.double() - exact).square().sum()
        ours, theirs = errors.sqrt().tolist()
        assert theirs > 0
        assert ours <= 2 * theirs, f"{pattern}: {ours:.3g} against {theirs:.3g}"
    ran = calls(fast)
    assert ran[0] > 0 and ran[1] == 0, reasons(fast)
