"""Whether layers that run in one call are still what they were: what the extension compares, and what Python does, agree."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from fastencoder import reverse, to_fast
from fastencoder.kernels import native
from fastencoder.layers import fast_layer, guards
from fastencoder.layers.fast_layer import LayerState
from fastencoder.layers.stack import StackCall

from . import tiny
from .test_native_layer import bert, dinov2, error, images, texts

pytestmark = pytest.mark.skipif(native.current < native.ISAS.index("avx512"), reason="no extension, or no AVX-512 here")

BATCH = texts([17, 3, 20])


def run(model: nn.Module, batch: dict = BATCH) -> torch.Tensor:
    with torch.inference_mode():
        output = model(**batch).last_hidden_state
    return output[batch["attention_mask"].bool()] if "attention_mask" in batch else output


def stack_of(model: nn.Module):
    return next(module._fastencoder.stack for module in model.modules() if hasattr(module, "_fastencoder"))


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "_fastencoder")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers that Python asks whether they are ready."""
    asked, ready = [], LayerState.ready

    def note(state: LayerState, layer: nn.Module):
        asked.append(layer)
        return ready(state, layer)

    monkeypatch.setattr(LayerState, "ready", note)
    return asked


@pytest.mark.parametrize("make", [bert, dinov2], ids=["bert", "dinov2"])
def test_python_asks_nothing_where_nothing_changed(make, asked) -> None:
    model, batch = to_fast(make()), images() if make is dinov2 else BATCH
    first = run(model, batch)
    assert len(asked) == len(layers_of(model))
    for _ in range(2):
        assert torch.equal(run(model, batch), first)
    assert len(asked) == len(layers_of(model))
    with native.isa("none"):
        run(model, batch)
    assert len(asked) > len(layers_of(model))


