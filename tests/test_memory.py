"""`to_fast(model, memory=...)`: what a converted model takes beside its parameters, promised, counted and measured."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastencoder import AlreadyFastError, NotEligibleError, explain, is_fast, reverse, to_fast
from fastencoder.kernels.linear import cpu as linear_cpu
from fastencoder.kernels.linear.cpu_native import Panels

from . import tiny
from .conformance import batches, measure
from .conformance.cases import BY_ID
from .conformance.fast import calls, models_of
from .test_weights import CHANGES


def _run(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch).last_hidden_state


def _linear_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.encoder.parameters() if p.dim() == 2)


def _storages(model: nn.Module) -> dict[int, int]:
    """Address and size of all memory that the parameters lie in."""
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_keeps_no_copy(dtype: torch.dtype) -> None:
    model, batch = tiny.bert().to(dtype), tiny.ragged()
    before = sum(_storages(model).values())
    promised = explain(model, memory="lean")
    to_fast(model, memory="lean")
    _run(model, batch)
    own, kept = _storages(model), 0
    for state in tiny.states(model):
        projections = state.projections
        for tensor in _tensors(projections):
            if tensor.is_mkldnn or tensor.untyped_storage().data_ptr() not in own:
                kept += tensor.numel() * tensor.element_size()
    assert sum(own.values()) == before
    assert kept == promised.extra_bytes == explain(model).extra_bytes == 0
    assert tiny.calls(model) == (3, 0)


def _tensors(projections: object) -> list[torch.Tensor]:
    """Every tensor that a layer's projections hold."""
    found, left, seen = [], [projections], set()
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, (list, tuple)):
            left.extend(thing)
        elif isinstance(thing, dict):
            left.extend(thing.values())
        elif type(thing).__module__.startswith(("fastencoder.layers", "fastencoder.kernels")):
            left.extend(value for name, value in vars(thing).items() if name != "spec")
    return found


def test_the_count_finds_what_default_keeps() -> None:
    """Of the test above: it would see a copy."""
    model = to_fast(tiny.bert())
    _run(model, tiny.ragged())
    own = _storages(model)
    tensors = [tensor for state in tiny.states(model) for tensor in _tensors(state.projections)]
    copies = [tensor for tensor in tensors if tensor.is_mkldnn or tensor.untyped_storage().data_ptr() not in own]
    kept = sum(tensor.numel() * tensor.element_size() for tensor in copies)
    probes = sum(saved.nbytes for state in tiny.states(model) for _, saved in state.projections._probes)
    packed = [weight for state in tiny.states(model) for weight in tiny.packed_weights(state.projections)]
    filled_up = sum(weight.weight.nbytes - tiny.packed_bytes(weight) for weight in packed if isinstance(weight, Panels))
    assert explain(model).extra_bytes == _linear_bytes(model) == kept - probes - filled_up


def test_explain_says_both() -> None:
    model = tiny.bert()
    linear = _linear_bytes(model)
    report, lean = explain(model), explain(model, memory="lean")
    assert (report.extra_bytes, report.lean_bytes) == (linear, 0)
    assert (lean.extra_bytes, lean.lean_bytes) == (0, 0)
    assert report.summary().endswith('extra memory 0.2 MiB, with memory="lean" 0.0 MiB')
    assert json.loads(json.dumps(report.to_dict()))["lean_bytes"] == 0
    assert explain(to_fast(model, memory="lean")).extra_bytes == 0  # as it was converted


FAMILIES = (
    "bert.BertLayer",
    "vit.ViTLayer",
    "modernbert.ModernBertEncoderLayer",
    "eurobert.EuroBertDecoderLayer",
    "t5.T5Block.gated_encoder",
    "deberta_v2.DebertaV2Layer",
    "swin.SwinLayer",
    "torch.TransformerEncoderLayer.nested",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_lean_answers_are_those_of_the_stock_model(name: str) -> None:
    case = BY_ID[name]
    models = models_of(case)
    lean = to_fast(copy.deepcopy(models.stock), memory="lean")
    for pattern in batches.patterns(case):
        batch = batches.build(case, models.stock, pattern)
        exact = measure.last_real(case, measure.reference(case, models.exact, batch), batch)
        value = measure.last_real(case, measure.run(lean, batch), batch)
        assert measure.error(value, exact) < measure.FP32_BAR, pattern
    assert calls(lean)[0] > 0 and calls(lean)[1] == 0
    assert explain(lean).extra_bytes == 0


def test_lean_and_back() -> None:
    model, batch = tiny.bert(), tiny.ragged()
    state, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, _run(model, batch)
    identity = [id(parameter) for parameter in model.parameters()]
    to_fast(model, memory="lean")
    lean = _run(model, batch)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_run(twin, batch), lean)
        assert {each.settings.memory for each in tiny.states(twin)} == {"lean"}
    reverse(model)
    assert [id(parameter) for parameter in model.parameters()] == identity
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in model.parameters())
    assert torch.equal(_run(model, batch), expected)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_changed_weights_take_effect(change) -> None:
    stock, batch = tiny.bert(), tiny.ragged()
    model = to_fast(copy.deepcopy(stock), memory="lean")
    before = _run(model, batch)
    for each in (stock, model):
        change(each)
    after = _run(model, batch)
    assert tiny.relative_error(after, _run(stock, batch), batch["attention_mask"]) < 1e-5
    assert tiny.relative_error(after, before, batch["attention_mask"]) > 0.01


