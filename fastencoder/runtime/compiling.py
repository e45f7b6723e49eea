"""Compiles many launches without a GPU, on several processes, each result as soon as it is there."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..kernels import stand_in
from ..kernels._triton import DeviceLimits, Launch

Result = TypeVar("Result")

# A launch with the device that it is for. Forked processes find the tasks here: kernels cannot be pickled.
Task = tuple[Launch, DeviceLimits]
_tasks: Sequence[Task] = ()
_look: Callable[[Any, Launch, DeviceLimits], Any]


def compile_tasks(
    tasks: Sequence[Task], look: Callable[[Any, Launch, DeviceLimits], Result], jobs: int | None = None
) -> Iterator[tuple[int, Result | Exception]]:
    """Compiles every task and yields its position with `look(compiled, launch, limits)`, or with the error that it ended in.

    Args:
        tasks: what to compile. Results come in the order in which they are done.
        look: runs where the kernel was compiled; what it returns is pickled.
        jobs: processes; None: as many as this process may use cores.
    """
    global _tasks, _look
    _tasks, _look = tasks, look
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(tasks))
    # Large ones last would leave the other processes idle at the end; tasks of one kind come in runs, so they are mixed.
    order = sorted(range(len(tasks)), key=lambda position: (position * 7919) % (len(tasks) or 1))
    if jobs <= 1:
        yield from map(_compile, order)
        return
    # fork: the children inherit the tasks. Nothing here has touched CUDA, which would not survive it.
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(_compile, order)


def progress() -> Progress:
    """A progress bar on standard error, which stays empty where that is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _compile(position: int) -> tuple[int, Any]:
    launch, limits = _tasks[position]
    try:
        with stand_in.standing_in(limits.capability):
            return position, _look(stand_in.warm_up(launch), launch, limits)
    except Exception as error:
        return position, RuntimeError(f"{type(error).__name__}: {error}")  # a compiler's own errors may not pickle
