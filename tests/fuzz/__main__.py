"""Fuzzing for as long as one likes: `python -m tests.fuzz --minutes 30`, or `make fuzz MINUTES=30`.

Exit status 1, with a test to paste, when an example fails. Failures are kept in `.hypothesis/fuzz` and come first the next
time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import run as fuzz

EXAMPLES = {"models": 12, "kernels": 150}  # of one run: some seconds


def main(
    minutes: Annotated[float, typer.Option(help="How long to go on drawing examples.")] = 30.0,
    workers: Annotated[int, typer.Option(help="Processes, of one thread each.")] = os.cpu_count() or 1,
    seed: Annotated[int | None, typer.Option(help="Where the examples begin; by default somewhere else each time.")] = None,
) -> None:
    console = Console()
    start = random.randrange(2**32) if seed is None else seed
    console.print(f"seed {start}, {workers} processes, {minutes:g} minutes; failures are kept in {fuzz.STATE}")
    subjects = itertools.cycle(("models", "models", "models", "kernels"))
    counts, impossible, failed = dict.fromkeys(EXAMPLES, 0), 0, {}
    end = time.monotonic() + 60 * minutes
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, initializer=fuzz.quiet_worker) as pool,
        Progress(*columns, console=console, refresh_per_second=1) as progress,
    ):
        task = progress.add_task("starting", total=60 * minutes)
        running: dict[Future, str] = {}
        while running or (time.monotonic() < end and not failed):
            while time.monotonic() < end and not failed and len(running) < 2 * workers:
                subject, start = next(subjects), start + 1
                running[pool.submit(fuzz.run, subject, EXAMPLES[subject], start)] = subject
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                subject, outcome = running.pop(future), future.result()
                counts[subject] += outcome.cases
                impossible += outcome.impossible
                if outcome.example is not None:
                    failed.setdefault(subject, outcome)
            said = ", ".join(f"{count:,} of {subject}" for subject, count in counts.items())
            progress.update(task, completed=60 * minutes - max(end - time.monotonic(), 0), description=f"{said}")
    console.print(f"{sum(counts.values()):,} cases compared ({said}); {impossible:,} examples were no model or no input")
    for subject, outcome in failed.items():
        console.print(f"[red]{subject}: {outcome.error}[/]", highlight=False)
        print(f"\n{outcome.as_test(subject)}")
    raise typer.Exit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
