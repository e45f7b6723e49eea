"""The processes of one part: started, watched through the journal, started again behind a row that ended one."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.store import Store

PREPARE = "prepare"
NO_DEVICE, DEVICE_LOST = 2, 3
ATTEMPTS = 4  # processes one after the other: each goes on behind the row that ended the one before
GRACE = 40.0  # seconds that the last row of a part may take beyond its time
_SILENCE = 20.0  # seconds
# Compiling is what takes the time where nothing is timed: several processes then share the device.
PROCESSES = {"kernels": 8, "parity": 3}
WARMED = ("rates", "dispatch")  # compiled by as many, then timed by one


def prepare(options: argparse.Namespace, out: Path) -> int:
    """Find out where this runs and begin the journal. Returns NO_DEVICE if there is no device."""
    return subprocess.run(_command(options, PREPARE, out), cwd=out).returncode


def run_part(options: argparse.Namespace, name: str, out: Path, deadline: float, console: Console) -> None:
    """Run what is pending of a part; what it found is in the journal."""
    journal = out / "gpu.jsonl"
    if options.fresh:
        Store(journal).append({"part": name, "forget": True})
    most = 1 if options.quick else max((os.cpu_count() or 1) // 2, 1)
    began = time.time()
    if name in WARMED and not options.quick:
        halfway = began + max(deadline - began, 0.0) / 2
        _run([_Worker(options, name, out, halfway, i, most, "--warm") for i in range(most)], name, journal, console)
    count = min(PROCESSES.get(name, 1), most)
    _run([_Worker(options, name, out, deadline, i, count) for i in range(count)], name, journal, console)
    part = Store(journal).part(name)
    passed = sum(found["passed"] for found in part["rows"].values())
    left = sum(row not in part["rows"] for row in part["expected"])
    late = f", {left} left when the time was over" * bool(left)
    console.print(f"{name}: {passed} of {len(part['rows'])} rows passed{late}; {time.time() - began:.0f} s")


def _run(workers: list[_Worker], name: str, journal: Path, console: Console) -> None:
    """All workers at once, to their end."""
    with ThreadPoolExecutor(len(workers)) as pool:
        endings = [pool.submit(worker.attempts) for worker in workers]
        try:
            _watch(journal, name, endings, console)
        except BaseException:  # Ctrl-C too
            for worker in workers:
                worker.stop()
            raise
    for said in dict.fromkeys(ending.result() for ending in endings):
        if said:
            console.print(f"{name}: {said}", style="red", markup=False, soft_wrap=True)


def _command(options: argparse.Namespace, worker: str, out: Path) -> list[str]:
    program = Path(__file__).resolve().with_name("gpu.py")
    command = [sys.executable, str(program), "--worker", worker, "--device", options.device, "--out", str(out.resolve())]
    return command + ["--quick"] * options.quick


class _Worker:
    """One process of a part, and those that follow it where it ends too early."""

    def __init__(
        self, options: argparse.Namespace, name: str, out: Path, deadline: float, index: int, count: int, *more: str
    ) -> None:
        self._command = [*_command(options, name, out), *more]
        self._command += ["--index", str(index), "--count", str(count), "--deadline", str(deadline)]
        self._log, self._deadline = out / "gpu.log", deadline
        self._process: subprocess.Popen | None = None
        self._stopped = False

    def attempts(self) -> str:
        """Run a process until one comes to its end. Returns what went wrong, empty if nothing did."""
        said = ""
        for _ in range(ATTEMPTS):
            with open(self._log, "ab") as log:
                self._process = subprocess.Popen(self._command, stdout=log, stderr=log, process_group=0)
                try:
                    status = self._process.wait(timeout=max(self._deadline + GRACE - time.time(), 1.0))
                except subprocess.TimeoutExpired:
                    return f"a row did not end within {GRACE:.0f} s of its part's time; stopped"
                finally:
                    self._end()
            if status == 0:
                return ""
            said = f"a process ended with status {status}; see gpu.log"
            if self._stopped or time.time() > self._deadline:
                break
        return said

    def stop(self) -> None:
        """End the process, and start no other."""
        self._stopped = True
        self._end()

    def _end(self) -> None:
        """End the process and what it has started (pytest, compilers): the group that it leads, and nothing else."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


def _watch(journal: Path, name: str, endings: list[Any], console: Console) -> None:
    """Show the rows as they come, failures by name; on a terminal with a bar."""
    store, spoke, told = Store(journal), time.monotonic(), set[str]()
    told.update(_failed(store, name))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)
        while True:
            over = all(ending.done() for ending in endings)
            store.refresh()
            part = store.part(name)
            running = [row for row, found in part["rows"].items() if found.get("running")]
            done = len(part["rows"]) - len(running)
            shown = f"{name}: {running[-1]}"[:70] if running else name
            progress.update(task, total=len(part["expected"]) or None, completed=done, description=shown)
            for row in _failed(store, name) - told:
                why = part["rows"][row].get("why", "")
                console.print(f"FAILED {name} {row}: {why}", markup=False, soft_wrap=True, style="red")
                told.add(row)
            if not console.is_terminal and time.monotonic() - spoke > _SILENCE:  # where no bar is seen
                spoke = time.monotonic()
                console.print(f"{name}: {done} of {len(part['expected'])} rows" if part["expected"] else f"{name}: compiling")
            if over:
                return
            time.sleep(0.2)


def _failed(store: Store, name: str) -> set[str]:
    return {row for row, found in store.part(name)["rows"].items() if not found["passed"] and not found.get("running")}
