"""Part "parity": whole models, fast against stock in fp32, fp16 and bf16, both against stock in float64.

A row passes if the error at the real tokens is within the bars, padding is zero, no layer call was delegated, no kernel fell
back, and `reverse` gives back the very bits: parameters and outputs.
"""

from __future__ import annotations

import copy
import gc
import warnings
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.common import DTYPES, complaints, error_bar, fallbacks, relative_error
from benchmarks.models import PARITY, Model, alone, cast, encoder_layers, fit, hidden, ragged, unpadded
from benchmarks.store import Row, short
from fastencoder import reverse, to_fast
from fastencoder.layers import FastLayer


class Workbench:
    """The model that is being checked, its inputs and its float64 answers: made once for its three rows."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.of: Model | None = None

    def load(self, model: Model) -> None:
        if self.of is model:
            return
        self.of = None
        self.exact: nn.Module | None = None
        self.answers: list[torch.Tensor] = []
        gc.collect()
        self.exact = model.make(self.quick).to(self.device)
        inputs, self.real = ragged(self.exact, model.kind, self.quick, self.device)
        self.calls = [inputs, alone(inputs)]
        fit(self.exact, unpadded(inputs))  # padding would count in the statistics that the weights are fitted to
        self.precision = "float64"
        try:
            self.answers = self.run(copy.deepcopy(self.exact).double(), torch.float64)
        except RuntimeError as error:  # an operation of the stock code that has no float64
            self.precision = f"float32 ({short(error)})"
            self.answers = self.run(self.exact, torch.float32)
        self.of = model

    @torch.inference_mode()
    def run(self, model: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        """The last hidden state of both calls."""
        return [hidden(model, cast(inputs, dtype)) for inputs in self.calls]

    def tokens(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """The real tokens of both calls, `[T, D]`."""
        first, second = outputs
        return torch.cat([first.flatten(0, 1) if self.real is None else first[self.real], second.flatten(0, 1)])


def check(bench: Workbench, model: Model, dtype: str) -> dict[str, Any]:
    """One row."""
    bench.load(model)
    working = copy.deepcopy(bench.exact).to(DTYPES[dtype])
    layers = len(encoder_layers(working))
    stock, again = bench.run(working, DTYPES[dtype]), bench.run(working, DTYPES[dtype])
    repeats = all(torch.equal(a, b) for a, b in zip(bench_real(bench, stock), bench_real(bench, again), strict=True))
    before = {name: (x.data_ptr(), x.clone()) for name, x in working.state_dict(keep_vars=True).items()}

    fallbacks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_fast(working)
        fast = bench.run(working, DTYPES[dtype])
    why = complaints(caught)
    fallen = fallbacks()
    if fallen and not why:
        why.append(f"{', '.join(fallen)} ran on the plain implementation")
    states = [layer._fastencoder for layer in working.modules() if isinstance(layer, FastLayer)]
    fast_calls, delegated = sum(s.fast_calls for s in states), sum(s.delegated_calls for s in states)
    if delegated or len(states) != layers or fast_calls != layers * len(bench.calls):
        reasons = sorted({s.last_reason for s in states if s.last_reason})
        why.append(
            f"{len(states)} of {layers} layers are fast; {fast_calls} calls were, {delegated} were delegated: "
            f"{'; '.join(reasons) or 'no reason given'}"
        )

    reference = bench.tokens(bench.answers)
    stock_error = relative_error(bench.tokens(stock), reference)
    fast_error = relative_error(bench.tokens(fast), reference)
    bar = error_bar(dtype, stock_error)
    if not fast_error <= bar:
        why.append(f"error {fast_error:.2e} is above {bar:.2e} (stock's own: {stock_error:.2e})")
    padding_zero = bench.real is None or not bool(fast[0][~bench.real].any())
    if not padding_zero:
        why.append("padding is not zero")

    reverse(working)
    after = working.state_dict(keep_vars=True)
    if list(after) != list(before) or any(
        after[name].data_ptr() != pointer or not torch.equal(after[name], value)
        for name, (pointer, value) in before.items()
    ):
        why.append("reverse: a tensor of the state_dict is another one")
    returned = bench_real(bench, bench.run(working, DTYPES[dtype]))
    if repeats and not all(torch.equal(a, b) for a, b in zip(returned, bench_real(bench, stock), strict=True)):
        why.append("reverse: the outputs differ from stock's")
    return {
        "passed": not why,
        "why": " | ".join(why),
        "model": model.name,
        "dtype": dtype,
        "stock_error": stock_error,
        "fast_error": fast_error,
        "bar": bar,
        "reference": bench.precision,
        "fast_calls": fast_calls,
        "delegated_calls": delegated,
        "padding_zero": None if bench.real is None else padding_zero,
        "stock_repeats_its_bits": repeats,
    }


def bench_real(bench: Workbench, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs where they mean something: what stock computes in a row of nothing but padding may be NaN."""
    return outputs if bench.real is None else [outputs[0][bench.real], outputs[1]]


def rows(device: torch.device, quick: bool) -> list[Row]:
    """All rows of the part, model by model."""
    bench = Workbench(device, quick)
    return [Row(f"{model.name} {dtype}", partial(check, bench, model, dtype)) for model in PARITY for dtype in DTYPES]
