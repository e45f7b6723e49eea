"""Random models: a conformance row with another size, activation, eps and scale of its weights, converted, against stock."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import nn

import fastencoder
from tests.conformance import batches, batches_encoders, batches_images, batches_rope, measure
from tests.conformance import case as case_module
from tests.conformance.case import FAST, Case
from tests.conformance.cases import BY_ID, CASES

# The bar of the conformance tests in float32, and what stands for it in bfloat16. Their weights are calibrated; these are
# scaled and deeper, so that rounding may grow. It does so in the stock model as well: up to four times its own error passes,
# and because a single small batch is a matter of luck, up to four times the largest that it has when the last bits of its
# parameters are others. A wrong term is off by 10 % (tests/conformance/weights.py).
BARS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
TIMES_STOCK = 4.0
NUDGES = 8

ROWS = [case.id for case in CASES if case.expect == FAST]
ENTRIES = ("forward", "hidden states", "other padding", "block", "reversed and again", "loaded")
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
# What is drawn for a row's config, where the row sets it.
TWEAKS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("hidden_act", "activation_function"), ACTIVATIONS),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "hidden_dim", "d_ff", "ffn_dim"), (8, 33, 64, 100)),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "n_layers"), (1, 2, 4)),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "n_heads"), (1, 2, 4)),
}


@dataclass(frozen=True)
class Call:
    """One comparison: what is called how, on a batch of this many rows and tokens (where the row's inputs let them vary)."""

    entry: str
    pattern: str
    rows: int
    size: int
    seed: int


@dataclass(frozen=True)
class Model:
    """A row of tests/conformance with changes, and the calls that are compared."""

    row: str
    config: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    scale: float = 1.0  # of the layers' matrices
    dtype: str = "float32"  # or "bfloat16", or "compute bfloat16" for a float32 model with that compute_dtype
    memory: str = "default"
    calls: tuple[Call, ...] = ()


@st.composite
def models(draw: st.DrawFn, rows: tuple[str, ...] = tuple(ROWS), most_calls: int = 12) -> Model:
    row = draw(st.sampled_from(rows))
    case = BY_ID[row]
    known = [name for name in TWEAKS if name in case.config and isinstance(case.config[name], (int, str))]
    chosen = draw(st.lists(st.sampled_from(known), unique=True, max_size=2)) if known else []
    config = tuple((name, draw(st.sampled_from(TWEAKS[name]))) for name in sorted(chosen))
    dtype = draw(st.sampled_from(("float32", "float32", "bfloat16", "compute bfloat16")))
    memory = "default" if dtype == "compute bfloat16" else draw(st.sampled_from(("default", "lean")))
    call = st.builds(
        Call,
        entry=st.sampled_from((*ENTRIES, "forward", "other padding")),
        pattern=st.sampled_from(batches.patterns(case)),
        rows=st.integers(1, 4),
        size=st.integers(1, 20),
        seed=st.integers(0, 2**16),
    )
    calls = tuple(draw(st.lists(call, min_size=1, max_size=most_calls)))
    return Model(row, config, draw(st.integers(0, 3)), draw(st.sampled_from((1.0, 0.3, 2.5))), dtype, memory, calls)


class Impossible(Exception):
    """transformers cannot build this model, or fastencoder refuses it with a reason."""


@dataclass
class Built:
    case: Case
    stock: nn.Module  # in the dtype of the example
    exact: nn.Module  # in float64
    fast: nn.Module
    options: dict[str, Any]
    bar_dtype: torch.dtype  # what the fast layers compute in


@lru_cache(maxsize=16)
def built(example: Model) -> Built:
    """The models of an example without its calls. Raises Impossible."""
    row = BY_ID[example.row]
    case = dataclasses.replace(row, config={**row.config, **dict(example.config)})
    half = example.dtype == "bfloat16"
    options = {"memory": example.memory}
    if example.dtype == "compute bfloat16":
        options = {"compute_dtype": torch.bfloat16}
    try:
        stock = case_module.build(case, seed=example.seed)
    except Exception as error:  # a size that the class does not take
        raise Impossible(f"{type(error).__name__}: {error}") from None
    with torch.no_grad():
        for layer in case.layers(stock):
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(example.scale)
    stock = stock.to(torch.bfloat16) if half else stock
    exact = measure.double(case, stock)
    try:
        fast = fastencoder.to_fast(copy.deepcopy(stock), **options)
    except fastencoder.NotEligibleError as error:
        raise Impossible(str(error)) from None
    computed = {layer.compute_dtype for layer in fastencoder.explain(fast) if layer.compute_dtype}
    low = half or "bfloat16" in computed
    return Built(case, stock, exact, fast, options, torch.bfloat16 if low else torch.float32)


@contextlib.contextmanager
def random_masks(call: Call) -> Iterator[None]:
    """The builders of batches are given masks of this call's own shape instead of their usual ones."""

    def mask(pattern: str, size: int = 13, seed: int = 0) -> torch.Tensor | None:
        generator = torch.Generator().manual_seed(call.seed + 31 * size)
        rows = 1 if pattern == batches.SINGLE else call.rows
        columns = torch.arange(size)
        lengths = torch.randint(1, max(size, 2), (rows, 1), generator=generator)
        if pattern == batches.NONE:
            return None
        if pattern == batches.ONES:
            lengths[:] = size
        if pattern == batches.FULL:
            lengths[0] = size
        if pattern == batches.EMPTY:
            lengths[torch.rand(rows, generator=generator) < 0.5] = 0
        if pattern == batches.HOLES:
            return torch.rand(rows, size, generator=generator).lt(0.6).scatter(1, lengths.clamp(max=size - 1), True).long()
        tokens = (columns < lengths).long()
        return tokens.flip(1) if pattern == batches.LEFT else tokens

    with contextlib.ExitStack() as stack:
        for module in (batches, batches_encoders, batches_images, batches_rope):
            stack.enter_context(mock.patch.object(module, "mask", mask))
        yield


def batch_of(example: Model, call: Call, model: nn.Module, case: Case) -> batches.Batch:
    sized = case
    if case.inputs in ("text", "seq2seq") and "size" not in case.options:
        sized = dataclasses.replace(case, options={**case.options, "size": call.size})
    with random_masks(call):
        return batches.build(sized, model, call.pattern, seed=zlib.crc32(repr(call).encode()) % 2**20)


def check(example: Model) -> int:
    """Compares every call of the example; returns how many. Raises AssertionError at a difference, Impossible for a model that
    cannot be had."""
    models = built(dataclasses.replace(example, calls=()))
    for call in example.calls:
        try:
            batch = batch_of(example, call, models.stock, models.case)
            batch = batch.to(next(models.stock.parameters()).dtype)
            measure.run(models.stock, batch)
        except Exception as error:  # inputs that the builders cannot make for it, or that the stock model does not take
            raise Impossible(f"{type(error).__name__}: {error}") from None
        _CHECKS[call.entry](models, batch, call)
    return len(example.calls)


def _judge(models: Built, fast: nn.Module, stock: nn.Module, exact: nn.Module, batch: batches.Batch) -> None:
    case = models.case
    reference = measure.last_real(case, measure.reference(case, exact, batch), batch)
    theirs = measure.last_real(case, measure.run(stock, batch), batch)
    ours = measure.last_real(case, measure.run(fast, batch), batch)
    nudged = (measure.last_real(case, measure.run(model, batch), batch) for model in _nudged(stock))
    _within(ours, theirs, reference, models.bar_dtype, nudged)


def _nudged(stock: nn.Module) -> Iterator[nn.Module]:
    """The stock model with each parameter off by about its last bit, one way or the other."""
    for seed in range(NUDGES):
        model, generator = copy.deepcopy(stock), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                    parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)
        yield model


