"""Results of many rows that survive a crash: one JSON file, written after every row, continued by the next run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.files import read_json, write_json

# A file is continued only where these are the same: the same machine, the same code.
_SAME = ("device", "torch", "triton", "transformers", "python", "source_digest")
_SILENCE = 20.0  # seconds


@dataclass
class Row:
    """One thing to check or to measure. `run` returns what was found, with "passed" (and "why" where it is False)."""

    name: str
    run: Callable[[], dict[str, Any]] = field(repr=False)


class Store:
    """The file `gpu.json`: {"environment", "quick", "parts": {part: {"finished", "seconds", "rows": {name: result}}}}."""

    def __init__(self, path: Path, environment: dict[str, Any], quick: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {"environment": environment, "quick": quick, "parts": {}}
        old = read_json(path)
        if old and old["quick"] == quick and all(old["environment"].get(k) == environment.get(k) for k in _SAME):
            self.data["parts"] = old["parts"]

    def part(self, name: str) -> dict[str, Any]:
        """The part's results so far."""
        return self.data["parts"].setdefault(name, {"finished": False, "seconds": 0.0, "rows": {}})

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, self.data)


def run_rows(store: Store, part_name: str, rows: list[Row], console: Console, deadline: float) -> bool:
    """Run the rows that have not passed yet; the ones that failed before come last, because they may end the process.

    Every row is on disk before it runs, so that one which kills the process is known by name.

    Returns:
        False if the device does not answer any more: only a new process can go on.
    """
    part = store.part(part_name)
    part["finished"] = False
    names = {row.name for row in rows}
    assert len(names) == len(rows), f"two rows of {part_name} share one name"
    part["rows"] = {name: found for name, found in part["rows"].items() if name in names}
    done = part["rows"]
    for found in done.values():
        if found.get("running"):
            found.update(running=False, passed=False, why="the process died in this row")
    failed_before = [row for row in rows if row.name in done and not done[row.name]["passed"]]
    pending = [row for row in rows if row.name not in done] + failed_before
    if len(done) > len(failed_before):
        console.print(f"{part_name}: {len(done) - len(failed_before)} rows have passed already and are kept", markup=False)
    began, spent = time.monotonic(), part["seconds"]
    spoke = began
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(part_name, total=len(rows), completed=len(rows) - len(pending))
        for row in pending:
            if time.time() > deadline:
                console.print(f"{part_name}: out of time, rows left: {sum(r.name not in done for r in rows)}", markup=False)
                break
            progress.update(task, description=f"{part_name}: {row.name}")
            alive = _run_row(store, done, row, console, part_name)
            part["seconds"] = round(spent + time.monotonic() - began, 1)
            store.save()
            if not alive:
                return False
            progress.advance(task)
            if not console.is_terminal and time.monotonic() - spoke > _SILENCE:  # where no bar is seen
                spoke = time.monotonic()
                console.print(f"{part_name}: {len(done)} of {len(rows)} rows", markup=False)
    part["finished"] = all(row.name in done for row in rows)
    store.save()
    return True


def _run_row(store: Store, done: dict[str, Any], row: Row, console: Console, part_name: str) -> bool:
    done[row.name] = {"running": True, "passed": False}
    store.save()
    alive = True
    began = time.monotonic()
    try:
        found = row.run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:
        found = {"passed": False, "why": short(error), "traceback": traceback.format_exc(limit=-6)}
        alive = _device_answers()
    found["seconds"] = round(time.monotonic() - began, 2)
    done[row.name] = found
    if not found["passed"]:
        console.print(f"FAILED {part_name} {row.name}: {found.get('why', '')}", markup=False, soft_wrap=True, style="red")
    return alive


def short(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _device_answers() -> bool:
    """False after an illegal memory access and the like, from which a process does not recover."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return int(torch.ones(3, device="cuda").sum()) == 3
    except Exception:
        return False
