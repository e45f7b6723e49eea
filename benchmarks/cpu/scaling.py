"""Time and memory of stock sdpa and fastencoder as one thing grows: padding, batch, length, threads."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import environment
from benchmarks.cpu import cell, plots, results, run, tables, workloads
from benchmarks.cpu.pool import Pool
from benchmarks.cpu.systems import FAST, STOCK_SDPA
from benchmarks.files import markdown_table, read_json, write_json, write_text
from fastencoder.demo.data import ragged_lengths

MODEL = "minilm-8k"
SYSTEMS = (STOCK_SDPA, FAST)
SWEEPS = ("padding", "batch", "length", "threads")
FILE = "cpu_scaling.json"
HEADER = ["", "padding", "stock sdpa ms", "fastencoder ms", "ratio", "stock sdpa MiB", "fastencoder MiB"]
PADDING = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.85)
TITLES = {
    "padding": "share of padding: 16 texts, the longest of 128 tokens",
    "batch": "texts in the batch, lengths as in W1",
    "length": "tokens of the longest of two texts; the other has a quarter",
    "threads": "threads, on W1",
}


def points(sweep: str, longest: int) -> dict[float, workloads.Workload]:
    """Value -> batch, with the threads sweep's value beside one and the same batch."""

    def made(lengths: tuple[int, ...] | list[int], value: float) -> workloads.Workload:
        return workloads.Workload(f"{sweep} {value:g}", "text", TITLES[sweep], tuple(lengths))

    if sweep == "padding":
        return {share: made(ragged_lengths(16, 128, share) if share else [128] * 16, share) for share in PADDING}
    if sweep == "batch":
        sizes = (1, 2, 4, 8, 16, 32, 64)
        return {size: made(workloads.lognormal(size, 4, 128, 35, 0.8, seed=1), size) for size in sizes}
    if sweep == "length":
        lengths = [length for length in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if length <= longest]
        return {length: made((length, length // 4), length) for length in lengths}
    return {count: made(workloads.standard()["W1"].lengths, count) for count in thread_counts()}


def thread_counts() -> list[int]:
    """1, 2, 4, ... and as many as there are."""
    most = os.cpu_count() or 1
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def measure(
    sweeps: tuple[str, ...],
    dtypes: tuple[str, ...],
    rounds: int,
    threads: int,
    longest: int,
    out: Path,
    images: Path,
    console: Console,
) -> Iterator[Path]:
    """Measure, and write after every sweep. Sweeps that are not asked for keep what was measured before."""
    files = run.source(MODEL)
    with run.shown(console) as report:
        for sweep in sweeps:
            for dtype in dtypes:
                rows = _sweep(files, sweep, dtype, rounds, threads, longest, report)
                found = read_json(out / FILE) or {"sweeps": {}}
                place = environment(torch.device("cpu")) | {"threads": threads}
                found["sweeps"][f"{sweep} {dtype}"] = {"rows": rows, "environment": place, "rounds": rounds}
                write_json(out / FILE, found)
                yield from write(out, images)


def _sweep(
    files: Any, sweep: str, dtype: str, rounds: int, threads: int, longest: int, report: run.Report
) -> list[dict[str, Any]]:
    chosen = points(sweep, longest)
    meter = run.Meter(report, f"{sweep} {dtype}", rounds * len(chosen))
    rows = []
    # Eager attention would need many gigabytes for the scores of the longest sequences.
    with cell.prepared(files, list(chosen.values()), [], threads, meter.say, STOCK_SDPA) as batches:
        if sweep == "threads":
            for count, work in zip(chosen, batches, strict=True):
                with Pool(SYSTEMS, files, dtype, int(count), meter.say) as pool:
                    rows.append({"value": count} | cell.measure(pool, work, rounds, meter.say, meter.tick))
        else:
            with Pool(SYSTEMS, files, dtype, threads, meter.say) as pool:
                for value, work in zip(chosen, batches, strict=True):
                    rows.append({"value": value} | cell.measure(pool, work, rounds, meter.say, meter.tick))
    return rows


def write(out: Path, images: Path) -> list[Path]:
    """`cpu_scaling.md` and the plots, from `cpu_scaling.json`."""
    found = read_json(out / FILE)
    if found is None:
        return []
    sweeps = found["sweeps"]
    newest = max((sweep["environment"] for sweep in sweeps.values()), key=lambda place: place["date"])
    blocks = ["# CPU: how time and memory grow", tables.place({"environment": newest}) + "."]
    blocks.append(
        "A model of MiniLM's size (6 layers, 384) with random weights and 8,192 positions. Medians of interleaved rounds; the "
        "ratio is of times of the same round; memory is what a call holds at its peak beyond the libraries, model included."
    )
    for name, sweep in sweeps.items():
        rows = [line(row) for row in sweep["rows"]]
        blocks += [f"## {name}: {TITLES[name.split()[0]]}", markdown_table(HEADER, rows)]
    write_text(out / "cpu_scaling.md", "\n\n".join(blocks) + "\n")
    path = plots.curves(panels(sweeps), "MiniLM-sized model on the CPU", images / "cpu_scaling.png")
    return [out / FILE, out / "cpu_scaling.md", path]


def line(row: dict[str, Any]) -> list[str]:
    """One point as a row of the table."""
    times = results.timed(row)
    lead = results.lead(row, STOCK_SDPA)
    ms = [f"{1000 * statistics.median(times[name]):,.1f}" if name in times else "no speed" for name in SYSTEMS]
    ratio = f"{lead.median:.2f} ({lead.low:.2f} to {lead.high:.2f})" if lead else ""
    memory = [f"{held(row, name):,.0f}" if name in times else "" for name in SYSTEMS]
    return [f"{row['value']:g}", f"{row['work']['padding_share']:.0%}", *ms, ratio, *memory]


def held(row: dict[str, Any], system: str) -> float:
    """MiB of a call at its peak, beyond what the process held before the model was loaded."""
    result = row["systems"][system]
    return (result["peak_bytes"] - result["base_bytes"]) / tables.MIB


def panels(sweeps: dict[str, Any]) -> dict[str, tuple[str, str, bool, dict[str, plots.Curve]]]:
    """Time for every sweep; memory for padding and length."""
    made = {}
    for sweep in SWEEPS:
        lines: dict[str, plots.Curve] = {}
        memory: dict[str, plots.Curve] = {}
        for name, found in sweeps.items():
            if name.split()[0] == sweep:
                for row in found["rows"]:
                    for system, times in results.timed(row).items():
                        label = f"{system} {row['dtype']}"
                        lines.setdefault(label, []).append((row["value"], 1000 * statistics.median(times)))
                        memory.setdefault(label, []).append((row["value"], held(row, system)))
        if lines:
            logarithmic = sweep in ("batch", "length")
            made[f"Time: {TITLES[sweep]}"] = (sweep, "ms a batch", logarithmic, lines)
            if sweep in ("padding", "length"):
                made[f"Memory: {TITLES[sweep]}"] = (sweep, "MiB at the peak", logarithmic, memory)
    return made
