"""One cell of the matrix: one model, one workload, one dtype, every system in turn, round by round."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu import judge, models, workloads
from benchmarks.cpu.pool import Pool
from benchmarks.cpu.systems import STOCK_EAGER, SYSTEMS, Source

# A call that is shorter is repeated: it would find the caches full of another system's weights.
VISIT = 0.1  # seconds
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """A batch of a workload, as a file, with what is needed to judge answers."""

    workload: workloads.Workload
    file: Path
    lengths: list[int]
    reference: np.ndarray


@contextmanager
def prepared(
    source: Source,
    chosen: list[workloads.Workload],
    tokens: list[int],
    threads: int,
    say: Say,
    stock: str = STOCK_EAGER,
) -> Iterator[list[Work]]:
    """The batches of one model and stock's answers to them in fp32, in a folder that is there as long as this context.

    Raises:
        RuntimeError: stock does not run.
    """
    model = models.MODELS[source.name]
    with (
        tempfile.TemporaryDirectory(prefix="fastencoder-bench-") as name,
        Pool([stock], source, "fp32", threads, say) as pool,
    ):
        folder, made = Path(name), []
        for workload in chosen:
            file = folder / f"{workload.name}.npz"
            np.savez(file, **workloads.batch(workload, model, source.folder, tokens))
            lengths = workloads.real_lengths(workload, model, source.folder)
            said = pool.warm(workload.name, file, lengths, folder) if pool.running else pool.status
            if "warm_seconds" not in said[stock]:
                raise RuntimeError(f"{source.name} does not run: {said[stock]}")
            made.append(Work(workload, file, lengths, np.load(folder / f"{stock}.npy")))
        pool.close()
        yield made


def measure(pool: Pool, work: Work, rounds: int, say: Say, tick: Callable[[], None]) -> dict[str, Any]:
    """Compare every system's answer, then time those that are right. See `results` for the keys."""
    found: dict[str, dict[str, Any]] = {system: dict(status) for system, status in pool.status.items()}
    with tempfile.TemporaryDirectory(prefix="fastencoder-bench-") as name:
        said = pool.warm(work.workload.name, work.file, work.lengths, Path(name))
        for system, reply in said.items():
            found[system] |= reply
            if "warm_seconds" in reply:
                found[system] |= _judged(np.load(Path(name) / f"{system}.npy"), work, pool.dtype)
    right = [system for system, result in found.items() if result.get("equal")]
    calls = {system: partial(call, pool, system, work.workload.name) for system in right}
    for system in right:
        for beside in found[system].get("beside", []):
            calls[beside] = partial(call, pool, system, f"{beside} {work.workload.name}")
    say(f"{work.workload.name}: timing {len(calls)} systems")
    samples = in_turn(calls, rounds, tick)
    for system in right:
        times = samples[system]
        if len(times) == rounds:
            found[system]["seconds"] = times
        else:
            found[system] |= {"failed": pool.status[system].get("failed", "it failed while it was timed")}
    return {
        "model": pool.source.name,
        "workload": work.workload.name,
        "dtype": pool.dtype,
        "work": workloads.describe(work.workload, work.lengths),
        "rounds": rounds,
        "systems": {system: kept(result) for system, result in found.items()},
        "beside": {name: times for name, times in samples.items() if name not in SYSTEMS},
        "versions": pool.versions,
    }


def in_turn(
    calls: dict[str, Callable[[], float | None]], rounds: int, tick: Callable[[], None]
) -> dict[str, list[float]]:
    """Every call once a round, each round beginning with another one. A call that fails is not made again."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    alive = list(calls)
    for turn in range(rounds):
        first = turn % max(len(alive), 1)
        for name in alive[first:] + alive[:first]:
            seconds = calls[name]()
            if seconds is None:
                alive.remove(name)
            else:
                samples[name].append(seconds)
        tick()
    return samples


def call(pool: Pool, system: str, name: str) -> float | None:
    """Seconds of one call of a system, or None if it runs no longer."""
    if system not in pool.running:
        return None
    return pool.ask(system, {"do": "run", "name": name, "visit": VISIT}).get("seconds")


def _judged(answer: np.ndarray, work: Work, dtype: str) -> dict[str, Any]:
    verdict = judge.compare(answer, work.reference, work.lengths, dtype)
    found = {"error": verdict.error, "cosine": verdict.cosine, "equal": verdict.equal}
    return found if verdict.equal else found | {"wrong": verdict.why}


_KEPT = ("not_available", "failed", "wrong", "error", "cosine", "equal", "seconds", "warm_seconds", "peak_bytes")


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """What of a system's result goes to the file."""
    return {key: result[key] for key in (*_KEPT, "base_bytes", "notes", "rest_seconds") if key in result}