def _within(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    reference: torch.Tensor,
    dtype: torch.dtype,
    nudged: Iterable[torch.Tensor],
) -> None:
    assert torch.isfinite(ours).all() or not torch.isfinite(theirs).all(), "not finite"
    if not torch.isfinite(theirs).all():
        return
    error, own = measure.error(ours, reference), measure.error(theirs, reference)
    bound = max(BARS[dtype], TIMES_STOCK * own)
    if error > bound:
        own = max(own, *(measure.error(each, reference) for each in nudged))
        bound = max(BARS[dtype], TIMES_STOCK * own)
    assert error <= bound, f"relative error {error:.2e}, bound {bound:.2e}, stock {own:.2e}"


def _forward(models: Built, batch: batches.Batch, call: Call) -> None:
    _judge(models, models.fast, models.stock, models.exact, batch)


def _hidden_states(models: Built, batch: batches.Batch, call: Call) -> None:
    case, name = models.case, models.case.outputs[1]
    exact = measure.reference(case, models.exact, batch, output_hidden_states=True)
    stock = measure.run(models.stock, batch, output_hidden_states=True)
    fast = measure.run(models.fast, batch, output_hidden_states=True)
    if name not in exact:
        return
    assert len(fast[name]) == len(stock[name])
    for index, each in enumerate(zip(fast[name], stock[name], exact[name], strict=True)):
        if batch.real is None or each[2].shape[:2] == batch.real.shape:
            nudged = (
                measure.pick(measure.run(model, batch, output_hidden_states=True)[name][index], batch.real)
                for model in _nudged(models.stock)
            )
            _within(*(measure.pick(x, batch.real) for x in each), models.bar_dtype, nudged)


