"""Part "parity": whole models at full size, fast against stock in fp32, fp16 and bf16, both against stock in float64.

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

from benchmarks import models
from benchmarks.common import DTYPES, complaints, error_bar, fallbacks, relative_error
from benchmarks.models import Model, alone, cast, encoder_layers, fit, hidden, ragged, unpadded
from benchmarks.store import Row, short
from fastencoder import reverse, to_fast
from fastencoder.layers import FastLayer

COMPILED = (models.MINILM, models.VIT_BASE)  # one that post-, one that pre-normalises


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

    def real_only(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs where they mean something: what stock computes in a row of nothing but padding may be NaN."""
        return outputs if self.real is None else [outputs[0][self.real], outputs[1]]

    def compare(
        self, stock: list[torch.Tensor], fast: list[torch.Tensor], dtype: str, why: list[str]
    ) -> dict[str, float]:
        """The errors of both and the bar; what is wrong is added to `why`."""
        reference = self.tokens(self.answers)
        errors = {"stock_error": relative_error(self.tokens(stock), reference)}
        errors |= {"fast_error": relative_error(self.tokens(fast), reference)}
        errors |= {"bar": error_bar(dtype, errors["stock_error"])}
        if not errors["fast_error"] <= errors["bar"]:
            why.append("error {fast_error:.2e} is above {bar:.2e} (stock's own: {stock_error:.2e})".format(**errors))
        if self.real is not None and bool(fast[0][~self.real].any()):
            why.append("padding is not zero")
        return errors


def states(model: nn.Module) -> list[Any]:
    """What every fast layer of a model knows of its calls."""
    return [layer._fastencoder for layer in model.modules() if isinstance(layer, FastLayer)]


def count_calls(model: nn.Module) -> tuple[int, int]:
    """How many calls of layers were fast, and how many were delegated."""
    return sum(s.fast_calls for s in states(model)), sum(s.delegated_calls for s in states(model))


def what_went_wrong(caught: list[warnings.WarningMessage]) -> list[str]:
    """Warnings of fastencoder, and kernels that fell back."""
    why, fallen = complaints(caught), fallbacks()
    return why or [f"{', '.join(fallen)} ran on the plain implementation"] * bool(fallen)


def check(bench: Workbench, model: Model, dtype: str) -> dict[str, Any]:
    """One row."""
    bench.load(model)
    working = copy.deepcopy(bench.exact).to(DTYPES[dtype])
    layers = len(encoder_layers(working))
    stock, again = bench.run(working, DTYPES[dtype]), bench.run(working, DTYPES[dtype])
    repeats = all(torch.equal(a, b) for a, b in zip(bench.real_only(stock), bench.real_only(again), strict=True))
    before = {name: (x, x.clone()) for name, x in working.state_dict(keep_vars=True).items()}

    fallbacks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_fast(working)
        fast = bench.run(working, DTYPES[dtype])
    why = what_went_wrong(caught)
    fast_calls, delegated = count_calls(working)
    if delegated or fast_calls != layers * len(bench.calls):
        reasons = sorted({state.last_reason for state in states(working) if state.last_reason})
        why.append(
            f"{len(states(working))} of {layers} layers are fast; {fast_calls} calls were, {delegated} were delegated: "
            f"{'; '.join(reasons) or 'no reason given'}"
        )
    errors = bench.compare(stock, fast, dtype, why)

    reverse(working)
    after = working.state_dict(keep_vars=True)
    if list(after) != list(before) or any(
        after[name] is not tensor or not torch.equal(after[name], value) for name, (tensor, value) in before.items()
    ):
        why.append("reverse: a tensor of the state_dict is another one")
    returned = bench.real_only(bench.run(working, DTYPES[dtype]))
    if repeats and not all(torch.equal(a, b) for a, b in zip(returned, bench.real_only(stock), strict=True)):
        why.append("reverse: the outputs differ from stock's")
    return {
        "passed": not why,
        "why": " | ".join(why),
        "model": model.name,
        "dtype": dtype,
        **errors,
        "reference": bench.precision,
        "fast_calls": fast_calls,
        "delegated_calls": delegated,
        "stock_repeats_its_bits": repeats,
    }


def rows(device: torch.device, quick: bool, deadline: float) -> list[Row]:
    """All rows of the part, model by model: those of one model share what is expensive to make."""
    from benchmarks import gpu_parity_modes as modes

    bench = Workbench(device, quick)
    made = []
    for model in models.PARITY:
        made += [Row(f"{model.name} {dtype}", partial(check, bench, model, dtype), model.name) for dtype in DTYPES]
        made += [Row(f"{model.name} bf16 CUDA graphs", partial(modes.graphs, bench, model, "bf16"), model.name)]
    for model in COMPILED:
        made.append(Row(f"{model.name} bf16 torch.compile", partial(modes.compiled, bench, model, "bf16"), model.name))
    return made
