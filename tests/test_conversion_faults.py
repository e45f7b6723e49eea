"""Faults while a model is converted, given back, or prepares its weights: it is either as it was or as it should become.

Those of a forward are in `test_faults.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastencoder import NotEligibleError, conversion, is_fast, reverse, to_fast
from fastencoder.layers import fast_layer, weights
from fastencoder.layers.stack import Stack

from . import tiny
from .faults import EPS, answer, assert_as_new, said_once
from .test_conversion import snapshot


def test_the_last_layer_is_not_eligible() -> None:
    model = tiny.bert()
    model.encoder.layer[-1].output.dense.register_forward_hook(lambda *_: None)
    before, expected = snapshot(model), answer(model)
    with pytest.raises(NotEligibleError, match=r"encoder\.layer\.2"):
        to_fast(model)
    assert snapshot(model) == before and not is_fast(model)
    assert torch.equal(answer(model), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(6))
def test_a_conversion_that_breaks_off_in_the_middle(monkeypatch, at: int, error: type[BaseException]) -> None:
    """At the first, second, ... change of a class, when the hooks were set, and behind them."""
    model = tiny.bert()
    before, expected = snapshot(model), answer(model)
    change_class, install, count = conversion.change_class, Stack.install, []

    def broken(*given: object) -> None:
        count.append(given)
        if len(count) == at + 1:
            raise error("in the middle")
        change_class(*given)

    def not_installed(*given: object) -> None:
        install(*given)
        raise error("in the middle")

    if at < 4:
        monkeypatch.setattr(conversion, "change_class", broken)
    elif at == 4:
        monkeypatch.setattr(Stack, "install", not_installed)
    else:
        monkeypatch.setattr(conversion, "_swap_attention", lambda *_: (_ for _ in ()).throw(error("in the middle")))
    with pytest.raises(error, match="in the middle"):
        to_fast(model)
    monkeypatch.undo()
    assert snapshot(model) == before
    assert torch.equal(answer(model), expected)
    assert_as_new(to_fast(model))


def test_there_is_no_memory_to_reverse(monkeypatch) -> None:
    """Parameters that lie in one storage are given their own ones first: if that fails, the model stays fast."""
    model = to_fast(tiny.bert(), memory="lean")
    expected = answer(model)
    separate, count = fast_layer.separate, []

    def full(parameters: list[nn.Parameter]) -> None:
        count.append(parameters)
        if len(count) == 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9216 bytes")
        separate(parameters)

    monkeypatch.setattr(fast_layer, "separate", full)
    with pytest.raises(RuntimeError, match="can't allocate"):
        reverse(model)
    monkeypatch.undo()
    assert len(count) == 5 and tiny.calls(model)[1] == 0
    assert torch.equal(answer(model), expected) and tiny.calls(model)[1] == 0
    assert_as_new(model)


@pytest.mark.parametrize("at", range(4))
def test_an_interrupt_while_reverse_runs(monkeypatch, at: int) -> None:
    """The class of no layer is left behind: it is finished, and then the interrupt goes on its way."""
    model, before = to_fast(tiny.bert()), snapshot(tiny.bert())["classes"]
    change_class, count = conversion.change_class, []

    def interrupted(*given: object) -> None:
        count.append(given)
        if len(count) == at + 1:
            raise KeyboardInterrupt
        change_class(*given)

    monkeypatch.setattr(conversion, "change_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reverse(model)
    monkeypatch.undo()
    assert not is_fast(model) and snapshot(model)["classes"] == before
    assert torch.equal(answer(model), answer(tiny.bert()))
    assert_as_new(to_fast(model))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_there_is_no_memory_for_a_copy_of_the_weights(monkeypatch, error: Exception) -> None:
    """Which the original layers do not need: they answer from then on."""
    model, failed = to_fast(tiny.bert()), []

    def full(*_: object, **__: object) -> None:
        failed.append(True)
        raise error

    monkeypatch.setattr(weights.Projections, "_fuse_qkv", full)
    with said_once("no memory for a copy", 'memory="lean"', "results stay right"):
        for _ in range(2):
            got = answer(model)
            assert tiny.relative_error(got, answer(tiny.bert()), tiny.ragged()["attention_mask"]) < EPS
    assert len(failed) == 3, "once a layer, not once a call"
    assert tiny.calls(model) == (0, 6) and tiny.reasons(model) == {fast_layer._NO_MEMORY}
    monkeypatch.undo()
    assert_as_new(model)


def test_another_error_while_weights_are_prepared_is_not_hidden(monkeypatch) -> None:
    model = to_fast(tiny.bert())

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(weights.Projections, "_fuse_qkv", broken)
    with pytest.raises(RuntimeError, match="something else"):
        answer(model)
    monkeypatch.undo()
    assert_as_new(model)
    assert tiny.calls(to_fast(model)) == (0, 0)
