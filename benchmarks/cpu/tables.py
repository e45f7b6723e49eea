"""`cpu.md`: the cells as Markdown. Nothing is computed here but the form."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any

from benchmarks.clocks import Spread
from benchmarks.cpu import bars, models, results
from benchmarks.cpu.systems import FAST, STOCK_SORTED
from benchmarks.files import markdown_table

Cells = dict[str, results.Cell]
SUMMARY = ["model", "workload", "dtype", "padding", "stock ms", "best engine", "its ms", "fastencoder ms", "over it"]
SUMMARY += ["over stock", "over stock sorted", "of GEMM rate"]
DETAIL = ["system", "ms", "quartiles", "real tokens/s", "fastencoder over it", "of GEMM rate", "error", "cosine"]
DETAIL += ["peak MiB", "without libraries"]
MIB = 2**20
HOW = (
    "Every system runs in a process of its own and holds the same weights; in every round each is timed once, and the others "
    "sleep. Times are medians over the rounds, with quartiles; ratios are of times of the same round. Calls under 0.1 s are "
    "repeated within a round and the first is left out. *Error* is the largest relative error of a real token against stock "
    "in fp32, *cosine* the least of a sequence's mean-pooled embedding; a system that is not near enough (fp32: error 1e-4, "
    "bf16: cosine 0.999) has no speed. *Best engine* is the fastest of torch.compile, ONNX Runtime, OpenVINO, CTranslate2 "
    "and nn.TransformerEncoder at the same dtype. *Of GEMM rate*: operations of the real tokens a second over what bare "
    "matrix products reach on the shapes of the model's linears, measured in fastencoder's process (`linear`, the same with "
    "weights in oneDNN's order, in bf16 also in fp32; the fastest of these). *Peak* is the resident memory of the process in "
    "a call, and the same without what it held before the model was loaded."
)


def markdown(cells: Cells) -> str:
    """The whole report."""
    blocks = ["# CPU: fastencoder beside other ways to run the same encoders", *opening(cells)]
    blocks += ["## Bars", bars_table(cells), "## Summary", summary(cells)]
    for model in _ordered({cell["model"] for cell in cells.values()}, list(models.MODELS)):
        blocks.append(f"## {models.MODELS[model].title if model in models.MODELS else model}")
        for cell in cells.values():
            if cell["model"] == model:
                blocks += detail(cell)
    return "\n\n".join(blocks) + "\n"


def opening(cells: Cells) -> Iterator[str]:
    """Where this was measured, and how to read it."""
    seen = Counter(json.dumps(place(cell)) for cell in cells.values())
    for where, count in seen.most_common():
        many = f" ({count} of {len(cells)} cells)" if len(seen) > 1 else ""
        yield f"{json.loads(where)}{many}."
    for environment, versions in _versions(cells).items():
        yield (
            f"Environment {environment}: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
        )
    yield HOW


def section(cells: Cells) -> str:
    """What the documentation shows: no cell in detail. Empty without cells."""
    return "\n\n".join([*opening(cells), "Bars:", bars_table(cells), "Summary:", summary(cells)]) if cells else ""


def bars_table(cells: Cells) -> str:
    """What must be reached, and what is."""
    return markdown_table(bars.HEADER, [bar.line() for bar in bars.bars(cells)])


def summary(cells: Cells) -> str:
    """A line for every cell."""
    return markdown_table(SUMMARY, [_summary_line(cell) for cell in cells.values()])


def detail(cell: results.Cell) -> list[str]:
    """A cell's systems, fastest first, then those without a speed and why."""
    work = cell["work"]
    title = f"### {cell['model']} {cell['workload']} {cell['dtype']}: {work['title']}"
    what = f"{work['tokens']:,} real tokens of {work['positions']:,} positions ({work['padding_share']:.0%} padding); "
    what += f"{cell['rounds']} rounds of {cell['environment']['threads']} threads."
    rate = results.gemm_rate(cell)
    if rate:
        what += f" GEMM rate {rate / 1e9:,.0f} GFLOP/s."
    extension = cell["systems"].get(FAST, {}).get("notes", {}).get("extension")
    if extension:
        what += f" fastencoder's C++ extension: {extension}."
    extra = {
        name: result["notes"]["extra_bytes"]
        for name, result in cell["systems"].items()
        if "extra_bytes" in result.get("notes", {})
    }
    if extra:
        said = ", ".join(f"{name} {count / MIB:,.1f} MiB" for name, count in extra.items())
        what += f" Memory beside the model's own parameters: {said}."
    times = results.timed(cell)
    order = sorted(times, key=lambda name: statistics.median(times[name]))
    blocks = [title, what, markdown_table(DETAIL, [_system_line(cell, name) for name in order])]
    silent = [(name, results.said(result)) for name, result in cell["systems"].items() if name not in times]
    if silent:
        blocks.append("\n".join(f"- {name}: {why}" for name, why in silent))
    return blocks


