"""Part "speed": the grid, in interleaved rounds, after the answers were compared. Part "compile" uses the same measurement.

Work is counted at real tokens only. Every speed stands beside what the vendor's GEMM does with the same products and beside
the floor of the device: see `gpu_limits`.
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any

import torch

from benchmarks.clocks import Spread, clock_for, interleaved, ratios, time_limit
from benchmarks.common import DTYPES, complaints, error_bar, fallbacks, relative_error
from benchmarks.gpu_grid import Cell, grid
from benchmarks.gpu_limits import device_limits, floor_seconds, operations, vendor_forward
from benchmarks.gpu_systems import GRAPHS, NESTED, OURS, STOCK, NotAvailable, System, Systems
from benchmarks.models import Inputs, cast, hidden, text_batch, unpadded
from benchmarks.store import Row, short
from fastencoder.layers import FastLayer

LIMITS = "limits of the device"
COMPILE_SECONDS = 150.0  # for the first calls of a system; less where the time of the part is nearly over
SAMPLE_SECONDS = 1.0  # of one cell, all systems together
ROUNDS = (9, 60)
INPUT_SETS = 3  # taken in turn, so that no answer can be reused


class Bench:
    """The models that have been asked for, and the vendor's times for their products."""

    def __init__(self, device: torch.device, quick: bool, deadline: float) -> None:
        self.device, self.quick, self.deadline = device, quick, deadline
        self.clock = clock_for(device)
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._systems: dict[tuple[str, str], Systems] = {}
        self._vendor: dict[tuple[str, str, int], dict[str, float]] = {}

    def systems(self, cell: Cell) -> Systems:
        """The cell's model as every system runs it."""
        key = (cell.model.name, cell.dtype)
        if key not in self._systems:
            self._systems[key] = Systems(cell.model, cell.dtype, self.device, self.quick)
        return self._systems[key]

    def vendor(self, cell: Cell) -> dict[str, float]:
        """See `gpu_limits.vendor_forward`."""
        key = (cell.model.name, cell.dtype, sum(cell.lengths))
        if key not in self._vendor:
            config = self.systems(cell).exact.config
            self._vendor[key] = vendor_forward(config, key[2], DTYPES[cell.dtype], self.device)
        return self._vendor[key]

    def patience(self) -> float:
        """Seconds that a system may take until it is warm."""
        return max(20.0, min(COMPILE_SECONDS, self.deadline - time.time()))

    def inputs(self, cell: Cell) -> list[Inputs]:
        """Different inputs of the same size."""
        if cell.model.kind == "text":
            return [text_batch(cell.lengths, seed, self.device, cell.seqlen) for seed in range(INPUT_SETS)]
        size, generator = self.systems(cell).exact.config.image_size, torch.Generator().manual_seed(1)
        shape = (INPUT_SETS, cell.batch, 3, size, size)
        return [{"pixel_values": pixels} for pixels in torch.randn(shape, generator=generator).to(self.device)]


@torch.inference_mode()
def measure(bench: Bench, cell: Cell) -> dict[str, Any]:
    """One cell: compare the answers of every system, then time those that are right."""
    systems = bench.systems(cell)
    batches = bench.inputs(cell)
    low = [cast(inputs, DTYPES[cell.dtype]) for inputs in batches]
    references = [real_tokens(hidden(systems.exact, inputs), inputs) for inputs in batches]
    found: dict[str, Any] = {"passed": True, **_describe(cell, batches[0]), "systems": {}}
    right: dict[str, System] = {}
    bar = error_bar(cell.dtype, 0.0)
    for name in cell.systems:
        result = found["systems"][name] = {}
        try:
            call = systems.get(name)
        except NotAvailable as problem:
            result["status"] = f"not available: {problem}"
            continue
        if name == NESTED and not cell.padding:
            call = _without_mask(call)
        try:
            with time_limit(bench.patience()), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for inputs in [*low, *low]:  # warm: compilation, and graphs, which begin with the second time
                    call(inputs)
                outputs = zip(low, references, strict=True)
                error = max(relative_error(real_tokens(call(x), x), reference) for x, reference in outputs)
        except Exception as problem:
            result["status"] = f"failed: {short(problem)}"
            if not isinstance(problem, torch.OutOfMemoryError):  # a smaller cell may have room
                systems.give_up(name, f"failed before: {short(problem)}")
            continue
        result["error"] = error
        if name == STOCK:
            bar = error_bar(cell.dtype, error)
        if name in OURS and (why := _not_fast(systems.models[name], caught)):
            found |= {"passed": False, "why": f"{name}: {why}"}
        if error <= bar:
            right[name] = call
        else:
            result["status"] = f"wrong: error {error:.2e} is above {bar:.2e}"
    for name in (STOCK, *OURS):
        status = found["systems"].get(name, {}).get("status", "")
        if name not in right and name in cell.systems and not (name == GRAPHS and status.startswith("not available")):
            found |= {"passed": False, "why": f"{name}: {status}"}
    if STOCK in right:
        _time(bench, cell, right, low, found)
    return found


