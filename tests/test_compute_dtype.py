"""`to_fast(model, compute_dtype=...)`: 16-bit products inside the fast layers, the model's own dtype everywhere else."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from fastencoder import AlreadyFastError, NotEligibleError, explain, fast, is_fast, reverse, to_fast, warmup
from fastencoder.kernels.linear import cpu as linear_cpu
from fastencoder.layers import weights
from fastencoder.layers.settings import COMPUTE_DTYPES
from fastencoder.layers.stack import Stack
from fastencoder.layers.weights import Projections
from fastencoder.runtime import graphs

from . import tiny
from .test_attention_level import case_of
from .test_compile import Compiled
from .test_graphs import _Replayed
from .test_trial import drifted  # noqa: F401
from .test_weights import CHANGES

BF16 = torch.bfloat16


@pytest.fixture
def fast_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies 16 bits faster than 32."""
    monkeypatch.setattr(linear_cpu, "float32_is_faster", lambda dtype, tokens: False)
    monkeypatch.setattr(linear_cpu, "_multiplies", lambda dtype: True)


@pytest.fixture
def slow_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an x86 processor with neither AMX nor VNNI."""
    monkeypatch.setattr(linear_cpu.cpu_native, "in_fixed_point", lambda dtype: False)
    monkeypatch.setattr(linear_cpu, "float32_is_faster", lambda dtype, tokens: dtype == BF16 and tokens >= 64)


def _run(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch).last_hidden_state


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _is_state(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    same = (now[name].dtype == tensor.dtype and torch.equal(now[name], tensor) for name, tensor in state.items())
    return now.keys() == state.keys() and all(same)


class Seen:
    """The dtypes of what enters the stack, each layer's first product, and what the padded hidden states are made of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products: list[torch.dtype] = []
        self.entered = 0
        qkv, entering = Projections.qkv, Projections.entering

        def seen_qkv(projections: Projections, x: torch.Tensor):
            self.products.append(x.dtype)
            return qkv(projections, x)

        def seen_entering(projections: Projections, x: torch.Tensor):
            self.entered += 1
            return entering(projections, x)

        monkeypatch.setattr(Projections, "qkv", seen_qkv)
        monkeypatch.setattr(Projections, "entering", seen_entering)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layers_compute_in_it_and_everything_else_does_not(fast_in_16_bits, monkeypatch, dtype) -> None:
    model, batch = tiny.bert(), tiny.ragged()
    stock, state = copy.deepcopy(model), _state(model)
    exact = _run(copy.deepcopy(stock).double(), batch)
    assert to_fast(model, compute_dtype=dtype) is model
    seen = Seen(monkeypatch)
    output = _run(model, batch)
    assert seen.products == [dtype] * 3
    assert seen.entered == 1  # packed tokens stay in it between the layers
    assert output.dtype == torch.float32
    assert not output[~batch["attention_mask"].bool()].any()
    error = tiny.relative_error(output, exact, batch["attention_mask"])
    assert 1e-5 < error <= 1.5 * tiny.relative_error(_run(stock.to(dtype), batch), exact, batch["attention_mask"])
    assert tiny.calls(model) == (3, 0)
    assert _is_state(model, state)
    reverse(model)
    assert _is_state(model, state)
    assert torch.equal(_run(model, batch), _run(tiny.bert(), batch))


def test_hidden_states_of_every_layer_have_the_models_dtype(fast_in_16_bits) -> None:
    model, batch = to_fast(tiny.bert(), compute_dtype=BF16), tiny.ragged()
    with torch.inference_mode():
        output = model(**batch, output_hidden_states=True)
    assert {hidden.dtype for hidden in output.hidden_states} == {torch.float32}
    # Nobody sees a difference between tokens that travel packed and tokens that do not: each layer's output was rounded to it.
    assert torch.equal(output.last_hidden_state, _run(model, batch))
    assert tiny.calls(model) == (6, 0)


def test_a_layer_that_delegates_is_given_the_models_dtype(fast_in_16_bits) -> None:
    model, batch = to_fast(tiny.bert(), compute_dtype=BF16), tiny.ragged()
    seen = []
    model.encoder.layer[1].output.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    output = _run(model, batch)
    assert seen == [torch.float32]
    assert tiny.calls(model) == (2, 1)
    assert output.dtype == torch.float32
    assert tiny.relative_error(output, _run(tiny.bert(), batch), batch["attention_mask"]) < 0.01