def _summary_line(cell: results.Cell) -> list[str]:
    engine, stock, mine = results.best_engine(cell), results.stock(cell), results.ours(cell)
    share = results.of_gemm(cell, mine) if mine else None
    return [
        cell["model"],
        cell["workload"],
        cell["dtype"],
        f"{cell['work']['padding_share']:.0%}",
        _ms(cell, stock),
        engine or "none",
        _ms(cell, engine),
        _ms(cell, mine),
        _ratio(results.lead(cell, engine)),
        _ratio(results.lead(cell, stock)),
        _ratio(results.lead(cell, STOCK_SORTED)),
        f"{share:.0%}" if share else "",
    ]


def _system_line(cell: results.Cell, name: str) -> list[str]:
    result, spread = cell["systems"][name], Spread.of(results.timed(cell)[name])
    share, lead = results.of_gemm(cell, name), results.lead(cell, name)
    peak = result["peak_bytes"]
    return [
        f"**{name}**" if name == results.ours(cell) else name,
        _milliseconds(spread.median),
        f"{_milliseconds(spread.low)} to {_milliseconds(spread.high)}",
        f"{cell['work']['tokens'] / spread.median:,.0f}",
        f"{lead.median:.2f}" if lead else "",
        f"{share:.0%}" if share else "",
        f"{result['error']:.1e}",
        f"{result['cosine']:.5f}",
        f"{peak / MIB:,.0f}",
        f"{(peak - result['base_bytes']) / MIB:,.0f}",
    ]


def _ms(cell: results.Cell, name: str | None) -> str:
    times = results.timed(cell)
    return _milliseconds(statistics.median(times[name])) if name in times else ""


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"


def _ratio(lead: Spread | None) -> str:
    return f"{lead.median:.2f} ({lead.low:.2f} to {lead.high:.2f})" if lead else ""


def place(cell: results.Cell) -> str:
    """Machine, versions and code, in a phrase."""
    found = cell["environment"]
    flags = ", ".join(flag for flag, present in found["cpu_flags"].items() if present) or "unknown"
    lacks = ", ".join(flag for flag, present in found["cpu_flags"].items() if not present)
    commit = (found["git_commit"] or "no git")[:12]
    return (
        f"{found['device']}, {found['threads']} threads of {found['cpu_count']} CPUs; it has {flags}"
        + (f" and lacks {lacks}" if lacks else "")
        + f"; Python {found['python']}; {found['date'][:10]}; {commit}, sources {found['source_digest']}"
    )


def _versions(cells: Cells) -> dict[str, dict[str, Any]]:
    """The newest that any cell names, by environment."""
    found: dict[str, dict[str, Any]] = {}
    for cell in sorted(cells.values(), key=lambda cell: cell["environment"]["date"]):
        found |= cell["versions"]
    return found


def _ordered(names: set[str], order: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))
