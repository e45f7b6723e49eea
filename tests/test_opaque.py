"""Quantised linears of other packages inside fast layers: the answers of the same model before its conversion.

Modules that scale a token's activation by what else is in the batch cannot run on packed tokens: those are refused.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ModernBertConfig, ModernBertModel

from fastencoder import NotEligibleError, explain, reverse, to_fast

from . import tiny
from .conformance.weights import sharpen

# Of activations in int8 a last bit of fp32 may decide the rounding: there the bar is what the quantisation itself changes.
BAR = 1e-5  # relative error of the real tokens; the modules are the same, only the shapes that they see differ


def modernbert() -> nn.Module:
    ids = dict(pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    model = ModernBertModel(ModernBertConfig(vocab_size=99, max_position_embeddings=64, **tiny.SIZES, **ids)).eval()
    sharpen(model)
    return model


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "bert": (tiny.bert, tiny.ragged),
    "vit": (tiny.vit, images),
    "modernbert": (modernbert, tiny.ragged),
}


def dynamic(dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
    def quantise(model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=dtype)

    return quantise


def torchao(config: str) -> Callable[[nn.Module], nn.Module]:
    def quantise(model: nn.Module) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, config)(), filter_fn=_is_linear_of_a_layer)
        return model

    return quantise


def _is_linear_of_a_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "layer" in name


def lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


TOKEN_WISE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao, weights in int8": torchao("Int8WeightOnlyConfig"),
    "torchao, weights and activations in int8": torchao("Int8DynamicActivationInt8WeightConfig"),
    "lora": lora,
}


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).last_hidden_state


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", TOKEN_WISE)
def test_quantised_layers_are_fast(how: str, name: str) -> None:
    make, inputs = MODELS[name][0], MODELS[name][1]()
    mask = inputs.get("attention_mask")
    stock = TOKEN_WISE[how](make())
    before = run(stock, inputs)
    effect = tiny.relative_error(before, run(make(), inputs), mask)
    assert effect > 1e-5, "nothing was quantised"
    fast = to_fast(copy.deepcopy(stock))
    assert tiny.relative_error(run(fast, inputs), before, mask) <= (effect if "activations" in how else BAR)
    ran_fast, delegated = tiny.calls(fast)
    assert ran_fast == 3 and delegated == 0, tiny.reasons(fast)
    assert torch.equal(run(reverse(fast), inputs), before)


@pytest.mark.parametrize("name", MODELS)
def test_an_activation_scaled_by_the_batch_is_refused(name: str) -> None:
    """torch's dynamic quantisation has one scale for all tokens: what else is in the batch changes each of them."""
    model = dynamic(torch.qint8)(MODELS[name][0]())
    before = run(model, inputs := MODELS[name][1]())
    with pytest.raises(NotEligibleError, match="does not treat each token by itself"):
        to_fast(model)
    assert {row.status for row in explain(model)} == {"refused"}
    assert torch.equal(run(model, inputs), before)


def test_such_an_activation_does_depend_on_its_neighbours() -> None:
    linear = dynamic(torch.qint8)(nn.Sequential(nn.Linear(48, 48)))[0]
    tokens = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0))
    alone = linear(tokens[:, :1])
    tokens[:, 3] *= 20
    assert tiny.relative_error(linear(tokens)[:, :1], alone) > 0.01


def test_lora_on_a_quantised_linear_is_tried_out() -> None:
    """What an adapter adds is token by token; what it adapts need not be."""
    model = lora(tiny.bert())
    layer = model.base_model.model.encoder.layer[1]
    query = layer.attention.self.query
    query.base_layer = dynamic(torch.qint8)(nn.Sequential(query.base_layer))[0]
    with pytest.raises(NotEligibleError, match=r"attention.self.query is a peft.* does not treat each token by itself"):
        to_fast(model)
