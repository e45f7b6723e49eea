"""What is done to which server, in which order, for how long; and what was found."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .answers import Answers
from .events import Event, drain, kill_and_restart
from .hostile import annoy
from .load import Tally, growth, saturate
from .server import Server

GROWTH = 0.02  # of resident memory after the warm-up
SHOWN = 5  # of many problems of one kind
SAMPLES = 200  # of memory that are kept


@dataclass(frozen=True)
class Times:
    """Seconds under load.

    Args:
        warm: each server, before anything is measured.
        phase, rounds: of the comparison: in each round every server has one phase.
        endure: each converted server, with hostile clients beside.
        fault: before and after a server is killed.
        growth: of resident memory after the warm-up, at most.
    """

    warm: float
    phase: float
    rounds: int
    endure: float
    fault: float
    growth: float = GROWTH

    @classmethod
    def of(cls, minutes: float, servers: int, fast: int) -> Times:
        """A tenth to warm up, four tenths to compare, the rest to endure."""
        seconds, rounds = 60 * minutes, max(3, round(minutes / 2))
        return cls(0.1 * seconds / servers, 0.4 * seconds / servers / rounds, rounds, 0.5 * seconds / fast, 5)

    def total(self, servers: int, fast: int) -> float:
        """Without starting servers, and what the last answers take."""
        return servers * (self.warm + self.phase * self.rounds) + fast * self.endure + 2 * self.fault


@dataclass
class Found:
    """All numbers, ready for JSON; `problems` is empty if every promise was kept."""

    comparison: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    endurance: dict[str, dict[str, Any]] = field(default_factory=dict)
    hostile: dict[str, int] = field(default_factory=dict)  # what was sent: how often
    killed: dict[str, float] = field(default_factory=dict)
    drained: dict[str, float] = field(default_factory=dict)
    answered: int = 0
    problems: list[str] = field(default_factory=list)

    def took(self, where: str, tally: Tally) -> None:
        """Counts the answers of a phase, and writes down what was wrong in it."""
        self.answered += tally.answered
        if not tally.answered:
            self.problems.append(f"{where}: no answer at all")
        self._problems(where, "wrong answer", tally.wrong)
        self._problems(where, "error", [failure.kind for failure in tally.failures])

    def event(self, where: str, event: Event) -> None:
        self._problems(where, "problem", event.problems)

    def _problems(self, where: str, what: str, found: list[str]) -> None:
        if found:
            self.problems.append(f"{where}: {len(found)} x {what}: {'; '.join(found[:SHOWN])}")


@contextmanager
def started(servers: list[Server]) -> Iterator[None]:
    """All at the same time; whatever happens, none is left running."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
        yield
    finally:
        for server in servers:
            server.kill()


async def soak(
    pairs: dict[str, dict[str, Server]],
    answers: Answers,
    times: Times,
    clients: int,
    stage: Callable[[str], None] = lambda what: None,
) -> Found:
    """Everything, with servers that run.

    Args:
        pairs: by dtype, the servers "fast" and (if it is compared) "stock".
        answers: the texts of the load.
        clients: of the load, at most 64; hostile ones come on top.
        stage: is told what happens now.

    The last dtype's converted server is killed and started again, and told to end: it does not run afterwards.
    """
    found = Found()
    everyone = [(dtype, side, server) for dtype, pair in pairs.items() for side, server in pair.items()]
    for dtype, _, server in everyone:
        stage(f"{server.name}: warming up")
        await _warm(server, answers, dtype, times, clients, found)
    for turn in range(times.rounds):
        for position in range(len(everyone)):
            dtype, side, server = everyone[(position + turn) % len(everyone)]
            stage(f"{server.name}: round {turn + 1} of {times.rounds}")
            tally = await saturate(server, answers, dtype, times.phase, clients, seed=turn)
            found.took(f"{server.name}, comparison", tally)
            found.comparison.setdefault(dtype, {}).setdefault(side, []).append(_numbers(tally))
    for dtype, pair in pairs.items():
        stage(f"{pair['fast'].name}: endurance, hostile clients beside")
        await _endure(pair["fast"], answers, dtype, times, clients, found)
    last = pairs[dtype]["fast"]
    stage(f"{last.name}: killed and started again")
    event = await kill_and_restart(last, answers, dtype, clients, times.fault)
    found.killed = event.numbers
    found.event(f"{last.name}, killed", event)
    stage(f"{last.name}: told to end")
    event = await drain(last, answers, dtype, clients)
    found.drained = event.numbers
    found.event(f"{last.name}, told to end", event)
    for _, _, server in everyone:
        found.problems += [f"{server.name} printed: {line}" for line in server.complaints()[:SHOWN]]
    return found


async def _warm(server: Server, answers: Answers, dtype: str, times: Times, clients: int, found: Found) -> None:
    """With hostile clients as well, so that all that a server ever does has been done once."""
    tally, _ = await asyncio.gather(
        saturate(server, answers, dtype, times.warm, clients, seed=50), annoy(server, answers, 0)
    )
    found.took(f"{server.name}, warming up", tally)


async def _endure(server: Server, answers: Answers, dtype: str, times: Times, clients: int, found: Found) -> None:
    tally, hostility = await asyncio.gather(
        saturate(server, answers, dtype, times.endure, clients, seed=60), annoy(server, answers, times.endure)
    )
    found.took(f"{server.name}, endurance", tally)
    for kind, number in hostility.sent.items():
        found.hostile[kind] = found.hostile.get(kind, 0) + number
    found.event(f"{server.name}, hostile clients", Event(problems=hostility.unexpected))
    resident = [size for _, size in tally.resident]
    grown = growth(resident)
    if grown > times.growth:
        found.problems.append(f"{server.name}: resident memory grew by {grown:.1%}, more than {times.growth:.0%}")
    found.endurance[dtype] = {
        **_numbers(tally),
        "answered": tally.answered,
        "resident MiB": statistics.median(resident) / 2**20,
        "growth": grown,
        "samples": [[round(when, 1), size] for when, size in tally.resident[:: len(tally.resident) // SAMPLES + 1]],
    }


def _numbers(tally: Tally) -> dict[str, float]:
    return {
        "seconds": tally.seconds,
        "requests": len(tally.latencies),
        "texts/s": tally.texts / tally.seconds,
        "tokens/s": tally.tokens / tally.seconds,
        "p50 ms": 1000 * tally.quantile(0.5),
        "p99 ms": 1000 * tally.quantile(0.99),
    }
