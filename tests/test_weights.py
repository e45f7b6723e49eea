"""Weights that change while a model is fast take effect at the next call, however they change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastencoder import explain, to_fast
from fastencoder.layers import weights

from . import tiny


def _load_state_dict(model: nn.Module) -> None:
    model.load_state_dict(tiny.bert(seed=1).state_dict())


def _assign_state_dict(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(tiny.bert(seed=1).state_dict()), assign=True)


def _copy_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)


def _write_through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.25)


def _replace_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25


def _replace_parameters(model: nn.Module) -> None:
    for layer in model.encoder.layer:
        layer.intermediate.dense.weight = nn.Parameter(layer.intermediate.dense.weight * 1.25)


def _replace_a_module(model: nn.Module) -> None:
    torch.manual_seed(5)
    for layer in model.encoder.layer:
        layer.attention.self.key = nn.Linear(48, 48)


def _one_bias(model: nn.Module) -> None:
    model.encoder.layer[1].attention.self.value.bias.data.add_(1.0)


def _eps_and_scale(model: nn.Module) -> None:
    model.encoder.layer[0].output.LayerNorm.eps = 0.5
    model.encoder.layer[2].attention.self.scaling *= 3


def _optimizer_step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


CHANGES = [
    _load_state_dict,
    _assign_state_dict,
    _copy_in_place,
    _write_through_data,
    _replace_data,
    _replace_parameters,
    _replace_a_module,
    _one_bias,
    _eps_and_scale,
    _optimizer_step,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_changed_weights_take_effect(change) -> None:
    stock, inputs = tiny.bert(), tiny.ragged()
    fast = to_fast(copy.deepcopy(stock))
    mask = inputs["attention_mask"]
    with torch.inference_mode():
        before = fast(**inputs).last_hidden_state
    for model in (stock, fast):
        change(model)
    with torch.inference_mode():
        expected, got = stock(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    assert tiny.relative_error(got, before, mask) > 0.01
    assert tiny.relative_error(got, expected, mask) < 1e-5
    assert tiny.calls(fast) == (6, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_while_fast(dtype: torch.dtype) -> None:
    model, inputs = tiny.bert(), tiny.ragged()
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(**inputs).last_hidden_state
        to_fast(model)(**inputs)
        low = model.to(dtype)(**inputs).last_hidden_state
        assert low.dtype == dtype
        assert tiny.relative_error(low, exact, inputs["attention_mask"]) < (1e-7 if dtype == torch.float64 else 0.05)
        back = model.float()(**inputs).last_hidden_state
    assert tiny.relative_error(back, exact, inputs["attention_mask"]) < 0.05
    assert tiny.calls(model) == (9, 0)


def test_a_half_cast_layer_runs_fast_again_once_it_is_whole() -> None:
    model, inputs = to_fast(tiny.bert()), tiny.ragged()
    with torch.inference_mode():
        model.encoder.layer[1].output.to(torch.float64)
        with pytest.raises(RuntimeError):  # the stock layer's own error
            model(**inputs)
        model.double()
        model(**inputs)
    assert tiny.calls(model) == (4, 1)


@pytest.mark.parametrize("tokens", [8, 512])  # few and many: other code multiplies them
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_as_far_off_as_stock(dtype: torch.dtype, tokens: int) -> None:
    model = tiny.bert()
    torch.manual_seed(0)
    ids = torch.randint(5, 99, (tokens // 8, 8))
    mask = torch.ones_like(ids)
    if tokens > 8:
        mask[::3, 5:] = 0
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(ids, mask).last_hidden_state
        model.to(dtype)
        stock = tiny.relative_error(model(ids, mask).last_hidden_state, exact, mask)
        got = tiny.relative_error(to_fast(model)(ids, mask).last_hidden_state, exact, mask)
    assert stock > 1e-4
    assert got <= 2 * stock
    assert tiny.calls(model) == (3, 0)


def test_a_model_made_in_inference_mode() -> None:
    """Its parameters have no version, so no copy of them is kept."""
    with torch.inference_mode():
        model, inputs = tiny.bert(), tiny.ragged()
        expected = model(**inputs).last_hidden_state
        to_fast(model)
        assert tiny.relative_error(model(**inputs).last_hidden_state, expected, inputs["attention_mask"]) < 1e-6
        model.encoder.layer[0].output.dense.weight.mul_(0)
        changed = model(**inputs).last_hidden_state
    assert tiny.relative_error(changed, expected, inputs["attention_mask"]) > 0.01
    assert tiny.calls(model) == (6, 0)


def test_memory_is_what_explain_says() -> None:
    """One more copy of the encoder's linear weights in oneDNN's layout, and nothing of it in the state_dict."""
    model = to_fast(tiny.bert())
    promised = explain(model).extra_bytes
    with torch.inference_mode():
        model(**tiny.ragged())
    kept = 0
    for state in tiny.states(model):
        projections = state.projections
        kept += sum(map(tiny.packed_bytes, tiny.packed_weights(projections)))
        kept += sum(saved.nbytes for _, saved in projections._probes)
    linear = sum(p.nbytes for name, p in model.encoder.named_parameters() if p.dim() == 2)
    probes = 3 * 6 * 2 * weights._PROBED * 4  # at most: a few elements a weight
    assert promised == linear
    assert promised <= kept <= promised + probes
    assert not any("fastencoder" in key for key in model.state_dict())