def test_tied_projections_stay_tied() -> None:
    model, batch = tiny.bert(), tiny.ragged()
    for layer in model.encoder.layer:
        layer.attention.self.key.weight = layer.attention.self.query.weight
    expected = _run(model, batch)
    to_fast(model, memory="lean")
    assert tiny.relative_error(_run(model, batch), expected, batch["attention_mask"]) < 1e-5
    attention = model.encoder.layer[0].attention.self
    assert attention.key.weight is attention.query.weight
    assert explain(model).extra_bytes == 0


def test_lean_with_a_dtype_that_takes_a_copy_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(linear_cpu, "float32_is_faster", lambda dtype, tokens: False)
    monkeypatch.setattr(linear_cpu, "_multiplies", lambda dtype: True)
    model = tiny.bert()
    with pytest.raises(NotEligibleError, match=r"takes a copy of the weights, which memory='lean' does not keep"):
        to_fast(model, compute_dtype=torch.bfloat16, memory="lean")
    assert not is_fast(model)
    monkeypatch.setattr(linear_cpu, "is_faster_than_float32", lambda dtype: dtype != torch.bfloat16)
    to_fast(model, compute_dtype=torch.bfloat16, memory="lean")  # this processor computes in float32: no copy
    assert explain(model).extra_bytes == 0


@pytest.mark.parametrize("value", ["small", None, True])
def test_other_values_are_errors(value) -> None:
    model = tiny.bert()
    for function in (to_fast, explain):
        with pytest.raises(ValueError, match="it may be 'default' or 'lean'"):
            function(model, memory=value)
    assert not is_fast(model)


def test_converted_again_with_another_value() -> None:
    model, batch = to_fast(tiny.bert()), tiny.ragged()
    _run(model, batch)
    with pytest.raises(AlreadyFastError, match="also with other settings"):
        to_fast(model, memory="lean")
    to_fast(reverse(model), memory="lean")
    assert tiny.relative_error(_run(model, batch), _run(tiny.bert(), batch), batch["attention_mask"]) < 1e-5
    assert explain(model).extra_bytes == 0


# Prints the resident bytes that a model of 8 layers takes at its peak, in a process of its own, and its linear weights' bytes.
PROCESS = """
import sys, torch
from transformers.models.bert.modeling_bert import BertConfig, BertModel
from fastencoder import to_fast


def kib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":"))


mode = sys.argv[1]
config = BertConfig(vocab_size=99, num_hidden_layers=8)
batch = {"input_ids": torch.ones(2, 16, dtype=torch.long), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
batch["attention_mask"][0, 9:] = 0
small = BertModel(BertConfig(vocab_size=99, num_hidden_layers=1, hidden_size=48, intermediate_size=64)).eval()
with torch.inference_mode():
    (small if mode == "stock" else to_fast(small))(**batch)  # code that is loaded once
before = kib("VmRSS")
with torch.device("meta"):
    model = BertModel(config)
model = model.to_empty(device="cpu").eval()
with torch.no_grad():
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(0.01 if tensor.is_floating_point() else 0)
if mode != "stock":
    to_fast(model, memory=mode)
with torch.inference_mode():
    for _ in range(3):
        model(**batch)
linear = sum(p.nbytes for p in model.encoder.parameters() if p.dim() == 2)
print((kib("VmHWM") - before) * 1024, linear)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_at_its_peak() -> None:
    root = Path(__file__).parents[1]
    started = {
        mode: subprocess.Popen(
            [sys.executable, "-c", PROCESS, mode], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for mode in ("stock", "lean", "default")
    }
    peak = {}
    for mode, process in started.items():
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        peak[mode], linear = map(int, said.split())
    assert peak["stock"] > linear > 200 * 2**20
    assert peak["lean"] <= 1.05 * peak["stock"], peak
    assert peak["stock"] + 0.9 * linear <= peak["default"] <= 1.05 * peak["stock"] + linear, peak


@pytest.mark.parametrize("what", ["few tokens", "many tokens", "image", "layer"])
def test_a_forward_leaves_nothing_to_the_garbage_collector(what: str) -> None:
    """A cycle would keep its tensors, and those of its callers, until the collector comes by."""
    model = to_fast(tiny.vit() if what == "image" else tiny.bert())
    inputs = {
        "few tokens": tiny.ragged(),
        "many tokens": tiny.ragged(seqlen=30),
        "image": {"pixel_values": torch.randn(2, 3, 32, 32)},
        "layer": {"hidden_states": torch.randn(2, 5, 48)},
    }[what]
    called = model.encoder.layer[0] if what == "layer" else model

    def forward() -> None:
        with torch.inference_mode():
            called(**inputs)

    forward()
    gc.collect()
    gc.freeze()  # what tests before this one have left
    gc.disable()
    try:
        forward()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [type(each).__name__ for each in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()
    assert tiny.calls(model)[0] > 0 and not left
