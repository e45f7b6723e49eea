"""What is written next to `gpu.json`: `gpu.md` and two plots. Nothing is computed here but the form; torch is not needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import gpu_report_bars, gpu_report_tables
from benchmarks.files import markdown_table, write_json, write_text

# What takes as much as the time allows: rows that are left are said to be, and are no failure.
OPEN_ENDED = ("dispatch", "compile")


def write(data: dict[str, Any], folder: Path) -> list[Path]:
    """`gpu.json`, `gpu.md` and the plots."""
    write_json(folder / "gpu.json", data)
    write_text(folder / "gpu.md", markdown(data))
    written = [folder / "gpu.json", folder / "gpu.md"]
    try:
        from benchmarks.gpu_report_plots import plots

        written += plots(data, folder)
    except ImportError as error:  # no matplotlib
        print(f"no plots: {error}")
    return written


def failures(data: dict[str, Any]) -> list[str]:
    """All rows that did not pass, and all parts that are not finished, in words."""
    lines = []
    for name, part in data["parts"].items():
        for row, found in part["rows"].items():
            if not found["passed"]:
                lines.append(f"{name} {row}: {found.get('why') or 'it did not end'}")
        if not part["finished"] and name not in OPEN_ENDED:
            left = [row for row in part["expected"] if row not in part["rows"]]
            lines.append(f"{name}: {len(left) or 'some'} rows are left; run it again to go on")
    return lines


def left_out(data: dict[str, Any]) -> Iterator[str]:
    """What was not there to be examined, and what there was no time for."""
    for name, part in data["parts"].items():
        reasons: dict[str, int] = {}
        for found in part["rows"].values():
            if "not_available" in found:
                reasons[found["not_available"]] = reasons.get(found["not_available"], 0) + 1
            for system, result in found.get("systems", {}).items():
                status = result.get("status", "")
                if status != "timed":
                    reasons[f"{system}: {status}"] = reasons.get(f"{system}: {status}", 0) + 1
        for reason, count in reasons.items():
            yield f"{name}: {reason} ({count} row{'s' * (count > 1)})"
        left = [row for row in part["expected"] if row not in part["rows"]]
        if left and name in OPEN_ENDED:
            yield f"{name}: there was no time for {', '.join(left)}"


def where(data: dict[str, Any]) -> str:
    """The machine, the versions and the code, in one sentence."""
    found = data["environment"]
    keys = ("driver", "cuda", "cudnn", "capability", "torch", "triton", "transformers", "flash_attn", "python", "threads")
    versions = ", ".join(f"{key} {found[key]}" for key in keys if found.get(key) is not None)
    commit = found["git_commit"] or "no git"
    if found.get("git_changed_files"):
        commit += f" with {found['git_changed_files']} changed files"
    note = " **A dry run with tiny models: the numbers mean nothing.**" if data["quick"] else ""
    return f"{found['device']}: {versions}; {found['date']}; {commit}, sources {found['source_digest']}.{note}"


def bars(data: dict[str, Any]) -> list[list[str]]:
    """The rows of the table of bars. A dry run measures nothing."""
    return gpu_report_bars.lines({} if data["quick"] else data["parts"])


def markdown(data: dict[str, Any]) -> str:
    """The whole report."""
    parts = data["parts"]
    wrong = failures(data)
    blocks = [f"# {data['environment']['device']}", where(data)]
    blocks.append("Everything passed." if not wrong else "Failed:\n\n" + "\n".join(f"- {line}" for line in wrong))
    blocks += ["## Bars", markdown_table(gpu_report_bars.HEADER, bars(data))]
    for name, table in gpu_report_tables.TABLES.items():
        if name in parts:
            title = f"## {name.capitalize()} ({parts[name]['seconds']:.0f} s of work)"
            blocks += [title, *table(parts[name]["rows"])]
    left = list(left_out(data))
    if left:
        blocks += ["## Left out", "\n".join(f"- {line}" for line in left)]
    return "\n\n".join(blocks) + "\n"


def closing(data: dict[str, Any]) -> Iterator[str]:
    """The lines at the end of a run: the bars, and what was left out."""
    for name, _, goal, measured, verdict in bars(data):
        yield f"{name}: {measured} {verdict} (goal {goal})"
    for line in left_out(data):
        yield f"left out: {line}"