def _wrap(layer: nn.Module) -> None:
    """As an adapter would."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.train(inner.training)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    layer.intermediate.dense = Doubled(layer.intermediate.dense)


def _patch(layer: nn.Module) -> None:
    dense, original = layer.output.dense, layer.output.dense.forward
    dense.forward = lambda x: original(x) * 2


class _Negated(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


def _replace(layer: nn.Module) -> None:
    dense = layer.attention.output.dense
    dense.weight = nn.Parameter(dense.weight.detach() * -1)


def _set_data(layer: nn.Module) -> None:
    layer.attention.self.query.weight.data = layer.attention.self.query.weight.data * -1


def _norm(layer: nn.Module) -> None:
    layer.output.LayerNorm = nn.LayerNorm(48, eps=0.5).eval()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a module around a projection": _wrap,
    "a patched forward": _patch,
    "another class": lambda layer: setattr(layer.output.dense, "__class__", _Negated),
    "a hook": lambda layer: layer.output.dense.register_forward_hook(lambda module, args, output: output * 2),
    "a pre-hook": lambda layer: layer.output.dense.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "hooks in a new dictionary": lambda layer: (
        setattr(layer.output.dense, "_forward_hooks", type(layer.output.dense._forward_hooks)()),
        layer.output.dense.register_forward_hook(lambda module, args, output: output * 2),
    ),
    "another norm": _norm,
    "another parameter": _replace,
    "other data of a parameter": _set_data,
    "a write into a parameter": lambda layer: layer.output.dense.weight.data.mul_(-1),
    "a noted write": lambda layer: layer.output.dense.bias.mul_(-1),
    "no bias": lambda layer: setattr(layer.intermediate.dense, "bias", None),
    "eps": lambda layer: setattr(layer.output.LayerNorm, "eps", 0.7),
    "the factor on scores": lambda layer: setattr(layer.attention.self, "scaling", 0.9),
    "the activation": lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.ReLU().eval()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("index", [0, 1, 2])
@torch.no_grad()
def test_a_change_of_any_layer_is_seen(index: int, change: Callable) -> None:
    stock = bert()
    model = to_fast(copy.deepcopy(stock))
    before = run(model)
    assert stack_of(model).snapshot.holds(layers_of(model))
    for each in (stock, model):
        change(each.encoder.layer[index])
    assert not stack_of(model).snapshot.holds(layers_of(model))
    expected = run(stock.double())
    assert error(before, expected) > 1e-4
    for _ in range(2):
        assert error(run(model), expected) < 3e-6


@torch.no_grad()
def test_a_layer_scale() -> None:
    stock = dinov2()
    model = to_fast(copy.deepcopy(stock))
    run(model, images())
    for each in (stock, model):
        layers = each.encoder.layer if hasattr(each, "encoder") else each.layers
        layers[1].layer_scale2.lambda1.data = layers[1].layer_scale2.lambda1.data * 3
    batch = {name: value.double() for name, value in images().items()}
    assert error(run(model, images()), run(stock.double(), batch)) < 3e-6


def test_training_mode_inside_a_layer() -> None:
    model = to_fast(bert())
    expected, calls = run(model), tiny.calls(model)
    dropout = model.encoder.layer[1].output.dropout
    dropout.train()
    run(model)
    assert tiny.calls(model)[1] == calls[1] + 1
    dropout.eval()
    assert torch.equal(run(model), expected)
    assert tiny.calls(model)[1] == calls[1] + 1


def test_a_gradient_that_a_later_layer_needs() -> None:
    model = to_fast(bert()).requires_grad_(False)
    run(model)
    model.encoder.layer[2].requires_grad_(True)
    model(**BATCH).last_hidden_state.sum().backward()
    assert model.encoder.layer[2].output.dense.weight.grad is not None


def test_the_same_bits_as_another_dtype() -> None:
    """Neither the address nor the version of a parameter tells."""
    model = to_fast(bert().requires_grad_(False))
    run(model)
    bias = model.encoder.layer[1].output.LayerNorm.bias
    address, version = bias.data_ptr(), bias._version
    bias.data = bias.data.view(torch.int32)
    assert (bias.data_ptr(), bias._version) == (address, version)
    assert not stack_of(model).snapshot.holds(layers_of(model))


def test_another_attention() -> None:
    model = to_fast(bert())
    run(model)
    snapshot = stack_of(model).snapshot
    model.set_attn_implementation("eager")
    assert not snapshot.holds(layers_of(model))


def test_other_instructions() -> None:
    model = to_fast(bert())
    expected, snapshot = run(model), stack_of(model).snapshot
    for name in ("none", "avx2"):
        with native.isa(name):
            assert not snapshot.holds(layers_of(model))
            assert error(run(model), expected.double()) < 3e-6


def test_an_attribute_of_a_class(monkeypatch, asked) -> None:
    """It cannot be watched, so Python asks each time."""
    stock = bert()
    model = to_fast(copy.deepcopy(stock))
    for each in (stock, model):
        for layer in each.encoder.layer:
            del layer.attention.self.scaling
    for factor in (0.2, 0.7):
        monkeypatch.setattr(type(stock.encoder.layer[0].attention.self), "scaling", factor, raising=False)
        assert error(run(model), run(copy.deepcopy(stock).double())) < 3e-6
    assert len(asked) == 6
    assert tiny.calls(model) == (6, 0)


def test_another_order_of_layers() -> None:
    stock = bert()
    model = to_fast(copy.deepcopy(stock))
    run(model)
    for each in (stock, model):
        each.encoder.layer = nn.ModuleList(reversed(each.encoder.layer))
    assert error(run(model), run(stock.double())) < 3e-6


def test_what_is_given_another_dtype() -> None:
    model = to_fast(bert())
    run(model)
    model.bfloat16()
    assert run(model).dtype == torch.bfloat16
    model.float()
    assert run(model).dtype == torch.float32


def test_shared_layers(asked) -> None:
    config = transformers.AlbertConfig(
        vocab_size=99, embedding_size=24, hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=100
    )
    stock = transformers.AlbertModel(config, add_pooling_layer=False).eval()
    model = to_fast(copy.deepcopy(stock))
    run(model)
    assert len(asked) == 1
    run(model)
    assert len(asked) == 1
    with torch.no_grad():
        for each in (stock, model):
            each.encoder.albert_layer_groups[0].albert_layers[0].ffn.weight.mul_(-1)
    assert error(run(model), run(stock.double())) < 3e-6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"])
def test_a_copy_has_a_snapshot_of_its_own(copied) -> None:
    model = to_fast(bert())
    expected = run(model)
    other = copied(model)
    assert stack_of(other).snapshot is None
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.zero_()
    assert torch.equal(run(other), expected)
    assert not torch.equal(run(model), expected)


def test_it_keeps_no_weights_that_are_not_used() -> None:
    model = to_fast(bert())
    run(model)
    old = weakref.ref(layers_of(model)[0]._fastencoder.projections)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
        layers_of(model)[0](torch.randn(1, 80, 48))  # by itself, and too long for all at once
    gc.collect()
    assert old() is None
    kept = weakref.ref(layers_of(model)[0]._fastencoder.projections)
    reverse(model)
    gc.collect()
    assert kept() is None


def test_layers_behind_one_that_delegates_run(monkeypatch) -> None:
    """The first has run all of them; the second is then asked for something that only its original forward does."""
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=6, num_attention_heads=3, intermediate_size=100
    )
    stock = transformers.BertModel(config, add_pooling_layer=False).eval()
    model = to_fast(copy.deepcopy(stock))
    run(model)
    refuse, repeats, refused = guards.refuse_arguments, StackCall.repeats, []

    def refuse_once(others, understood):
        if len(refused) == 1:
            refused.append(True)
            raise guards.Delegated("asked for in a test")
        refused.append(True)
        refuse(others, understood)

    monkeypatch.setattr(fast_layer, "refuse_arguments", refuse_once)
    monkeypatch.setattr(StackCall, "repeats", lambda call, *given: call.position != 1 and repeats(call, *given))
    assert error(run(model), run(stock.double())) < 3e-6
    assert tiny.calls(model) == (11, 1)


@pytest.mark.parametrize("wrong", [(), ((),), ((), (), ())])
def test_the_wrong_number_of_arguments(wrong) -> None:
    with pytest.raises(TypeError, match="number of arguments"):
        native.library.holds(*wrong)


@pytest.mark.parametrize("entry", [(), (1,), (1, 2, 3, 4, True), (nn.Identity(), {}, nn.Identity, (), True), None])
def test_what_it_does_not_understand_is_not_the_same(entry) -> None:
    assert native.library.holds((entry,), (), (), b"") is False
    assert native.library.holds((), (entry,), (), b"") is False
    assert native.library.holds((), (), (entry,), b"") is False
    assert native.library.holds((), (), (), b"") is True
