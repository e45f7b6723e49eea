"""Every layer class: a converted model can be reversed, copied, pickled and saved, and nothing is lost on the way."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastencoder

from . import batches, measure
from .case import DELEGATES, FAST, Case
from .cases import CASES
from .fast import calls, models_of, stock_of

CONVERTED = [case for case in CASES if case.expect in (FAST, DELEGATES)]


def rows(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def _batch(case: Case, model: nn.Module) -> batches.Batch:
    known = batches.patterns(case)
    return batches.build(case, model, batches.RIGHT if batches.RIGHT in known else batches.NONE)


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a conversion and its reversal must leave as it was."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "tensors": {
            name: (
                id(tensor),
                tensor.data_ptr(),
                tensor._version,
                tensor.requires_grad,
                tensor.untyped_storage().data_ptr(),
            )
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        },
        "state_dict": [(key, value.data_ptr()) for key, value in model.state_dict().items()],
        "hooks": {
            name: (list(module._forward_hooks.items()), list(module._forward_pre_hooks.items()))
            for name, module in model.named_modules()
        },
        "hook_flags": {
            name: (dict(module._forward_hooks_with_kwargs), dict(module._forward_hooks_always_called))
            for name, module in model.named_modules()
        },
        "training": [module.training for module in model.modules()],
        "attributes": {
            name: sorted(key for key in vars(module) if not key.startswith("_output_capturing"))
            for name, module in model.named_modules()
        },
    }


@rows(CONVERTED)
def test_reverse_gives_the_model_back(case: Case) -> None:
    stock = stock_of(case)
    model = copy.deepcopy(stock)
    batch = _batch(case, model)
    layers = case.layers(model)
    seen: list[int] = []
    layers[0].register_forward_hook(lambda module, args, output: seen.append(id(module)))
    next(layers[-1].parameters()).requires_grad_(False)
    layers[0].train()
    before_output = measure.last(case, measure.run(stock, batch))
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    before = _snapshot(model)

    assert fastencoder.to_fast(model) is model
    assert fastencoder.is_fast(model) and not fastencoder.is_fast(stock)
    assert all(isinstance(layer, case.layer_class()) for layer in layers)
    assert any(type(layer) is not case.layer_class() for layer in layers)
    layers[0].eval()
    seen.clear()
    measure.run(model, batch)
    assert seen, "the layer's own hook was lost"
    layers[0].train()

    assert fastencoder.reverse(model) is model
    assert not fastencoder.is_fast(model)
    after = _snapshot(model)
    for what in before:
        assert after[what] == before[what], what
    for key, value in model.state_dict().items():
        assert torch.equal(value, tensors[key]), key
    model.eval()
    assert torch.equal(measure.last(case, measure.run(model, batch)), before_output)
    with pytest.raises(fastencoder.NotFastError):
        fastencoder.reverse(model)


@rows(CONVERTED)
def test_hidden_states_across_conversions(case: Case) -> None:
    """transformers puts its recording hooks on the layers once, at the first request: they must survive the swap."""
    model = copy.deepcopy(stock_of(case))
    batch = _batch(case, model)
    name = case.outputs[1]
    theirs = measure.run(model, batch, output_hidden_states=True)
    if name not in theirs:
        return  # a plain module: transformers records nothing
    fastencoder.to_fast(model)
    ours = measure.run(model, batch, output_hidden_states=True)[name]
    assert len(ours) == len(theirs[name])
    for index, (value, expected) in enumerate(zip(ours, theirs[name], strict=True)):
        real = batch.real if batch.real is not None and value.shape[:2] == batch.real.shape else None
        if real is None and batch.real is not None:
            continue
        assert measure.error(measure.pick(value, real), measure.pick(expected, real)) <= measure.FP32_BAR, index
    fastencoder.reverse(model)
    again = measure.run(model, batch, output_hidden_states=True)[name]
    assert all(torch.equal(value, expected) for value, expected in zip(again, theirs[name], strict=True))


@rows(CONVERTED)
def test_copy_and_pickle(case: Case) -> None:
    # A model of its own: once transformers has recorded hidden states, its hooks stop even a stock model from pickling.
    model = fastencoder.to_fast(copy.deepcopy(stock_of(case)))
    batch = _batch(case, model)
    ours = measure.last(case, measure.run(model, batch))
    others = [copy.deepcopy(model)]
    if not any(parametrize.is_parametrized(module) for module in model.modules()):  # torch pickles none of these
        others.append(pickle.loads(pickle.dumps(model)))
    for other in others:
        assert fastencoder.is_fast(other)
        before = calls(other)
        assert torch.equal(measure.last(case, measure.run(other, batch)), ours)
        assert (calls(other)[0] > before[0]) == case.runs_fast(batch)
        pointers = [{t.data_ptr() for t in each.parameters() if t.numel()} for each in (other, model)]
        assert pointers[0].isdisjoint(pointers[1])
        with torch.no_grad():  # the copy has weights of its own
            for layer in case.layers(other):
                for linear in [module for module in layer.modules() if isinstance(module, nn.Linear)]:
                    linear.weight.mul_(0.5)
        changed = measure.run(other, batch)
        assert measure.error(measure.last(case, changed), ours) > 1e-2
        assert torch.equal(measure.last(case, measure.run(model, batch)), ours)
        fastencoder.reverse(other)
        assert all(type(layer) is case.layer_class() for layer in case.layers(other))
        expected = measure.last_real(case, measure.run(other, batch), batch)
        assert measure.error(measure.last_real(case, changed, batch), expected) <= measure.FP32_BAR
    assert fastencoder.is_fast(model)


# idefics, and models whose config knows only timm's towers, do not load what they saved here.
@rows([case for case in CONVERTED if case.package not in ("idefics", "pe_video", "pe_audio_video") and not case.where])
def test_save_and_reload_while_fast(case: Case, tmp_path: Path) -> None:
    models = models_of(case)
    if not hasattr(models.stock, "save_pretrained"):
        pytest.skip("a plain module")
    batch = _batch(case, models.stock)
    measure.run(models.fast, batch)  # so that whatever is built lazily is there
    for name, model in (("stock", models.stock), ("fast", models.fast)):
        model.save_pretrained(tmp_path / name)
    written = {path.name for path in (tmp_path / "stock").iterdir()}
    assert {path.name for path in (tmp_path / "fast").iterdir()} == written
    for name in written:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes(), name
    fresh, expected_info = type(models.stock).from_pretrained(tmp_path / "stock", output_loading_info=True)
    if expected_info["missing_keys"]:
        pytest.skip("the stock model does not read back what it wrote")
    fresh.eval()
    reloaded, info = type(models.stock).from_pretrained(tmp_path / "fast", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not fastencoder.is_fast(reloaded)
    for (key, value), expected in zip(reloaded.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key
    assert torch.equal(
        measure.last_real(case, measure.run(reloaded.eval(), batch), batch),
        measure.last_real(case, measure.run(fresh, batch), batch),
    )
