"""Timing: interleaved rounds, so that a slow spell of the machine meets every system alike."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch

Call = Callable[[int], object]  # gets the number of the round, to choose among its inputs


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, sample: list[float]) -> Spread:
        if len(sample) < 2:
            return cls(sample[0], sample[0], sample[0], len(sample))
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median, low, high, len(sample))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class HostClock:
    """Seconds of a call that is done when it returns."""

    def __call__(self, call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began


class CudaClock:
    """Seconds from an idle device to the end of all work that a call gave it, by events of the device.

    The first event is recorded while the device has nothing to do, so the time in which the host prepares the call counts.
    """

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1000


def clock_for(device: torch.device) -> HostClock | CudaClock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


def interleaved(
    calls: dict[str, Call],
    rounds: int,
    clock: Callable[[Callable[[], object]], float],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every call in every round. Each round begins with another one; all of them must be warm."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock(partial(calls[name], turn)))
        tick()
    return times


def ratios(times: list[float], reference: list[float]) -> Spread:
    """How many times faster than the reference, round by round."""
    return Spread.of([slow / quick for slow, quick in zip(reference, times, strict=True)])


class OutOfTime(Exception):
    """A step took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside the block when its time is over (at the next Python instruction; main thread only)."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"not done after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
