"""The weights and batches of this folder show every term: dropping any one changes the stock output by more than 10 %.

Without this, a fast layer that forgets a bias or an eps could pass the conformance tests.
"""

from __future__ import annotations

import copy

import pytest
import torch

from . import batches, measure, mutations, weights
from .case import FAST, Absent, Case, build
from .cases import BY_ID, CASES

BAR = 0.10
NAMED = (
    "bert.BertLayer",
    "vit.ViTLayer",
    "bart.BartEncoderLayer",
    "wav2vec2.Wav2Vec2EncoderLayer",
    "dinov2.Dinov2Layer",
)
MASKS = ("attention_mask", "pixel_attention_mask", "patch_attention_mask", "input_features_mask")


def _build(case: Case) -> torch.nn.Module:
    try:
        return build(case)
    except Absent as absent:
        pytest.skip(str(absent))


def _padded(case: Case) -> str:
    known = batches.patterns(case)
    return batches.RIGHT if batches.RIGHT in known else batches.NONE


def _effects(case: Case, model: torch.nn.Module, batch: batches.Batch) -> dict[str, float]:
    """Mutation -> how far it moves the stock output, relative, over the real tokens."""
    stock = measure.last_real(case, measure.run(model, batch), batch)
    effects = {}
    for name, apply in mutations.mutations(model, case.layers(model)):
        if name.endswith(case.options.get("unread", ())):
            continue
        mutant = copy.deepcopy(model)
        apply(mutant)
        effects[name] = measure.error(measure.last_real(case, measure.run(mutant, batch), batch), stock)
    for name in MASKS:
        if name in batch.inputs and batch.real is not None:  # otherwise the model drops padding before its layers
            unmasked = copy.copy(batch)
            unmasked.inputs = {**batch.inputs, name: torch.ones_like(batch.inputs[name])}
            effects[name] = measure.error(measure.last_real(case, measure.run(model, unmasked), batch), stock)
    return effects


@pytest.mark.parametrize("case", [c for c in CASES if c.expect == FAST], ids=lambda c: c.id)
def test_every_term_shows(case: Case) -> None:
    model = _build(case)
    batch = batches.build(case, model, _padded(case))
    effects = _effects(case, model, batch)
    effects = {name: effect for name, effect in effects.items() if not name.endswith(case.options.get("unread", ()))}
    bar = case.options.get("bar", BAR)
    hidden = {name: effect for name, effect in effects.items() if effect <= bar}
    assert not hidden, f"these terms could be forgotten unseen: {hidden}"
    # eps and weight of every norm at the least
    assert len(effects) > sum(2 * len(weights.norms(layer)) for layer in case.layers(model)) > 0


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        (name, pattern)
        for name in NAMED
        for pattern in (batches.RIGHT, batches.LEFT, batches.HOLES, batches.EMPTY, batches.SINGLE)
        if BY_ID[name].inputs != "image" and pattern in batches.patterns(BY_ID[name])
    ],
)
def test_mask_shows_in_every_pattern(name: str, pattern: str) -> None:
    case = BY_ID[name]
    model = _build(case)
    batch = batches.build(case, model, pattern)
    assert _effects_of_mask(case, model, batch) > BAR


def _effects_of_mask(case: Case, model: torch.nn.Module, batch: batches.Batch) -> float:
    stock = measure.last_real(case, measure.run(model, batch), batch)
    without = copy.copy(batch)
    without.inputs = {key: value for key, value in batch.inputs.items() if key not in MASKS}
    return measure.error(measure.last_real(case, measure.run(model, without), batch), stock)


@pytest.mark.parametrize("name", NAMED)
def test_terms_of_the_five_named_models(name: str) -> None:
    """The terms that must be among the mutations: a search that finds nothing would pass the test above."""
    case = BY_ID[name]
    model = _build(case)
    found = {mutation for mutation, _ in mutations.mutations(model, case.layers(model))}
    layers = len(case.layers(model))
    assert sum(mutation.endswith(".eps") for mutation in found) == 2 * layers
    assert sum(mutation.endswith((".scaling", ".scale")) for mutation in found) == layers
    linears = 5  # query, value, output, and the two of the feed-forward
    norms = 2
    assert sum(mutation.endswith(".bias") for mutation in found) == (linears + norms) * layers
    assert sum("lambda" in mutation for mutation in found) == (2 * layers if "dinov2" in name else 0)


@pytest.mark.parametrize("name", NAMED)
def test_norms_have_eps_of_their_own(name: str) -> None:
    """Exchanging the eps of the two norms of a layer would show."""
    model = _build(BY_ID[name])
    for layer in BY_ID[name].layers(model):
        eps = [norm.eps for norm in layer.modules() if isinstance(norm, torch.nn.LayerNorm)]
        assert len(set(eps)) == len(eps) == 2


@pytest.mark.parametrize("name", NAMED)
def test_key_bias_is_the_one_term_without_effect(name: str) -> None:
    """softmax(q.(k + b)) = softmax(q.k): why the key biases are no mutation of the tests above."""
    case = BY_ID[name]
    model = _build(case).double()
    batch = batches.build(case, model, _padded(case)).to(torch.float64)
    stock = measure.last_real(case, measure.run(model, batch), batch)
    found = list(mutations.key_bias_mutations(model, case.layers(model)))
    assert len(found) == len(case.layers(model))
    for _, apply in found:
        apply(model)
    assert measure.error(measure.last_real(case, measure.run(model, batch), batch), stock) < 1e-12


@pytest.mark.parametrize("name", NAMED)
def test_activation_shows(name: str) -> None:
    """Exact and tanh GELU differ by at most 5e-4: still far more than the fp32 bar."""
    case = BY_ID[name]
    model = _build(case)
    batch = batches.build(case, model, _padded(case))
    stock = measure.last_real(case, measure.run(model, batch), batch)
    changed = 0
    for layer in case.layers(model):
        for module in layer.modules():
            for child_name, child in module.named_children():
                if "GELU" in type(child).__name__:
                    setattr(module, child_name, torch.nn.GELU(approximate="tanh"))
                    changed += 1
            for attribute in ("activation_fn", "intermediate_act_fn"):
                if getattr(module, attribute, None) is torch.nn.functional.gelu:
                    setattr(module, attribute, torch.nn.GELU(approximate="tanh"))
                    changed += 1
    assert changed == len(case.layers(model))
    assert measure.error(measure.last_real(case, measure.run(model, batch), batch), stock) > 5 * measure.FP32_BAR


@pytest.mark.parametrize("name", NAMED)
def test_stock_fp32_is_well_below_the_bar(name: str) -> None:
    """The weights are sharp, yet not so sharp that fp32 itself could not hold the bar."""
    case = BY_ID[name]
    model = _build(case)
    batch = batches.build(case, model, _padded(case))
    exact = measure.last_real(case, measure.reference(case, measure.double(case, model), batch), batch)
    assert measure.error(measure.last_real(case, measure.run(model, batch), batch), exact) < measure.FP32_BAR / 4
