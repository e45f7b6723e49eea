"""The bars at the size that people serve: BERT-base and ViT-B/16, random weights under which every term shows."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from fastencoder import to_fast

from . import tiny
from .conformance.weights import calibrate, sharpen

FP32_BAR = 5e-5


def bert_base() -> tuple[torch.nn.Module, torch.nn.ModuleList, dict[str, torch.Tensor]]:
    model = BertModel(BertConfig())
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 48, dtype=torch.long)
    mask[0, 30:], mask[1, :7], mask[2, ::5], mask[3, 47:] = 0, 0, 0, 0
    ids = torch.randint(1000, 20000, (4, 48), generator=generator)
    return model, model.encoder.layer, {"input_ids": ids, "attention_mask": mask}


def vit_base() -> tuple[torch.nn.Module, torch.nn.ModuleList, dict[str, torch.Tensor]]:
    model = ViTModel(ViTConfig())
    return model, model.layers, {"pixel_values": torch.randn(1, 3, 224, 224)}


@pytest.mark.slow
@pytest.mark.parametrize("build", [bert_base, vit_base], ids=lambda f: f.__name__)
def test_base_size(build) -> None:
    torch.manual_seed(0)
    model, layers, inputs = build()
    model.eval()
    sharpen(model)
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        calibrate(layers, lambda: model(**inputs))
        for name, linear in layers.named_modules():
            # Twelve post-LN layers of such attention amplify rounding until the stock model itself is 2 % off in fp32.
            if name.endswith(("query", "q_proj")):
                linear.weight.mul_(0.7)
                linear.bias.mul_(0.7)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        expected = exact(**wide).last_hidden_state
        del exact
        low = copy.deepcopy(model).to(torch.bfloat16)
        narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        stock_low = tiny.relative_error(low(**narrow).last_hidden_state, expected, mask)
        stock = tiny.relative_error(model(**inputs).last_hidden_state, expected, mask)
        assert stock <= FP32_BAR / 2  # or the bar would say nothing about us
        got = to_fast(model)(**inputs).last_hidden_state
        got_low = tiny.relative_error(to_fast(low)(**narrow).last_hidden_state, expected, mask)
    assert tiny.calls(model) == (12, 0) and tiny.calls(low) == (12, 0)
    error = tiny.relative_error(got, expected, mask)
    assert error <= FP32_BAR
    assert got_low <= 2 * stock_low
    print(f"{build.__name__}: fp32 {error:.1e}; bf16 {got_low:.1e}, stock {stock_low:.1e}")