def _other_padding(models: Built, batch: batches.Batch, call: Call) -> None:
    """What stands at padding changes no bit of a real token: other ids, NaN in hidden states."""
    case = models.case
    given = batch.inputs
    if batch.real is None or not case.runs_fast(batch) or "attention_mask" not in given:
        return
    padding = ~batch.real
    other = dict(given)
    for name, value in given.items():
        if not torch.is_tensor(value) or name == "attention_mask" or value.shape[:2] != padding.shape:
            continue
        if name == "input_ids":
            other[name] = torch.where(padding, value.flip(1), value)
        elif name in ("hidden_states", "inputs_embeds") and value.dim() == 3:
            other[name] = value.masked_fill(padding[..., None], float("nan") if call.seed % 2 else float("inf"))
    clean = measure.last_real(case, measure.run(models.fast, batch), batch)
    changed = measure.last_real(case, measure.run(models.fast, dataclasses.replace(batch, inputs=other)), batch)
    assert torch.equal(clean, changed), "padding reached a real token"
    _forward(models, batch, call)


def _block(models: Built, batch: batches.Batch, call: Call) -> None:
    model = copy.deepcopy(models.stock)
    with fastencoder.fast(model, **models.options):
        _judge(models, model, models.stock, models.exact, batch)
    assert _same(models, model, models.stock, batch), "not the stock answer after the block"


def _reversed_and_again(models: Built, batch: batches.Batch, call: Call) -> None:
    model = fastencoder.reverse(copy.deepcopy(models.fast))
    assert _same(models, model, models.stock, batch), "not the stock answer after reverse"
    fastencoder.to_fast(model, **models.options)
    _judge(models, model, models.stock, models.exact, batch)


def _loaded(models: Built, batch: batches.Batch, call: Call) -> None:
    """Another state_dict is loaded into a model that has run."""
    model = copy.deepcopy(models.fast)
    measure.run(model, batch)
    state = {
        name: value * 1.25 if value.is_floating_point() and value.dim() == 2 else value
        for name, value in models.stock.state_dict().items()
    }
    model.load_state_dict(state)
    stock = copy.deepcopy(models.stock)
    stock.load_state_dict(state)
    _judge(models, model, stock, measure.double(models.case, stock), batch)


def _same(models: Built, ours: nn.Module, theirs: nn.Module, batch: batches.Batch) -> bool:
    answers = [measure.last_real(models.case, measure.run(model, batch), batch) for model in (ours, theirs)]
    return torch.equal(*(torch.nan_to_num(answer) for answer in answers))


_CHECKS = {
    "forward": _forward,
    "hidden states": _hidden_states,
    "other padding": _other_padding,
    "block": _block,
    "reversed and again": _reversed_and_again,
    "loaded": _loaded,
}