def test_float32_inside_a_model_of_16_bits() -> None:
    model, batch = tiny.bert().bfloat16(), tiny.ragged()
    exact = _run(copy.deepcopy(model).double(), batch)
    stock = tiny.relative_error(_run(model, batch), exact, batch["attention_mask"])
    output = _run(to_fast(model, compute_dtype=torch.float32), batch)
    assert output.dtype == BF16
    assert tiny.relative_error(output, exact, batch["attention_mask"]) < 0.7 * stock
    assert explain(model).extra_bytes == 2 * sum(p.nbytes for p in model.encoder.parameters() if p.dim() == 2)


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES)
def test_a_model_of_float64(dtype) -> None:
    """No kernel multiplies its weights as they are."""
    model, batch = tiny.bert().double(), tiny.ragged()
    exact = _run(model, batch)
    output = _run(to_fast(model, compute_dtype=dtype), batch)
    assert output.dtype == torch.float64
    assert 0 < tiny.relative_error(output, exact, batch["attention_mask"]) < 10 * torch.finfo(dtype).eps
    assert tiny.calls(model) == (3, 0)


def test_a_model_in_that_dtype_already_is_as_without() -> None:
    model, batch = tiny.bert().bfloat16(), tiny.ragged()
    with fast(copy.deepcopy(model)) as plain:
        expected, memory = _run(plain, batch), explain(plain).extra_bytes
    to_fast(model, compute_dtype=BF16)
    assert torch.equal(_run(model, batch), expected)
    assert explain(model).extra_bytes == memory


@pytest.mark.parametrize("rows", [1, 9])
def test_a_processor_that_is_slower_in_it_computes_as_without(slow_in_16_bits, rows: int) -> None:
    """Few tokens and many: there is one copy of the weights, in float32."""
    stock, batch = tiny.bert(), tiny.ragged(max(rows, 5), 12)
    batch = {name: value[:rows] for name, value in batch.items()}
    expected = _run(to_fast(copy.deepcopy(stock)), batch)
    promised = explain(stock, compute_dtype=BF16)
    model = to_fast(stock, compute_dtype=BF16)
    assert torch.equal(_run(model, batch), expected)
    for report in (promised, explain(model)):
        assert report.extra_bytes == explain(tiny.bert()).extra_bytes
        assert {row.compute_dtype for row in report} == {"float32"}
        assert {row.notes for row in report} == {("computes in float32: this processor is no faster in bfloat16",)}


def test_memory_is_what_explain_says(fast_in_16_bits) -> None:
    model = tiny.bert()
    linear = sum(p.nbytes for p in model.encoder.parameters() if p.dim() == 2)
    promised = explain(model, compute_dtype=BF16)
    to_fast(model, compute_dtype=BF16)
    _run(model, tiny.ragged())
    kept = []
    for state in tiny.states(model):
        projections = state.projections
        kept += tiny.packed_weights(projections)
    assert {weight.dtype for weight in kept} == {BF16}
    bytes_kept = sum(map(tiny.packed_bytes, kept))
    assert linear // 2 <= bytes_kept <= 1.05 * linear / 2  # numbers in fixed point share scales
    for report in (promised, explain(model)):
        assert report.extra_bytes == bytes_kept
        assert report.lean_bytes is None
        assert {row.compute_dtype for row in report} == {"bfloat16"}
        assert "computes in bfloat16" in report.summary()


