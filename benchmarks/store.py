"""Results that survive a process killed at any moment: a journal with one line a row, and the JSON file made of it.

Several processes may append at once. Nothing is ever rewritten, so that the worst a kill can do is a last line cut short,
which is skipped when the journal is read.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.files import write_json

# A journal is continued only where these are the same: the same machine, the same code.
_SAME = ("device", "torch", "triton", "transformers", "python", "source_digest")
DIED = "the process died in this row"
MOST_DEATHS = 2


@dataclass
class Row:
    """One thing to check or to measure. `run` returns what was found, with "passed" (and "why" where it is False).

    Rows of one `group` run in the same process, one after the other: they share what is expensive to make. `warm` compiles
    what the row will time; it runs in a process that times nothing.
    """

    name: str
    run: Callable[[], dict[str, Any]] = field(repr=False)
    group: str = ""
    warm: Callable[[], None] | None = field(default=None, repr=False)


class Store:
    """The journal `gpu.jsonl`, and what it says so far in `data`:
    `{"environment", "quick", "parts": {part: {"finished", "seconds", "rows": {name: result}}}}`.

    Lines are: the environment (first), the names of a part's rows, a row that begins, a row's result, a part forgotten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {}
        self._read_to = 0
        self.refresh()

    @classmethod
    def begin(cls, path: Path, environment: dict[str, Any], quick: bool) -> Store:
        """Go on with the journal at `path` if it is of this machine and code, else begin a new one."""
        store = cls(path)
        old = store.data
        known = bool(old) and old["quick"] == quick
        if not (known and all(old["environment"].get(key) == environment.get(key) for key in _SAME)):
            path.unlink(missing_ok=True)
            store.__init__(path)
            store.append({"environment": environment, "quick": quick})
        return store

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, in one write, so that processes do not cut into one another's."""
        text = json.dumps(line) + "\n"
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # a line that was cut short
                text = "\n" + text
            os.write(file, text.encode())
        finally:
            os.close(file)
        self.refresh()

    def refresh(self) -> None:
        """Read what this and other processes have added."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._read_to)
                added = file.read()
        except FileNotFoundError:
            return
        complete = added.rfind(b"\n") + 1
        self._read_to += complete
        for line in added[:complete].splitlines():
            try:
                self._take(json.loads(line))
            except ValueError:
                continue

    def _take(self, line: dict[str, Any]) -> None:
        if "environment" in line:
            self.data = {**line, "parts": {}}
            return
        name = line["part"]
        if line.get("forget"):
            self.data["parts"].pop(name, None)
            return
        part = self.part(name)
        if "expected" in line:
            part["expected"] = line["expected"]
            for gone in part["rows"].keys() - set(line["expected"]):
                del part["rows"][gone]
        elif "result" in line:
            part["rows"][line["row"]] = line["result"]
        else:
            deaths = part["rows"].get(line["row"], {}).get("deaths", 0)
            part["rows"][line["row"]] = {"running": True, "passed": False, "deaths": deaths}
        part["seconds"] = round(sum(found.get("seconds", 0.0) for found in part["rows"].values()), 1)
        done = [row for row, found in part["rows"].items() if not found.get("running")]
        part["finished"] = bool(part["expected"]) and set(done) >= set(part["expected"])

    def part(self, name: str) -> dict[str, Any]:
        """A part's results so far."""
        return self.data["parts"].setdefault(name, {"finished": False, "seconds": 0.0, "expected": [], "rows": {}})

    def write(self, path: Path) -> None:
        """Everything as one JSON file."""
        write_json(path, self.data)


def pending(store: Store, part_name: str, rows: list[Row]) -> list[Row]:
    """The rows that have not passed yet; the ones that failed before come last, because they may end the process."""
    done = store.part(part_name)["rows"]
    failed = [row for row in rows if row.name in done and not done[row.name]["passed"]]
    return [row for row in rows if row.name not in done] + failed


def run_rows(
    store: Store,
    part_name: str,
    rows: list[Row],
    over: Callable[[], bool],
    settle: Callable[[], None] = lambda: None,
    alive: Callable[[], bool] = lambda: True,
) -> bool:
    """Run what is pending, in this process. A row in which processes died twice is not tried again.

    Args:
        rows: those of this process.
        over: whether the time is over; no row begins then.
        settle: waits for work that a row has left behind.
        alive: asked after an error: whether the device can still be used.

    Returns:
        False if it cannot: only a new process can go on.
    """
    done = store.part(part_name)["rows"]
    for row in rows:
        found = done.get(row.name, {})
        if found.get("running"):
            result = {"passed": False, "why": DIED, "deaths": found["deaths"] + 1}
            store.append({"part": part_name, "row": row.name, "result": result})
    for row in pending(store, part_name, rows):
        if done.get(row.name, {}).get("deaths", 0) >= MOST_DEATHS:
            continue
        if over():
            break
        if not _run_row(store, part_name, row, settle, alive):
            return False
    return True


def _run_row(
    store: Store, part_name: str, row: Row, settle: Callable[[], None], alive: Callable[[], bool]
) -> bool:
    store.append({"part": part_name, "row": row.name})  # so that a row which kills the process is known by name
    began, good = time.monotonic(), True
    try:
        found = row.run()
        settle()
    except Exception as error:
        found = {"passed": False, "why": short(error), "traceback": traceback.format_exc(limit=-6)}
        good = alive()
    found["seconds"] = round(time.monotonic() - began, 2)
    store.append({"part": part_name, "row": row.name, "result": found})
    return good


def share_out(rows: list[Row], index: int, count: int) -> list[Row]:
    """The rows of process `index` of `count`: group after group is dealt out; a row without a group is one of its own."""
    groups: dict[str, int] = {}
    for row in rows:
        groups.setdefault(row.group or row.name, len(groups))
    return [row for row in rows if groups[row.group or row.name] % count == index]


def short(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
