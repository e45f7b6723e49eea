"""Whole layers in one call of the C++ extension."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from fastencoder import to_fast
from fastencoder.kernels import native

pytestmark = pytest.mark.skipif(native.current < native.ISAS.index("avx512"), reason="no extension, or no AVX-512 here")

SIZES = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=100)


def scaled(model: nn.Module) -> nn.Module:
    """Weights under which every term shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.15 if parameter.dim() > 1 else 0.5))
    return model.eval()


def bert(**changes) -> nn.Module:
    config = transformers.BertConfig(vocab_size=99, max_position_embeddings=700, **SIZES, **changes)
    return scaled(transformers.BertModel(config, add_pooling_layer=False))


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(image_size=32, patch_size=8, mlp_ratio=2, **{k: SIZES[k] for k in list(SIZES)[:3]})
    return scaled(transformers.Dinov2Model(config))


def texts(lengths: list[int]) -> dict[str, torch.Tensor]:
    longest = max(lengths)
    ids = torch.randint(0, 99, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


def native_layers(model: nn.Module) -> list:
    states = [module._fastencoder for module in model.modules() if hasattr(module, "_fastencoder")]
    assert states and all(state.fast_calls and not state.delegated_calls for state in states)
    return [state.projections.native_layer for state in states]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (bert, texts([17, 3, 1, 40])),
        (lambda: bert(hidden_act="relu"), texts([5, 9])),
        (lambda: bert(hidden_act="gelu_new"), texts([5, 9])),
        (lambda: bert(hidden_act="silu"), texts([5, 9])),
        (dinov2, images()),
    ],
    ids=["bert", "relu", "gelu_new", "silu", "dinov2"],
)
@torch.no_grad()
def test_exact(make, inputs):
    """Post-LN, and pre-LN with LayerScale."""
    stock = make()
    fast = to_fast(copy.deepcopy(stock))
    out = fast(**inputs).last_hidden_state
    assert all(layer is not None for layer in native_layers(fast))
    stock = stock.double()
    expected = stock(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}).last_hidden_state
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    assert error(out[real], expected[real]) < 2e-6


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_groups_of_sequences_do_not_change_a_bit(dtype, memory):
    """Some 2,600 tokens: several groups, one of them a long sequence, one of empty and short ones. Alone, short ones run all
    layers in one call, and their products are divided differently."""
    lengths = [600, 30, 500, 1, 400, 700, 2, 60, 300, 10]
    inputs, fast = texts(lengths), to_fast(bert().to(dtype), memory=memory)
    whole = fast(**inputs).last_hidden_state
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        pytest.skip("oneDNN multiplies bfloat16 here")
    assert all(layer is not None for layer in native_layers(fast))
    for row, length in enumerate(lengths):
        alone = fast(input_ids=inputs["input_ids"][row : row + 1, :length]).last_hidden_state[0]
        assert torch.equal(whole[row, :length], alone)


@torch.no_grad()
def test_a_row_of_padding_alone():
    inputs = texts([12, 4, 7])
    inputs["attention_mask"][1] = 0
    stock = bert()
    out = to_fast(copy.deepcopy(stock))(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    assert error(out[real], stock.double()(**inputs).last_hidden_state[real]) < 2e-6


@torch.no_grad()
def test_bfloat16_weights_are_multiplied_in_float32():
    """So the result is nearer to the model in float64 than that of the stock model."""
    inputs, stock = texts([17, 3, 1, 40]), bert().bfloat16()
    fast = to_fast(copy.deepcopy(stock))
    out = fast(**inputs).last_hidden_state
    assert out.dtype == torch.bfloat16
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("oneDNN multiplies bfloat16 here")
    assert all(layer is not None for layer in native_layers(fast))
    real = inputs["attention_mask"].bool()
    expected = copy.deepcopy(stock).double()(**inputs).last_hidden_state[real]
    assert error(out[real], expected) < error(stock(**inputs).last_hidden_state[real], expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.attention.self.query.bias.data.add_(1),
        lambda layer: layer.output.dense.bias.data.mul_(-1),
        lambda layer: layer.intermediate.dense.weight.mul_(0.5),
        lambda layer: layer.attention.self.key.weight.data.mul_(-1),
        lambda layer: layer.output.LayerNorm.weight.data.mul_(3),
        lambda layer: setattr(layer.output.LayerNorm, "eps", 0.7),
        lambda layer: setattr(layer.attention.self, "scaling", 0.9),
    ],
)
def test_changes_after_the_first_call_are_seen(change):
    inputs, stock = texts([17, 3, 40]), bert()
    fast = to_fast(copy.deepcopy(stock))
    with torch.no_grad():
        before = fast(**inputs).last_hidden_state
        for model in (stock, fast):
            change(model.encoder.layer[1])
        out = fast(**inputs).last_hidden_state
        expected = stock.double()(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    assert error(before[real], expected[real]) > 1e-3
    assert error(out[real], expected[real]) < 2e-6
    assert all(layer is not None for layer in native_layers(fast))


@torch.no_grad()
def test_layers_with_more_to_them_run_the_program():
    config = transformers.ModernBertConfig(
        vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **SIZES
    )
    fast = to_fast(scaled(transformers.ModernBertModel(config)))
    fast(**texts([9, 4]))
    assert native_layers(fast) == [None] * 3
    with native.isa("none"):
        plain = to_fast(bert())
        plain(**texts([9, 4]))
    assert native_layers(plain) == [None] * 3
