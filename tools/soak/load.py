"""Clients that keep a server busy without a pause, and compare every answer.

The loop is closed: each of so many clients sends its next request when it has the answer to the last one. So the number of
requests in work is bounded, and the latency is that of a server which is never idle.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import httpx
import psutil

from .answers import Answers
from .server import Server

MOST_CLIENTS = 64
SIZES = (1, 1, 1, 2, 4, 8)  # texts of a request
PAUSE = 0.05  # seconds, after a connection that failed
SAMPLE_SECONDS = 0.1  # between two looks at the server's memory


@dataclass
class Failure:
    """A request without an answer: when it was sent and when it failed (seconds of the monotonic clock), and how."""

    sent: float
    failed: float
    kind: str


@dataclass
class Tally:
    """What the clients saw. Latencies (seconds) and throughput are of answers that came before the end.

    Attributes:
        answered: requests whose answer was compared, the last ones among them.
        right: of these, when each right answer came.
        resident: (seconds since the begin, bytes) of the server.
    """

    seconds: float
    answered: int = 0
    right: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    texts: int = 0
    tokens: int = 0
    resident: list[tuple[float, int]] = field(default_factory=list)

    def errors(self) -> Counter[str]:
        return Counter(failure.kind for failure in self.failures)

    def quantile(self, share: float) -> float:
        """Seconds; not a number if there was no answer."""
        times = sorted(self.latencies)
        return times[min(int(share * len(times)), len(times) - 1)] if times else float("nan")


async def saturate(server: Server, answers: Answers, dtype: str, seconds: float, clients: int, seed: int = 0) -> Tally:
    """Load of `clients` clients for so many seconds, and until the last answer is there."""
    if not 0 < clients <= MOST_CLIENTS:
        raise ValueError(f"{clients} clients: the load is bounded, 1 to {MOST_CLIENTS}")
    tally, begin = Tally(seconds), time.monotonic()
    end = begin + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=server.address, timeout=120, limits=limits) as client:
        watcher = asyncio.create_task(_watch(server, tally, begin))
        await asyncio.gather(*(_client(client, answers, dtype, end, tally, f"{seed}/{i}") for i in range(clients)))
        watcher.cancel()
    return tally


async def _client(client: httpx.AsyncClient, answers: Answers, dtype: str, end: float, tally: Tally, seed: str) -> None:
    draw = random.Random(seed)
    while (sent := time.monotonic()) < end:
        of = draw.choices(range(len(answers.texts)), k=draw.choice(SIZES))
        try:
            response = await client.post("/embed", json={"texts": [answers.texts[i] for i in of]})
        except httpx.TransportError as error:
            tally.failures.append(Failure(sent, time.monotonic(), type(error).__name__))
            await asyncio.sleep(PAUSE)
            continue
        came = time.monotonic()
        if response.status_code != 200:
            tally.failures.append(Failure(sent, came, f"status {response.status_code}: {response.text[:80]}"))
            await asyncio.sleep(PAUSE)
            continue
        tally.answered += 1
        if wrong := compare(response.content, answers, of, dtype):
            tally.wrong.append(wrong)
        else:
            tally.right.append(came)
        if came <= end:
            tally.latencies.append(came - sent)
            tally.texts += len(of)
            tally.tokens += int(answers.tokens[of].sum())


def compare(content: bytes, answers: Answers, of: list[int], dtype: str) -> str:
    """What is wrong with the body of an answer; empty if nothing is."""
    try:
        given = json.loads(content)["embeddings"]
    except (ValueError, KeyError, TypeError):
        return "the body is not {'embeddings': ...}"
    return answers.wrong(given, of, dtype)


async def _watch(server: Server, tally: Tally, begin: float) -> None:
    while True:
        await asyncio.sleep(SAMPLE_SECONDS)
        with suppress(psutil.Error):  # it may be killed at this moment
            tally.resident.append((time.monotonic() - begin, server.resident()))


def growth(resident: list[int], parts: int = 8) -> float:
    """How far the memory rose above where it began: the largest median of any of so many parts of the samples, over the
    median of the first, minus 1. Medians, because a batch that runs has its own memory for a moment."""
    if len(resident) < 2 * parts:
        raise ValueError(f"{len(resident)} samples of memory are too few for {parts} parts")
    cuts = [len(resident) * part // parts for part in range(parts + 1)]
    medians = [statistics.median(resident[a:b]) for a, b in pairwise(cuts)]
    return max(medians) / medians[0] - 1
