"""A float32 model that computes in 16 bits: at most 1.5 times the error of the stock model cast to 16 bits, against fp64."""

from __future__ import annotations

import copy

import pytest
import torch

import fastencoder
from fastencoder.kernels.linear import cpu as linear_cpu

from . import batches, measure
from .cases import BY_ID
from .fast import calls, models_of, reasons

NAMED = (
    "bert.BertLayer",
    "vit.ViTLayer",
    "nomic_bert.NomicBertLayer",
    "modernbert.ModernBertEncoderLayer",
    "mpnet.MPNetLayer",
    "t5.T5Block.gated_encoder",
    "deberta_v2.DebertaV2Layer",
    "deberta.DebertaLayer",
    "bart.BartEncoderLayer",
    "dinov2.Dinov2Layer",
    "swin.SwinLayer",
    "sam.SamVisionLayer",
    "qwen2_5_vl.Qwen2_5_VLVisionBlock",
    "embedding_gemma2.EmbeddingGemma2EncoderLayer",
    "torch.TransformerEncoderLayer.nested",
)
SEEDS = 4


@pytest.mark.parametrize("processor", ["fast in 16 bits", "this one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMED)
def test_error_is_that_of_the_dtype(monkeypatch, name: str, dtype: torch.dtype, processor: str) -> None:
    if processor == "fast in 16 bits":
        monkeypatch.setattr(linear_cpu, "float32_is_faster", lambda dtype, tokens: False)
        monkeypatch.setattr(linear_cpu, "_multiplies", lambda dtype: True)
    case = BY_ID[name]
    models = models_of(case)
    stock = copy.deepcopy(models.stock).to(dtype)
    fast = fastencoder.to_fast(copy.deepcopy(models.stock), compute_dtype=dtype)
    for pattern in batches.patterns(case):
        # Errors of one small batch are a matter of luck: the norm is taken over several.
        errors, size = torch.zeros(2, dtype=torch.float64), 0.0
        for seed in range(SEEDS):
            batch = batches.build(case, models.stock, pattern, seed=seed)
            exact = measure.last_real(case, measure.reference(case, models.exact, batch), batch).double()
            size += float(exact.square().sum())
            for index, (model, given) in enumerate(((fast, batch), (stock, batch.to(dtype)))):
                value = measure.last_real(case, measure.run(model, given), batch)
                assert value.dtype == (torch.float32 if model is fast else dtype)
                errors[index] += (value.double() - exact).square().sum()
        ours, theirs = errors.sqrt().tolist()
        assert theirs > 0
        assert ours <= 1.5 * theirs, f"{pattern}: {ours:.3g} against {theirs:.3g}"
        if processor == "fast in 16 bits" and size:
            assert ours > 1e-5 * size**0.5, f"{pattern}: this was not computed in 16 bits"
    ran = calls(fast)
    assert ran[0] > 0 and ran[1] == 0, reasons(fast)
