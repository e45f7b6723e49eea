"""Models that bitsandbytes or torchao has quantised, loaded or changed in place: their linears are called as they are.

`tests/test_opaque.py` has torchao on other models, and what torch's own dynamic quantisation is refused for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertModel, BitsAndBytesConfig, TorchAoConfig

from fastencoder import NotEligibleError, explain, reverse, to_fast

from .. import tiny

SIZES = dict(hidden_size=64, num_attention_heads=2, intermediate_size=128)  # blocks of 64 weights share a scale
BAR = 1e-5
FP16_BAR = 2e-3  # bitsandbytes rounds to 8 bits what it has rounded to fp16: a last bit of fp32 may decide


def bert() -> nn.Module:
    return tiny.bert(**SIZES)


def run(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tiny.ragged()).last_hidden_state


def error(model: nn.Module, expected: torch.Tensor) -> float:
    return tiny.relative_error(run(model).float(), expected.float(), tiny.ragged()["attention_mask"])


def effect(model: nn.Module) -> float:
    """How much was changed by quantising."""
    return error(model, run(bert()))


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with every linear of its layers replaced, as a user may do it."""
    for layer in model.encoder.layer:
        for name, linear in list(layer.named_modules()):
            if type(linear) is nn.Linear:
                quantised = make(linear)
                quantised.load_state_dict(linear.state_dict())
                layer.set_submodule(name, quantised.to("cpu").eval())
    return model


def int8(threshold: float) -> Callable[[nn.Linear], nn.Module]:
    nn8 = pytest.importorskip("bitsandbytes").nn
    return lambda old: nn8.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False, threshold=threshold)


def four_bits(kind: str) -> Callable[[nn.Linear], nn.Module]:
    nn4 = pytest.importorskip("bitsandbytes").nn
    return lambda old: nn4.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32, quant_type=kind)


BITSANDBYTES: dict[str, tuple[Callable[[], Any], float]] = {
    "int8": (lambda: int8(threshold=0.0), FP16_BAR),
    "nf4": (lambda: four_bits("nf4"), BAR),
    "fp4": (lambda: four_bits("fp4"), BAR),
}


@pytest.mark.parametrize("run_first", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_bitsandbytes(kind: str, when: str, run_first: bool) -> None:
    make, bar = BITSANDBYTES[kind]
    stock, fast = replaced(bert(), make()), bert()
    expected = run(stock)
    assert effect(stock) > 2 * bar
    if when == "before":
        run(to_fast(fast))
    replaced(fast, make())
    if run_first and when == "after":
        assert torch.equal(run(fast), expected)
    if when == "after":
        assert {row.status for row in explain(fast)} == {"eligible"}
        to_fast(fast)
    before = tiny.calls(fast)
    assert error(fast, expected) < bar
    assert tiny.calls(fast) == (before[0] + 3, before[1]), tiny.reasons(fast)
    assert torch.equal(run(reverse(fast)), expected)


def test_bitsandbytes_outliers_of_the_batch_are_refused() -> None:
    """With its default threshold, a column of large activations of any token is multiplied in fp16 for all tokens."""
    model = replaced(bert(), int8(threshold=6.0))
    expected = run(model)
    with pytest.raises(NotEligibleError, match="Linear8bitLt, which does not treat each token by itself"):
        to_fast(model)
    assert torch.equal(run(model), expected)
    linear = model.encoder.layer[0].intermediate.dense
    tokens = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        alone = linear(tokens)[:, :1]
        tokens[:, 3] *= 20
        assert tiny.relative_error(linear(tokens)[:, :1], alone) > 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = tmp_path_factory.mktemp("model")
    bert().save_pretrained(there)
    return there


def load(folder: Path, config: Any) -> nn.Module:
    return BertModel.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["8 bits", "4 bits"])
def test_loading_with_bitsandbytes(kind: str, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    if kind == "8 bits":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    stock, fast = load(folder, config), load(folder, config)
    expected = run(stock)
    assert "bitsandbytes" in type(fast.encoder.layer[0].output.dense).__module__ and effect(stock) > 1e-3
    to_fast(fast)
    assert error(fast, expected) < (FP16_BAR if kind == "8 bits" else BAR)
    assert tiny.calls(fast) == (3, 0), tiny.reasons(fast)
    assert torch.equal(run(reverse(fast)), expected)


TORCHAO = {"weights": "Int8WeightOnlyConfig", "weights and activations": "Int8DynamicActivationInt8WeightConfig"}


def change_by_a_last_bit(model: nn.Module) -> float:
    """How far the answers move if what enters the layers changes by one part in ten millions."""
    expected, generator = run(model), torch.Generator().manual_seed(0)
    hook = model.embeddings.register_forward_hook(
        lambda _, __, hidden: hidden * (1 + 1e-7 * torch.randn(hidden.shape, generator=generator))
    )
    moved = error(model, expected)
    hook.remove()
    assert 0 < moved < 0.02
    return moved


@pytest.mark.parametrize("when", ["before", "after", "loaded"])
@pytest.mark.parametrize("kind", TORCHAO)
def test_torchao(kind: str, when: str, folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = getattr(quantization, TORCHAO[kind])
    stock = fast = bert()
    if when == "loaded":
        stock, fast = (load(folder, TorchAoConfig(config())) for _ in range(2))
    else:
        fast = copy.deepcopy(stock)
        if when == "before":
            run(to_fast(fast))
        for model in (stock, fast):
            quantization.quantize_(model.encoder, config())
    expected = run(stock)
    assert effect(stock) > 1e-4
    if when != "before":
        to_fast(fast)
    before = tiny.calls(fast)
    # Of activations in int8 the last bit of fp32 decides the rounding: the bar is what it does to the stock model.
    assert error(fast, expected) < (2 * change_by_a_last_bit(stock) if "activations" in kind else BAR)
    assert tiny.calls(fast) == (before[0] + 3, before[1]), tiny.reasons(fast)
    assert torch.equal(run(reverse(fast)), expected)
