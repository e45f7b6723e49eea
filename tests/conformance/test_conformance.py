"""Every layer class, inside a tiny model: the fast model against the stock model in fp64, over its real tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastencoder

from . import batches, measure
from .case import DELEGATES, FAST, LEFT_ALONE, REFUSED, UNREGISTERED, Case, build
from .cases import CASES
from .fast import calls, calls_of, layer_calls, models_of, reasons, stock_of

CONVERTED = [case for case in CASES if case.expect in (FAST, DELEGATES)]
RUN_FAST = [case for case in CASES if case.expect == FAST]


def rows(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def decoder_rows(output: Any, batch: batches.Batch) -> torch.Tensor:
    """The decoder's output for the rows that have a real token to attend to."""
    hidden = output["last_hidden_state"]
    return hidden if batch.real is None else hidden[batch.real.any(1)]


def same(ours: Any, theirs: Any) -> bool:
    """Equality of tensors, or of nested lists of them (one for each packed image)."""
    if isinstance(theirs, (tuple, list)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return torch.equal(ours, theirs)


@rows(RUN_FAST)
def test_output_of_every_kind_of_batch(case: Case) -> None:
    models = models_of(case)
    expected_calls = layer_calls(case, models.stock)
    for pattern in batches.patterns(case):
        batch = batches.build(case, models.stock, pattern)
        exact = measure.reference(case, models.exact, batch)
        stock = measure.run(models.stock, batch)
        before = calls_of(case, models.fast)
        fast = measure.run(models.fast, batch)
        after = calls_of(case, models.fast)

        assert measure.last(case, fast).shape == measure.last(case, stock).shape, pattern
        error = measure.error(measure.last_real(case, fast, batch), measure.last_real(case, exact, batch))
        assert error <= measure.FP32_BAR, f"{pattern}: relative error {error:.2e}"
        assert torch.isfinite(measure.last(case, fast)).all(), pattern
        ran = (after[0] - before[0], after[1] - before[1])
        expected = (expected_calls, 0) if case.runs_fast(batch) else (0, expected_calls)
        assert ran == expected, f"{pattern}: {ran} fast and delegated calls; {reasons(models.fast)}"
        if "decoder_input_ids" in batch.inputs:
            error = measure.error(decoder_rows(fast, batch), decoder_rows(stock, batch))
            assert error <= measure.FP32_BAR, f"{pattern}: decoder, relative error {error:.2e}"
        if case.zero_padding and batch.real is not None:
            padding = measure.last(case, fast)[~batch.real]
            assert padding.numel() > 0 or pattern == batches.ONES
            assert (padding == 0).all(), f"{pattern}: padding is not zero"


@rows([case for case in CASES if case.expect == DELEGATES])
def test_delegated_calls_are_the_stock_forward(case: Case) -> None:
    models = models_of(case)
    for pattern in batches.patterns(case):
        batch = batches.build(case, models.stock, pattern)
        before = calls(models.fast)
        fast, stock = measure.run(models.fast, batch), measure.run(models.stock, batch)
        after = calls(models.fast)
        assert torch.equal(measure.last(case, fast), measure.last(case, stock)), pattern
        assert after[0] == before[0] and after[1] > before[1], f"{pattern}: ran fast although {case.why}"


@rows(CONVERTED)
def test_hidden_states(case: Case) -> None:
    """Asked for at the first call, or after a plain one; and a plain call after it is right again."""
    models = models_of(case)
    name = case.outputs[1]
    for pattern in (batches.NONE, batches.RIGHT, batches.HOLES):
        if pattern not in batches.patterns(case):
            continue
        batch = batches.build(case, models.stock, pattern)
        exact = measure.reference(case, models.exact, batch, output_hidden_states=True)
        fast = measure.run(models.fast, batch, output_hidden_states=True)
        if name not in exact:
            continue  # a plain module: transformers records nothing
        assert len(fast[name]) == len(exact[name]) > 1
        for index, (ours, theirs) in enumerate(zip(fast[name], exact[name], strict=True)):
            assert ours.shape == theirs.shape
            if batch.real is not None and ours.shape[:2] != batch.real.shape:
                continue  # molecules of characters, squeezed frames: not the tokens that the mask speaks of
            error = measure.error(measure.pick(ours, batch.real), measure.pick(theirs, batch.real))
            assert error <= measure.FP32_BAR, f"{pattern}: entry {index}, relative error {error:.2e}"
        plain = measure.run(models.fast, batch)
        error = measure.error(measure.last_real(case, plain, batch), measure.last_real(case, exact, batch))
        assert error <= measure.FP32_BAR, f"{pattern}: plain call afterwards, relative error {error:.2e}"


@rows(CONVERTED)
def test_attentions_in_eager_mode(case: Case) -> None:
    """Recording attention weights is the original forward's work: equal bit for bit. A plain call is fast again."""
    stock_of(case)
    if case.options.get("attentions") == "broken":
        pytest.skip("the stock model itself fails when asked for attentions")
    stock, fast = build(case, attn="eager"), fastencoder.to_fast(build(case, attn="eager"))
    pattern = batches.RIGHT if batches.RIGHT in batches.patterns(case) else batches.NONE
    batch = batches.build(case, stock, pattern)
    # one stock model finds its attentions only behind its hidden states
    more = {"output_hidden_states": True} if case.options.get("attentions") == "after hidden states" else {}
    theirs = measure.run(stock, batch, output_attentions=True, **more)
    ours = measure.run(fast, batch, output_attentions=True, **more)
    name = case.outputs[2]
    if name in theirs:
        assert len(theirs[name]) == len(ours[name]) > 0
        if case.options.get("attentions") != "not of the layers":
            assert calls(fast)[0] == 0
            assert torch.equal(measure.last_real(case, ours, batch), measure.last_real(case, theirs, batch))
            assert same(ours[name], theirs[name])
    before = calls(fast)
    plain = measure.run(fast, batch)
    error = measure.error(measure.last_real(case, plain, batch), measure.last_real(case, theirs, batch))
    assert error <= measure.FP32_BAR
    if case.runs_fast(batch):
        assert calls(fast)[0] > before[0] and calls(fast)[1] == before[1], reasons(fast)


@rows([case for case in CASES if case.expect in (REFUSED, UNREGISTERED)])
def test_refused_model_is_untouched(case: Case) -> None:
    stock_of(case)
    model = build(case)
    types = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    batch = batches.build(case, model, batches.NONE)
    before = measure.last_real(case, measure.run(model, batch), batch)
    with pytest.raises(fastencoder.NotEligibleError) as caught:
        fastencoder.to_fast(model)
    assert str(caught.value)
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == keys
    assert not fastencoder.is_fast(model)
    assert torch.equal(measure.last_real(case, measure.run(model, batch), batch), before)
    registered = fastencoder.registry.by_class(case.layer_class_name) is not None
    assert registered == (case.expect == REFUSED)


@rows([case for case in CASES if case.expect == LEFT_ALONE])
def test_layers_left_alone(case: Case) -> None:
    """The model has other layers that go fast; the outputs still agree."""
    models = models_of(case)
    assert fastencoder.is_fast(models.fast)
    assert {type(layer) for layer in case.layers(models.fast)} == {case.layer_class()}
    for pattern in batches.patterns(case):
        batch = batches.build(case, models.stock, pattern)
        exact = measure.reference(case, models.exact, batch)
        before = calls(models.fast)
        fast = measure.run(models.fast, batch)
        assert measure.error(measure.last_real(case, fast, batch), measure.last_real(case, exact, batch)) <= 1e-5
        assert calls(models.fast)[0] > before[0]
