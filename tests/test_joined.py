"""Queries, keys and values as one weight over the model's own parameters: what a CUDA device gets, checked on the CPU."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastencoder import reverse, to_fast
from fastencoder.layers import weights
from fastencoder.layers.joined import joined, separate

from . import tiny
from .test_weights import CHANGES


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch):
    """Weights are kept as on a CUDA device; the kernels stay the CPU's."""
    monkeypatch.setattr(weights, "on_gpu", lambda device: True)


def _parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_values_stay_and_memory_is_shared():
    parameters = _parameters((3, 5), (2, 5), (4, 5))
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.inference_mode():  # as in a forward; the parameters must not become inference tensors
        together = joined(parameters)
    assert torch.equal(together, torch.cat(before))
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert not any(parameter.is_inference() for parameter in parameters)
    parameters[1].data[0, 0] = 7.0
    assert together[3, 0] == 7.0


def test_joined_again_copies_nothing():
    parameters = _parameters((3, 5), (2, 5))
    first = joined(parameters)
    assert joined(parameters).data_ptr() == first.data_ptr()
    parameters[0].data = parameters[0].data.clone()
    again = joined(parameters)
    assert again.data_ptr() != first.data_ptr()
    assert torch.equal(again, first)


def test_separate_gives_each_its_own_storage():
    parameters = _parameters((3,), (2,))
    joined(parameters)
    separate(parameters)
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in parameters)


def _run(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


def test_a_model_answers_the_same_and_comes_back():
    batch, model = tiny.ragged(), tiny.bert()
    expected, state = _run(model, batch), copy.deepcopy(model.state_dict())
    to_fast(model)
    assert torch.allclose(_run(model, batch), expected, atol=1e-5)
    attention = model.encoder.layer[0].attention.self
    assert attention.query.weight.untyped_storage().data_ptr() == attention.value.weight.untyped_storage().data_ptr()
    assert attention.query.bias.untyped_storage().data_ptr() == attention.value.bias.untyped_storage().data_ptr()
    reverse(model)
    assert torch.equal(_run(model, batch), expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name


def test_keys_without_bias():
    batch, model = tiny.ragged(), tiny.bert()
    for layer in model.encoder.layer:
        layer.attention.self.key.bias = None
    expected = _run(model, batch)
    to_fast(model)
    assert torch.allclose(_run(model, batch), expected, atol=1e-5)


def test_tied_projections_are_not_joined():
    batch, model = tiny.ragged(), tiny.bert()
    for layer in model.encoder.layer:
        layer.attention.self.key.weight = layer.attention.self.query.weight
    expected = _run(model, batch)
    to_fast(model)
    assert torch.allclose(_run(model, batch), expected, atol=1e-5)
    assert model.encoder.layer[0]._fastencoder.projections.layout == "plain"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_changed_weights_take_effect(change):
    batch, model, stock = tiny.ragged(), to_fast(tiny.bert()), tiny.bert()
    before = _run(model, batch)
    change(model)
    change(stock)
    after = _run(model, batch)
    assert torch.allclose(after, _run(stock, batch), atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)


def test_saved_while_joined(tmp_path):
    model = to_fast(tiny.bert())
    _run(model, tiny.ragged())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.save_pretrained(tmp_path / "saved")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    for loaded in (
        load_file(tmp_path / "model.safetensors"),
        load_file(tmp_path / "saved" / "model.safetensors"),
        torch.load(buffer, weights_only=True),
    ):
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.items())


def test_copies_and_moves(tmp_path):
    batch, model = tiny.ragged(), to_fast(tiny.bert())
    expected = _run(model, batch)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(_run(twin, batch), expected)
    reverse(twin)
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in twin.parameters())
    twin = to_fast(twin).double().float()
    assert torch.allclose(_run(twin, batch), expected, atol=1e-5)