def _without_mask(call: System) -> System:
    return lambda inputs: call(unpadded(inputs))


def real_tokens(output: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """`[B, S, D]` -> `[T, D]` in float32."""
    mask = inputs.get("attention_mask")
    return (output.flatten(0, 1) if mask is None else output[mask.bool()]).float()


def _not_fast(model: torch.nn.Module, caught: list[warnings.WarningMessage]) -> str:
    """Why the fast model is not what its name says; empty if it is."""
    states = [layer._fastencoder for layer in model.modules() if isinstance(layer, FastLayer)]
    delegated = {f"delegated: {state.last_reason}" for state in states if state.delegated_calls}
    fallen = [f"{operation} ran on the plain implementation" for operation in fallbacks()]
    return "; ".join([*(complaints(caught) or fallen), *sorted(delegated)])


def _describe(cell: Cell, inputs: Inputs) -> dict[str, Any]:
    mask = inputs.get("attention_mask")
    return {
        "model": cell.model.name,
        "dtype": cell.dtype,
        "batch": cell.batch,
        "seqlen": cell.seqlen,
        "padding": 0.0 if mask is None else 1 - float(mask.float().mean()),
        "tokens": sum(cell.lengths),
    }


def _time(bench: Bench, cell: Cell, right: dict[str, System], low: list[Inputs], found: dict[str, Any]) -> None:
    calls = {name: lambda turn, call=call: call(low[turn % len(low)]) for name, call in right.items()}
    once = sum(bench.clock(partial(call, 0)) for call in calls.values())
    rounds = 3 if bench.quick else max(ROUNDS[0], min(ROUNDS[1], int(SAMPLE_SECONDS / max(once, 1e-6))))
    times = interleaved(calls, rounds, bench.clock)
    config = bench.systems(cell).exact.config
    work, tokens, vendor = operations(config, cell.lengths), sum(cell.lengths), bench.vendor(cell)
    floor = floor_seconds(config, cell.lengths, bench.device_name)
    found |= {"vendor_gemm_ms": 1000 * vendor["seconds"], "vendor_gemm_tflops": vendor["flops"] / 1e12}
    found |= {"floor_ms": None if floor is None else 1000 * floor}
    ours = next((name for name in OURS if name in times), None)
    for name, sample in times.items():
        spread = Spread.of([1000 * seconds for seconds in sample])
        seconds = spread.median / 1000
        found["systems"][name] |= {
            "status": "timed",
            "ms": spread.to_dict(),
            "tokens_per_s": tokens / seconds,
            "tflops": work / seconds / 1e12,
            "of_vendor_gemm": work / seconds / vendor["flops"],
            "of_floor": None if floor is None else floor / seconds,
            "ratio_to_stock": ratios(sample, times[STOCK]).to_dict(),
        }
        if name not in OURS and ours is not None:  # how many times faster we are, round by round
            best = min((Spread.of(times[mine]).median, mine) for mine in OURS if mine in times)[1]
            found["systems"][name]["ours_is_faster"] = ratios(times[best], sample).to_dict()


def rows(device: torch.device, quick: bool, deadline: float) -> list[Row]:
    """The limits, then all cells."""
    bench = Bench(device, quick, deadline)
    limits = Row(LIMITS, partial(device_limits, device, quick))
    return [limits, *(Row(cell.name, partial(measure, bench, cell)) for cell in grid(quick))]
