"""Layers whose source was not tested: compared with their own forward at their first call, and fast only if they agree."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch

from fastencoder import explain, fingerprints, registry, reverse, to_fast
from fastencoder.fingerprints.record import Record, recorded
from fastencoder.layers import trial

from . import tiny
from .conformance import batches
from .conformance.case import FAST, Absent, build
from .conformance.cases import CASES


@pytest.fixture
def drifted(monkeypatch):
    """As if every registered class had another source in the tested versions."""
    stale = {name: {"5.0.0": "0" * 16} for name in recorded().classes}
    monkeypatch.setattr(fingerprints.known, "recorded", lambda: Record(("5.0.0",), stale))
    monkeypatch.setattr(trial, "_trials", {})


def patch(monkeypatch, module, owner: str, method: str, old: str, new: str) -> None:
    """Replaces a line of a method of a transformers class, as if its file said so."""
    import ast
    import textwrap

    from fastencoder.fingerprints import source

    (definition,) = source.read(module.__name__).definitions[owner]
    (function,) = (each for each in definition.body if getattr(each, "name", None) == method)
    function = copy.deepcopy(function)
    function.args.defaults = [ast.Constant(None) for _ in function.args.defaults]
    text = textwrap.dedent(ast.unparse(function))
    assert old in text
    scope = dict(vars(module))
    exec(text.replace(old, new), scope)
    monkeypatch.setattr(getattr(module, owner), method, scope[method])


NOTE = "its source differs from the tested versions"


def test_an_honest_class_becomes_fast_at_its_first_call(drifted) -> None:
    stock, batch = tiny.bert(), tiny.ragged()
    assert {row.status for row in explain(stock)} == {"eligible"}
    assert all(NOTE in row.notes[0] and "first call" in row.notes[0] for row in explain(stock))
    fast = to_fast(copy.deepcopy(stock))
    with torch.inference_mode():
        for count in (1, 2):
            answer = fast(**batch).last_hidden_state
            assert tiny.relative_error(answer, stock(**batch).last_hidden_state, batch["attention_mask"]) < 1e-5
            assert tiny.calls(fast) == (3 * count, 0)
    assert {state.to_prove for state in tiny.states(fast)} == {(trial.UNMASKED,)}
    with torch.inference_mode():
        fast(batch["input_ids"])
    assert {state.to_prove for state in tiny.states(fast)} == {()}
    assert {row.notes for row in explain(fast)} == {(f"checked numerically against its own forward: {NOTE}",)}


def test_once_a_class_and_config(drifted, monkeypatch) -> None:
    batch, runs = tiny.ragged(), []
    difference = trial._difference
    monkeypatch.setattr(trial, "_difference", lambda layer, *rest: runs.append(layer) or difference(layer, *rest))
    for config, count in (({}, 3), ({}, 0), ({"intermediate_size": 64}, 3)):
        runs.clear()
        with torch.inference_mode():
            to_fast(tiny.bert(**config))(**batch)
        assert len(runs) == count  # each layer has another index, which its code may ask for


CHANGES = {
    "a factor": ("BertIntermediate", "forward", "self.dense(hidden_states)", "self.dense(hidden_states) * 1.01"),
    "a dropped residual": ("BertSelfOutput", "forward", "hidden_states + input_tensor", "hidden_states"),
    "another order": ("BertOutput", "forward", "hidden_states + input_tensor)", "hidden_states) + input_tensor"),
    "no mask": ("BertLayer", "forward", "attention_mask,", "None,"),
    "an error": ("BertLayer", "forward", "self_attention_output, _", "self_attention_output, _, _"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_class_that_changed_runs_its_original_forward(monkeypatch, change: str) -> None:
    monkeypatch.setattr(trial, "_trials", {})
    module = importlib.import_module("transformers.models.bert.modeling_bert")
    patch(monkeypatch, module, *CHANGES[change])
    stock, batch = tiny.bert(), tiny.ragged()
    fast = to_fast(copy.deepcopy(stock))
    if change == "an error":
        with torch.inference_mode():
            for count in range(trial.ATTEMPTS):
                expected = pytest.warns(UserWarning, match="could not be run") if count == 2 else nullcontext()
                with expected, pytest.raises(ValueError, match="unpack"):  # that of the original
                    fast(**batch)
        return
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="source of BertLayer is not that of a tested version") as caught:
            answers = [fast(**batch).last_hidden_state for _ in range(2)]
        assert len([each for each in caught if "fastencoder" in str(each.message)]) == 1
        for answer in answers:
            torch.testing.assert_close(answer, stock(**batch).last_hidden_state, rtol=0, atol=1e-5)  # the embeddings are fast
    assert tiny.calls(fast) == (0, 6)
    assert all("its fused form differs from its own forward" in row.reasons[0] for row in explain(fast))
    (report,) = {(row.status, len(row.reasons)) for row in explain(stock)}
    assert report == ("refused", 1)  # the next model of this class and config
    assert {row.status for row in explain(tiny.bert(intermediate_size=64))} == {"eligible"}
    reverse(fast)


def test_a_change_that_only_padding_shows_is_found_when_padding_comes(monkeypatch) -> None:
    monkeypatch.setattr(trial, "_trials", {})
    module = importlib.import_module("transformers.models.bert.modeling_bert")
    patch(monkeypatch, module, *CHANGES["no mask"])
    stock, batch = tiny.bert(attn_implementation="eager"), tiny.ragged()
    fast = to_fast(copy.deepcopy(stock))
    with torch.inference_mode():
        fast(batch["input_ids"])
        assert tiny.calls(fast) == (3, 0)
        with pytest.warns(UserWarning, match="original code"):
            got = fast(**batch).last_hidden_state
        torch.testing.assert_close(got, stock(**batch).last_hidden_state, rtol=0, atol=1e-5)  # the embeddings are fast
    assert tiny.calls(fast) == (3, 3)


def one_of_each_family() -> list[str]:
    """The first row of every kind of program and attention, and rows whose layers take or return something of their own."""
    first: dict[tuple, str] = {}
    for case in CASES:
        entry = registry.by_class(case.layer_class_name)
        if entry is not None and case.expect == FAST:
            adapter = entry.adapter
            first.setdefault((adapter.family, adapter.attention, bool(adapter.offsets)), case.id)
    layers = "albert.AlbertLayer bart.BartEncoderLayer canine.CanineLayer dinov2.Dinov2Layer fsmt.EncoderLayer"
    return [*first.values(), *layers.split(), "wav2vec2.Wav2Vec2EncoderLayer", "beit.BeitLayer.shared"]


@pytest.mark.parametrize("row", one_of_each_family())
def test_every_kind_of_layer_can_be_compared(drifted, row: str) -> None:
    case = next(case for case in CASES if case.id == row)
    try:
        stock = build(case)
    except Absent as reason:
        pytest.skip(str(reason))
    fast = to_fast(copy.deepcopy(stock))
    for pattern in batches.patterns(case):
        batch = batches.build(case, stock, pattern)
        before = tiny.calls(fast)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="fastencoder")
            fast(**batch.inputs)
        if case.runs_fast(batch):
            assert tiny.calls(fast)[0] > before[0] and tiny.calls(fast)[1] == before[1], (pattern, tiny.reasons(fast))


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"dtype": torch.float64}])
def test_in_any_precision(drifted, change: dict) -> None:
    fast = to_fast(tiny.bert().to(**change))
    with torch.inference_mode():
        fast(**tiny.ragged())
    assert tiny.calls(fast) == (3, 0)


def test_packed_and_nested_tokens(drifted) -> None:
    fast = to_fast(tiny.bert())
    layer = fast.encoder.layer[0]
    nested = torch.nested.nested_tensor([torch.randn(5, 48), torch.randn(3, 48)], layout=torch.jagged)
    with torch.inference_mode():
        assert layer(nested).is_nested
        offsets = torch.tensor([0, 5, 8], dtype=torch.int32)
        layer(torch.randn(1, 8, 48), cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=5, max_length_k=5)
    assert (layer._fastencoder.fast_calls, layer._fastencoder.delegated_calls) == (2, 0)


def test_a_call_that_the_layer_itself_refuses_says_nothing(drifted) -> None:
    fast, batch = to_fast(tiny.bert()), tiny.ragged()
    layer = fast.encoder.layer[0]
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="must match the size"):  # a mask that torch's attention does not take
            layer(torch.randn(5, 12, 48), batch["attention_mask"].bool())
        fast(**batch)
    assert tiny.calls(fast) == (3, 1)


def test_where_attention_is_another_librarys(drifted) -> None:
    """Flash attention takes the mask `[B, S]`, and runs on no CPU."""
    model = to_fast(tiny.bert())
    model.config._attn_implementation_internal = "flash_attention_2"
    layer, mask = model.encoder.layer[0], tiny.ragged()["attention_mask"]
    with torch.inference_mode():
        layer(torch.randn(*mask.shape, 48), mask)
    assert (layer._fastencoder.fast_calls, layer._fastencoder.delegated_calls) == (1, 0)
    assert model.config._attn_implementation == "flash_attention_2"


def test_under_a_default_device(drifted) -> None:
    layer, mask = to_fast(tiny.bert()).encoder.layer[0], tiny.ragged()["attention_mask"].bool()[:, None, None]
    hidden = torch.randn(5, 12, 48)
    with torch.inference_mode(), torch.device("meta"):
        trial.prove(layer, tuple(hidden.shape), {"hidden_states": hidden, "attention_mask": mask})
    assert layer._fastencoder.to_prove == (trial.UNMASKED,)


def test_nothing_of_the_model_is_touched(drifted) -> None:
    """Neither weights, hooks, flags nor the random numbers of a user."""
    fast = to_fast(tiny.bert())
    seen = []
    fast.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(module))
    before = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with torch.no_grad():
        fast(**tiny.ragged())
    assert torch.equal(state, torch.get_rng_state())
    assert seen == [fast.encoder.layer[1]]
    assert all(torch.equal(before[name], tensor) for name, tensor in fast.state_dict().items())
    assert all(parameter.requires_grad for parameter in fast.parameters())


def test_copies_have_to_prove_themselves_too(drifted) -> None:
    fast = to_fast(tiny.bert())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert {state.to_prove for state in tiny.states(twin)} == {trial.KINDS}


def test_a_graph_is_made_of_the_original_layers_until_an_eager_call_was_checked(drifted) -> None:
    fast, batch = to_fast(tiny.bert()), tiny.ragged()
    padding = batch["attention_mask"] == 0
    with torch.no_grad():
        compiled = torch.compile(fast, backend="eager")
        assert compiled(**batch).last_hidden_state[padding].abs().min() > 0
        fast(**batch)
        torch.compiler.reset()
        assert torch.compile(fast, backend="eager")(**batch).last_hidden_state[padding].abs().max() == 0


def test_a_class_of_another_package_is_taken_at_its_word(drifted) -> None:
    """Whoever calls `register` says what the class computes: there is nothing to compare its source with."""
    from .test_registry import third_party

    adapter = registry.by_class("transformers.models.bert.modeling_bert.BertLayer").adapter
    module = third_party()
    registry.register("third_party_encoder.MyLayer", adapter)
    try:
        assert fingerprints.find(module.MyLayer) == fingerprints.Known(adapter)
    finally:
        registry.unregister("third_party_encoder.MyLayer")