@pytest.mark.parametrize("as_on_cuda", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_changed_weights_take_effect(fast_in_16_bits, monkeypatch, change, as_on_cuda: bool) -> None:
    if as_on_cuda:
        monkeypatch.setattr(weights, "on_gpu", lambda device: True)
    stock, batch = tiny.bert(), tiny.ragged()
    model = to_fast(copy.deepcopy(stock), compute_dtype=BF16)
    before = _run(model, batch)
    for each in (stock, model):
        change(each)
    after = _run(model, batch)
    assert tiny.relative_error(after, _run(stock, batch), batch["attention_mask"]) < 0.01
    assert tiny.relative_error(after, before, batch["attention_mask"]) > 0.02
    assert tiny.calls(model) == (6, 0)


def test_parameters_keep_their_storage_on_cuda(fast_in_16_bits, monkeypatch) -> None:
    """Weights are kept as on a CUDA device; the kernels stay the CPU's."""
    monkeypatch.setattr(weights, "on_gpu", lambda device: True)
    model, batch = tiny.bert(), tiny.ragged()
    where = [parameter.data_ptr() for parameter in model.parameters()]
    exact = _run(copy.deepcopy(model).double(), batch)
    stock = _run(copy.deepcopy(model).to(BF16), batch)
    to_fast(model, compute_dtype=BF16)
    output = _run(model, batch)
    assert {state.projections.layout for state in tiny.states(model)} == {"cast"}
    assert [parameter.data_ptr() for parameter in model.parameters()] == where
    mask = batch["attention_mask"]
    assert 1e-4 < tiny.relative_error(output, exact, mask) <= 1.5 * tiny.relative_error(stock, exact, mask)


def test_copies_and_casts(fast_in_16_bits, monkeypatch) -> None:
    model, batch = to_fast(tiny.bert(), compute_dtype=BF16), tiny.ragged()
    expected = _run(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_run(twin, batch), expected)
        reverse(twin)
        assert torch.equal(_run(twin, batch), _run(tiny.bert(), batch))
    half = copy.deepcopy(model).half()
    seen = Seen(monkeypatch)
    output = _run(half, batch)
    assert output.dtype == torch.float16
    assert seen.products == [BF16] * 3
    assert tiny.relative_error(output, _run(tiny.bert(), batch), batch["attention_mask"]) < 0.02
    assert torch.equal(_run(model.bfloat16(), batch), _run(to_fast(tiny.bert().bfloat16()), batch))


def test_training_gradients_and_autocast_run_the_original(fast_in_16_bits) -> None:
    model, batch = to_fast(tiny.bert(), compute_dtype=BF16), tiny.ragged()
    stock = tiny.bert()
    with torch.no_grad(), torch.autocast("cpu", BF16):
        assert torch.equal(model(**batch).last_hidden_state, stock(**batch).last_hidden_state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that gradients are enabled, once in a process
        output = model(**batch).last_hidden_state
    assert torch.equal(output, stock(**batch).last_hidden_state)
    assert tiny.calls(model) == (0, 6)


class _Doubled(nn.Module):
    """Somebody's own linear."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def _opaque(model: nn.Module) -> None:
    attention = model.encoder.layer[1].attention.self
    attention.value = _Doubled(attention.value).eval()


def test_an_opaque_part_is_refused_and_nothing_is_touched(fast_in_16_bits) -> None:
    model = tiny.bert()
    _opaque(model)
    state = _state(model)
    with pytest.raises(NotEligibleError, match=r"attention\.self\.value is no plain linear .* not in torch\.bfloat16"):
        to_fast(model, compute_dtype=BF16)
    assert not is_fast(model)
    assert _is_state(model, state)
    assert [row.status for row in explain(model, compute_dtype=BF16)] == ["eligible", "refused", "eligible"]
    assert [row.status for row in explain(model)] == ["eligible"] * 3
    to_fast(model, strict=False, compute_dtype=BF16)
    assert [row.status for row in explain(model)].count("fast") == 2


def test_an_opaque_part_that_comes_later_is_computed_in_its_own_dtype(fast_in_16_bits, monkeypatch) -> None:
    stock, batch = tiny.bert(), tiny.ragged()
    model = to_fast(copy.deepcopy(stock), compute_dtype=BF16)
    for each in (stock, model):
        _opaque(each)
    seen = Seen(monkeypatch)
    output = _run(model, batch)
    assert seen.products == [BF16, torch.float32, BF16]
    assert output.dtype == torch.float32
    assert tiny.relative_error(output, _run(stock, batch), batch["attention_mask"]) < 0.01
    (note,) = explain(model).rows[1].notes
    assert note.startswith("computes in float32: attention.self.value is no plain linear")


def test_weights_made_in_inference_mode_are_refused(fast_in_16_bits) -> None:
    with torch.inference_mode():
        model = tiny.bert()
    with pytest.raises(NotEligibleError, match="made in inference mode"):
        to_fast(model, compute_dtype=BF16)


def test_attention_alone_is_refused(fast_in_16_bits) -> None:
    model = case_of("mobilebert").build()
    assert {row.level for row in explain(model)} == {"attention"}
    with pytest.raises(NotEligibleError, match="only its attention is understood, so it cannot"):
        to_fast(model, compute_dtype=BF16)
    assert not is_fast(model)
    with pytest.raises(NotEligibleError):
        to_fast(model, strict=False, compute_dtype=BF16)  # there is nothing else to convert
    assert is_fast(to_fast(model))


@pytest.mark.parametrize("value", [torch.float64, torch.int8, "bfloat16"])
def test_other_values_are_errors(value) -> None:
    model = tiny.bert()
    for function in (to_fast, explain):
        with pytest.raises(ValueError, match=r"it may be None, torch\.bfloat16, torch\.float16, torch\.float32"):
            function(model, compute_dtype=value)
    assert not is_fast(model)


def test_converted_again_with_another_value() -> None:
    model = to_fast(tiny.bert(), compute_dtype=BF16)
    with pytest.raises(AlreadyFastError, match=r"call reverse\(model\) first .* also with other settings"):
        to_fast(model, compute_dtype=torch.float16)
    assert {state.settings.compute_dtype for state in tiny.states(model)} == {BF16}
    to_fast(reverse(model), compute_dtype=torch.float16)
    assert {state.settings.compute_dtype for state in tiny.states(model)} == {torch.float16}


@pytest.mark.usefixtures("drifted")
def test_a_class_of_another_source_is_compared_in_float32(fast_in_16_bits) -> None:
    """The comparison is about what a layer computes: 16 bits would hide small differences, or fail honest layers."""
    model, batch = to_fast(tiny.bert(), compute_dtype=BF16), tiny.ragged()
    output = _run(model, batch)
    assert tiny.calls(model) == (3, 0)
    assert torch.equal(output, _run(to_fast(tiny.bert(), compute_dtype=BF16), batch))
    assert output.dtype == torch.float32


def test_warmup_prepares_the_copies(fast_in_16_bits) -> None:
    model = to_fast(tiny.bert(), compute_dtype=BF16)
    warmup(model, [(2, 8)])
    before = [state.projections for state in tiny.states(model)]
    _run(model, tiny.ragged())
    assert [state.projections for state in tiny.states(model)] == before


@pytest.mark.parametrize("pattern", ["padding", "none", "causal"])
def test_in_a_compiled_graph(fast_in_16_bits, pattern: str) -> None:
    torch._dynamo.reset()
    stock, batch = tiny.bert(), tiny.ragged()
    model = to_fast(copy.deepcopy(stock), compute_dtype=BF16)
    mask = batch["attention_mask"]
    if pattern == "none":
        batch["attention_mask"] = mask = torch.ones_like(mask)
    if pattern == "causal":  # no padding: the operator attends under the mask that it was given
        causal = torch.zeros(1, 1, 12, 12).masked_fill_(torch.ones(12, 12).triu(1).bool(), torch.finfo(torch.float32).min)
        batch["attention_mask"], mask = causal.expand(5, -1, -1, -1).clone(), torch.ones_like(mask)
    exact, low = _run(copy.deepcopy(stock).double(), _to(batch, torch.float64)), copy.deepcopy(stock).to(BF16)
    bound = tiny.relative_error(_run(low, _to(batch, BF16)), exact, mask)
    compiled = Compiled(model, fullgraph=True)
    with torch.no_grad():
        output = compiled(**batch).last_hidden_state
    assert output.dtype == torch.float32
    assert compiled.operators()["linear"] == 18
    assert 1e-4 < tiny.relative_error(output, exact, mask) <= 1.5 * bound


def _to(batch: dict, dtype: torch.dtype) -> dict:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def test_in_a_cuda_graph(fast_in_16_bits, monkeypatch) -> None:

    def capture(function, device, pool):
        graph = _Replayed(function)
        return graph, graph.output

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "new_pool", lambda device: object())
    monkeypatch.setattr(graphs, "has_graphs", lambda device: True)
    model, batch = to_fast(tiny.bert(), cuda_graphs=True, compute_dtype=BF16), tiny.ragged()
    stock = to_fast(tiny.bert(), compute_dtype=BF16)
    expected = _run(stock, batch)
    for _ in range(3):
        output = _run(model, batch)
        assert output.dtype == torch.float32
        assert tiny.relative_error(output, expected, batch["attention_mask"]) < 0.005
    (stack,) = Stack.installed(model.encoder)
    assert stack.graphs.replays == 2
