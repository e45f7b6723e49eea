"""Part "speed": fastencoder against stock sdpa and torch.compile, in interleaved rounds, after the answers were compared.

Work is counted at real tokens only: with D the hidden size, F the feed-forward size, L the layers and s the tokens of each
sequence, a forward takes `L * sum(s * (8 D^2 + 4 D F) + 4 s^2 D)` operations (for F = 4 D: `24 D^2 L + 4 s D L` a token).
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import models
from benchmarks.clocks import Spread, clock_for, interleaved, ratios, time_limit
from benchmarks.common import DTYPES, complaints, error_bar, fallbacks, relative_error
from benchmarks.models import Inputs, Model, cast, fit, hidden, lengths_of, ragged, text_batch, unpadded
from benchmarks.store import Row, Store, short
from fastencoder import to_fast
from fastencoder.layers import FastLayer

STOCK, FAST, COMPILED, GRAPHS = "stock sdpa", "fastencoder", "torch.compile dynamic", "torch.compile reduce-overhead"
ROOFLINE = "roofline"
COMPILE_SECONDS = 100.0  # for the first call of a system; less where the time of the part is nearly over
SAMPLE_SECONDS = 1.5  # of one cell, all systems together
ROUNDS = (15, 60)
INPUT_SETS = 3  # taken in turn, so that no answer can be reused


@dataclass(frozen=True)
class Cell:
    """A batch of `batch` sequences of at most `seqlen` tokens, of whose positions a share is padding.

    `static` also times torch.compile for exactly this shape, which takes long to compile.
    """

    model: Model
    dtype: str
    batch: int
    seqlen: int
    padding: float = 0.0
    static: bool = False

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.model.name} {self.dtype} {self.batch}x{self.seqlen} padding={self.padding:.0%}"

    @property
    def lengths(self) -> list[int]:
        """Real tokens of every sequence."""
        return lengths_of(self.batch, self.seqlen, self.padding)


def grid(quick: bool) -> list[Cell]:
    """The cells, those of one model and dtype together."""
    if quick:
        return [
            Cell(models.BERT_BASE, "bf16", 4, 16, 0.5, static=True),
            Cell(models.VIT_BASE, "fp32", 1, 17),
        ]
    base = partial(Cell, models.BERT_BASE)
    large = partial(Cell, models.BERT_LARGE, "bf16")
    minilm = partial(Cell, models.MINILM, "bf16")
    vit = partial(Cell, models.VIT_BASE, "bf16", seqlen=197)
    return [
        base("bf16", 1, 128, static=True),
        base("bf16", 8, 128, 0.5),
        base("bf16", 32, 128),
        base("bf16", 32, 128, 0.5, static=True),
        base("bf16", 32, 512),
        base("bf16", 32, 512, 0.5),
        base("bf16", 128, 128),
        base("bf16", 128, 128, 0.7),
        base("bf16", 128, 512, 0.5),
        large(1, 128, static=True),
        large(32, 128, 0.5),
        large(128, 128),
        large(32, 512, 0.5),
        minilm(1, 128, static=True),
        minilm(1, 16),
        minilm(32, 128, 0.5),
        minilm(256, 128, 0.7),
        minilm(32, 512, 0.5),
        vit(batch=1, static=True),
        vit(batch=32),
        vit(batch=128),
        base("fp16", 1, 128),
        base("fp16", 32, 128, 0.5),
        base("fp16", 128, 128),
    ]


def operations(model: nn.Module, lengths: list[int]) -> float:
    """Floating-point operations of one forward of the layers, at real tokens."""
    config = model.config
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return float(layers * sum(s * (8 * d * d + 4 * d * f) + 4 * s * s * d for s in lengths))


class Bench:
    """The systems of one model in one dtype, made when a cell asks for them and dropped with the next model."""

    def __init__(self, device: torch.device, quick: bool, store: Store, deadline: float) -> None:
        self.device, self.quick, self.store, self.deadline = device, quick, store, deadline
        self.clock = clock_for(device)
        self._of: tuple[Model, str] | None = None
        self._clear()

    def _clear(self) -> None:
        self.exact = self.stock = self.fast = None
        self.compiled: dict[str, Callable[[Inputs], torch.Tensor] | str] = {}
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load(self, model: Model, dtype: str) -> None:
        """Make the float32 model, the stock one and the fast one."""
        if self._of == (model, dtype):
            return
        self._of = None
        self._clear()
        with torch.inference_mode(False), torch.no_grad():  # parameters of inference mode are another kind of tensor
            self.exact = model.make(self.quick).to(self.device)
            fit(self.exact, unpadded(ragged(self.exact, model.kind, self.quick, self.device)[0]))
            self.stock = copy.deepcopy(self.exact).to(DTYPES[dtype])
            self.fast = to_fast(copy.deepcopy(self.stock))
        self._of = (model, dtype)

    def patience(self) -> float:
        """Seconds that a system may take until it is warm."""
        return max(20.0, min(COMPILE_SECONDS, self.deadline - time.time()))

    def inputs(self, cell: Cell) -> list[Inputs]:
        """Different inputs of the same size."""
        if cell.model.kind == "text":
            return [text_batch(cell.lengths, seed, self.device) for seed in range(INPUT_SETS)]
        size, generator = self.exact.config.image_size, torch.Generator().manual_seed(1)
        shape = (INPUT_SETS, cell.batch, 3, size, size)
        return [{"pixel_values": pixels} for pixels in torch.randn(shape, generator=generator).to(self.device)]

    def systems(self, cell: Cell) -> dict[str, Callable[[Inputs], torch.Tensor]]:
        """What is compared on a cell, by name. A compiler that has failed on this model before is left out."""
        made: dict[str, Any] = {STOCK: partial(hidden, self.stock), FAST: partial(hidden, self.fast)}
        for name in (COMPILED, GRAPHS):
            # A batch of one would be compiled anew, and there graphs are what compilation is used for.
            if not (cell.static if name == GRAPHS else cell.batch > 1):
                continue
            if name not in self.compiled:
                self.compiled[name] = self._compile(name)
            made[name] = self.compiled[name]
        return made

    def _compile(self, name: str) -> Callable[[Inputs], torch.Tensor]:
        # A dry run stops at the traced graph: compiling it for a CPU takes minutes.
        how: dict[str, Any] = {"backend": "eager"} if self.device.type == "cpu" else {}
        if name == COMPILED:
            return partial(hidden, torch.compile(self.stock, dynamic=True, **how))
        how = how or {"mode": "reduce-overhead"}
        compiled = torch.compile(self.stock, dynamic=False, **how)

        def call(inputs: Inputs) -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return hidden(compiled, inputs)

        return call


@torch.inference_mode()
def measure(bench: Bench, cell: Cell) -> dict[str, Any]:
    """One cell: compare the answers of every system, then time those that are right."""
    bench.load(cell.model, cell.dtype)
    batches = bench.inputs(cell)
    low = [cast(inputs, DTYPES[cell.dtype]) for inputs in batches]
    references = [real_tokens(hidden(bench.exact, inputs), inputs) for inputs in batches]
    found: dict[str, Any] = {"passed": True, **_describe(cell, batches[0]), "systems": {}}
    right: dict[str, Callable[[Inputs], torch.Tensor]] = {}
    bar = error_bar(cell.dtype, 0.0)
    for name, call in bench.systems(cell).items():
        result = found["systems"][name] = {}
        if isinstance(call, str):
            result["status"] = call
            continue
        try:
            with time_limit(bench.patience()), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for inputs in low:  # warm: compilation, and the recording of graphs
                    call(inputs)
                outputs = zip(low, references, strict=True)
                error = max(relative_error(real_tokens(call(x), x), reference) for x, reference in outputs)
        except Exception as problem:
            result["status"] = f"failed: {short(problem)}"
            if name in bench.compiled:
                bench.compiled[name] = result["status"]
            continue
        result["error"] = error
        if name == STOCK:
            bar = error_bar(cell.dtype, error)
        if name == FAST and (why := _not_fast(bench, caught)):
            found |= {"passed": False, "why": why}
        if error <= bar:
            right[name] = call
        else:
            result["status"] = f"wrong: error {error:.2e} is above {bar:.2e}"
    for name in (STOCK, FAST):
        if name not in right:
            found |= {"passed": False, "why": f"{name}: {found['systems'][name]['status']}"}
    if STOCK in right:
        _time(bench, cell, right, low, found)
    return found


def real_tokens(output: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """`[B, S, D]` -> `[T, D]` in float32."""
    mask = inputs.get("attention_mask")
    return (output.flatten(0, 1) if mask is None else output[mask.bool()]).float()


def _not_fast(bench: Bench, caught: list[warnings.WarningMessage]) -> str:
    """Why the fast model is not what its name says; empty if it is."""
    states = [layer._fastencoder for layer in bench.fast.modules() if isinstance(layer, FastLayer)]
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


def _time(
    bench: Bench, cell: Cell, right: dict[str, Callable[[Inputs], torch.Tensor]], low: list[Inputs], found: dict[str, Any]
) -> None:
    calls = {name: lambda turn, call=call: call(low[turn % len(low)]) for name, call in right.items()}
    once = sum(bench.clock(partial(call, 0)) for call in calls.values())
    rounds = 3 if bench.quick else max(ROUNDS[0], min(ROUNDS[1], int(SAMPLE_SECONDS / max(once, 1e-6))))
    times = interleaved(calls, rounds, bench.clock)
    work, tokens = operations(bench.exact, cell.lengths), sum(cell.lengths)
    roofline = bench.store.part("speed")["rows"].get(ROOFLINE, {}).get("matmul_tflops", {}).get(cell.dtype)
    for name, sample in times.items():
        spread = Spread.of([1000 * seconds for seconds in sample])
        tflops = work / (spread.median / 1000) / 1e12
        found["systems"][name] |= {
            "status": "timed",
            "ms": spread.to_dict(),
            "tokens_per_s": tokens / (spread.median / 1000),
            "tflops": tflops,
            "of_matmul": tflops / roofline if roofline else None,
            "ratio_to_stock": ratios(sample, times[STOCK]).to_dict(),
        }


@torch.inference_mode()
def roofline(bench: Bench) -> dict[str, Any]:
    """What this device reaches, in this process: a large matrix product per dtype, and a large copy."""
    size, count = (256, 2**20) if bench.quick else (8192, 2**30)
    found: dict[str, Any] = {"passed": True, "matmul_size": size, "matmul_tflops": {}}
    for dtype in ("bf16", "fp16") if bench.device.type == "cuda" else ("bf16",):
        a, b = (torch.randn(size, size, device=bench.device).to(DTYPES[dtype]) for _ in range(2))
        seconds = _median(bench, lambda a=a, b=b: a @ b)
        found["matmul_tflops"][dtype] = 2 * size**3 / seconds / 1e12
    source = torch.empty(count, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    found["copy_gb_per_s"] = 2 * count / _median(bench, lambda: target.copy_(source)) / 1e9
    return found


def _median(bench: Bench, call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    return Spread.of([bench.clock(call) for _ in range(3 if bench.quick else 15)]).median


def rows(device: torch.device, quick: bool, store: Store, deadline: float) -> list[Row]:
    """The roofline, then all cells."""
    bench = Bench(device, quick, store, deadline)
    cells = grid(quick)
    if quick:
        cells = [replace(cell, seqlen=min(cell.seqlen, 20)) for cell in cells]
    return [Row(ROOFLINE, partial(roofline, bench)), *(Row(cell.name, partial(measure, bench, cell)) for cell in cells)]
