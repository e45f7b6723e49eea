"""`cpu.json`: cells that separate invocations have measured, each whole, and what is computed from them.

    {"cells": {"minilm W1 fp32": {model, workload, dtype, work, rounds, systems, beside, versions, environment}}}

`work` describes the batch; `systems` has, by name, "seconds" (a list, one a round) for a system whose answers are right, else
"wrong", "not_available" or "failed" with the reason; `beside` has the seconds of the bare GEMMs.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.clocks import Spread, ratios
from benchmarks.cpu.systems import ENGINES_COMPARED, FAST, OURS, STOCK_EAGER, STOCK_SDPA, SYSTEMS
from benchmarks.files import read_json, write_json

Cell = dict[str, Any]
FILE = "cpu.json"


def key(model: str, workload: str, dtype: str) -> str:
    """The name of a cell."""
    return f"{model} {workload} {dtype}"


def read(folder: Path) -> dict[str, Cell]:
    """The cells that are there."""
    found = read_json(folder / FILE)
    return found["cells"] if found else {}


def merge(folder: Path, cell: Cell) -> dict[str, Cell]:
    """Put a cell in the file, in place of an older one of the same model, workload and dtype. Returns all cells."""
    cells = read(folder) | {key(cell["model"], cell["workload"], cell["dtype"]): cell}
    write_json(folder / FILE, {"cells": cells})
    return cells


def timed(cell: Cell) -> dict[str, list[float]]:
    """System -> seconds of every round; only systems whose answers are right."""
    return {name: result["seconds"] for name, result in cell["systems"].items() if result.get("seconds")}


def fastest(cell: Cell, names: tuple[str, ...]) -> str | None:
    """The one of these systems with the least median, or None if none was timed."""
    there = {name: statistics.median(times) for name, times in timed(cell).items() if name in names}
    return min(there, key=there.__getitem__) if there else None


def best_engine(cell: Cell) -> str | None:
    """The fastest of torch.compile, ONNX Runtime, OpenVINO, CTranslate2 and the nested fast path at this dtype."""
    return fastest(cell, tuple(name for name, system in SYSTEMS.items() if system.engine in ENGINES_COMPARED))


def ours(cell: Cell) -> str | None:
    """What stands for fastencoder in ratios: the fastest of `OURS` at this dtype."""
    return fastest(cell, OURS[cell["dtype"]])


def stock(cell: Cell) -> str | None:
    """Stock as the better of its two attentions."""
    return fastest(cell, (STOCK_EAGER, STOCK_SDPA))


def lead(cell: Cell, other: str | None) -> Spread | None:
    """How many times as fast as the other system we are, round by round; None if one of both was not timed."""
    times, mine = timed(cell), ours(cell)
    return ratios(times[mine], times[other]) if mine is not None and other in times else None


def operations(cell: Cell) -> tuple[float, float] | None:
    """Floating point operations of the real tokens: in the linears of the layers, and in attention; None if not known.

    A token costs 2 per weight of a linear. A sequence of s tokens costs 4 s² D a layer in attention.
    """
    notes = cell["systems"].get(FAST, {}).get("notes", {})
    if "layer_weights" not in notes:
        return None
    squares = sum(length**2 for length in cell["work"]["lengths"])
    linear = 2.0 * notes["layer_weights"] * cell["work"]["tokens"]
    return linear, 4.0 * squares * notes["hidden_size"] * notes["layers"]


def gemm_rate(cell: Cell) -> float | None:
    """Operations a second of bare GEMMs on the shapes of the layers' linears, with the real tokens as rows: as `linear` does
    them, with weights in oneDNN's order, and for bf16 also in fp32, whichever is fastest.
    """
    found, times = operations(cell), [statistics.median(times) for times in cell["beside"].values() if times]
    return found[0] / min(times) if found and times else None


def of_gemm(cell: Cell, system: str) -> float | None:
    """A system's operations a second on real tokens, as a part of the rate of the bare GEMMs."""
    found, rate, times = operations(cell), gemm_rate(cell), timed(cell).get(system)
    return sum(found) / statistics.median(times) / rate if found and rate and times else None


def said(result: dict[str, Any]) -> str:
    """Why a system has no speed."""
    for word, field in (("wrong answers", "wrong"), ("not available", "not_available"), ("failed", "failed")):
        if field in result:
            return f"{word}: {result[field]}"
    return ""
