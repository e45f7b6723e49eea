"""`bench(model, batches)`: a model before and after `to_fast`, in turn on the same batches, answers compared first."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import explain, to_fast
from ..layers.settings import Memory
from .compare import bound, errors_of, run
from .inputs import Batch
from .layers import reference_of

_CHECKED = 8  # batches whose answers are compared
_SECONDS, _FEWEST, _MOST = 20.0, 5, 30  # of timed work, and rounds, where nobody says how many

Step = Callable[[str], None]


class AnswersDiffer(RuntimeError):
    """The fast model's answers are further from the exact ones than rounding explains, so nothing was timed."""


@dataclass(frozen=True)
class Quartiles:
    """Of all rounds: the middle one, and those between which half of them lie."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """By linear interpolation; all three are the same where there is one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Timing:
    """What `bench` measured.

    Args:
        stock, fast: seconds of one pass over all batches, one for each round.
        tokens: real tokens in a pass (rows, for inputs without tokens).
        positions: positions in a pass, padding included.
        rows: sequences or images in a pass.
        batches: how many there are.
        errors: of each output, the fast model's relative error and its bound.
        checked: batches whose answers were compared.
    """

    stock: tuple[float, ...]
    fast: tuple[float, ...]
    tokens: int
    positions: int
    rows: int
    batches: int
    errors: dict[str, tuple[float, float]]
    checked: int

    @property
    def ratios(self) -> tuple[float, ...]:
        """Stock's time over the fast model's, one for each round."""
        return tuple(stock / fast for stock, fast in zip(self.stock, self.fast, strict=True))

    @property
    def ratio(self) -> float:
        """Median of stock's times over median of the fast model's."""
        return statistics.median(self.stock) / statistics.median(self.fast)


def bench(
    model: Any,
    batches: Sequence[Batch],
    *,
    rounds: int | None = None,
    compute_dtype: torch.dtype | None = None,
    memory: Memory = "default",
    step: Step = lambda what: None,
) -> Timing:
    """Times copies of a model, stock and converted, in turn on each batch, so that a slow spell of the machine meets both.

    Args:
        model: a stock model of transformers in evaluation mode, on the device to measure on. It is not changed.
        batches: what to run.
        rounds: passes over all batches; None: 5 to 30, as many as fit 20 seconds.
        compute_dtype, memory: as for `to_fast`.
        step: called with what comes next.

    Raises:
        AnswersDiffer: the two do not say the same, so their times mean nothing.
        NotEligibleError: the model cannot be made fast.
    """
    fast = to_fast(copy.deepcopy(model), compute_dtype=compute_dtype, memory=memory)
    errors, checked = _check(model, fast, batches, compute_dtype, memory, step)
    wrong = [name for name, (error, limit) in errors.items() if not error <= limit]
    if wrong or not errors:
        said = (
            f"{wrong[0]} has a relative error of {errors[wrong[0]][0]:.1e}, bound {errors[wrong[0]][1]:.1e}"
            if wrong
            else ""
        )
        raise AnswersDiffer(said or "no output of the model could be compared")
    stock = copy.deepcopy(model)  # as fresh a copy as the fast one
    pairs = [(batch, batch.to(model.dtype, model.device)) for batch in batches]
    step("warm-up")
    once = sum(_seconds(side, inputs) for _, inputs in pairs for side in (stock, fast))
    times: dict[str, list[float]] = {"stock": [], "fast": []}
    sides = [("stock", stock), ("fast", fast)]
    for turn in range(rounds or max(_FEWEST, min(_MOST, round(_SECONDS / once)))):
        step(f"round {turn + 1}")
        passed = {"stock": 0.0, "fast": 0.0}
        for index, (_, inputs) in enumerate(pairs):
            for name, side in sides if (turn + index) % 2 == 0 else reversed(sides):
                passed[name] += _seconds(side, inputs)
        for name, seconds in passed.items():
            times[name].append(seconds)
    return Timing(
        tuple(times["stock"]),
        tuple(times["fast"]),
        tokens=sum(batch.tokens for batch in batches),
        positions=sum(batch.tokens if batch.real is None else batch.real.numel() for batch in batches),
        rows=sum(batch.rows for batch in batches),
        batches=len(batches),
        errors=errors,
        checked=checked,
    )


def _check(
    model: Any, fast: Any, batches: Sequence[Batch], compute_dtype: torch.dtype | None, memory: Memory, step: Step
) -> tuple[dict[str, tuple[float, float]], int]:
    """Error and bound of each output, on some of the batches, spread evenly."""
    count = min(_CHECKED, len(batches))
    some = [batches[index * len(batches) // count] for index in range(count)]
    step("comparing answers")
    reference, exact = reference_of(model, some[0])
    expected = [run(reference, batch, exact) for batch in some]
    del reference
    rows = explain(model, compute_dtype=compute_dtype, memory=memory)
    dtypes = [getattr(torch, row.compute_dtype) for row in rows if row.compute_dtype] or [model.dtype]
    dtype = min(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.float16))
    peer = model if dtype == model.dtype else copy.deepcopy(model).to(dtype)
    stock = errors_of([run(peer, batch, dtype) for batch in some], expected, some)
    ours = errors_of([run(fast, batch, model.dtype) for batch in some], expected, some)
    return {name: (error, bound(dtype, stock.get(name, 0.0))) for name, error in ours.items()}, count


@torch.inference_mode()
def _seconds(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Wall time of one forward, with all of its work on the device done."""
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    model(**inputs)
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
