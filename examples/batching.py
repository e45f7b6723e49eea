"""Dynamic batching: texts of many requests go through one model thread in common batches.

A batch is run when it is full, by texts or by tokens, or when its oldest text has waited long enough. While the model is busy,
the next batch collects. The queue is bounded: who comes when it is full is told so at once, and not after a timeout.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

Tokens = list[int]
Vector = list[float]


class QueueFull(Exception):
    """More texts are waiting than may wait, or the server is closing. Try again later."""


@dataclass
class Waiting:
    """One text in the queue."""

    tokens: Tokens
    answer: asyncio.Future[Vector]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects texts and runs them in batches, until it is closed.

    Args:
        run: the model: token ids of N texts -> N vectors. Called in one thread, never twice at a time.
        max_texts, max_tokens: of a batch. A single text may have more tokens.
        max_wait: seconds that the oldest text of a batch waits for company.
        max_queued: texts that may wait.
    """

    def __init__(
        self,
        run: Callable[[list[Tokens]], list[Vector]],
        max_texts: int = 64,
        max_tokens: int = 8192,
        max_wait: float = 0.005,
        max_queued: int = 1024,
    ) -> None:
        self.run, self.max_texts, self.max_tokens, self.max_wait, self.max_queued = (
            run,
            max_texts,
            max_tokens,
            max_wait,
            max_queued,
        )
        self.closing = False
        self.queue: deque[Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._loop = asyncio.create_task(self._serve())

    async def ask(self, texts: list[Tokens]) -> list[Vector]:
        """The vectors of the texts of one request. If it is cancelled, the texts that did not run yet are dropped.

        Raises:
            QueueFull: all of the texts together do not fit the queue.
            Exception: whatever the model raised for a batch with one of these texts.
        """
        if self.closing or len(self.queue) + len(texts) > self.max_queued:
            raise QueueFull
        loop = asyncio.get_running_loop()
        waiting = [Waiting(tokens, loop.create_future()) for tokens in texts]
        self.queue.extend(waiting)
        self._arrived.set()
        return await asyncio.gather(*(text.answer for text in waiting))

    async def close(self) -> None:
        """Takes no more texts, answers those that wait, and ends the model thread."""
        self.closing = True
        self._arrived.set()
        await self._loop
        self._thread.shutdown()

    async def _serve(self) -> None:
        while batch := await self._next_batch():
            loop = asyncio.get_running_loop()
            try:
                vectors = await loop.run_in_executor(self._thread, self.run, [text.tokens for text in batch])
            except Exception as error:  # the requests of this batch get it; the server goes on
                for text in batch:
                    if not text.answer.done():
                        text.answer.set_exception(error)
                continue
            for text, vector in zip(batch, vectors, strict=True):
                if not text.answer.done():  # its client may be gone by now
                    text.answer.set_result(vector)

    async def _next_batch(self) -> list[Waiting]:
        """The next texts to run; none when the batcher is closed and everybody has an answer."""
        while True:
            while self.queue and self.queue[0].answer.done():  # its client left while it waited
                self.queue.popleft()
            left = self.max_wait if not self.queue else self.queue[0].since + self.max_wait - time.monotonic()
            if self.queue and (self._full() or left <= 0 or self.closing):
                return self._take()
            if self.closing and not self.queue:
                return []
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left if self.queue else None)
            except TimeoutError:
                continue

    def _full(self) -> bool:
        return len(self.queue) >= self.max_texts or sum(len(text.tokens) for text in self.queue) >= self.max_tokens

    def _take(self) -> list[Waiting]:
        batch: list[Waiting] = []
        tokens = 0
        while self.queue and len(batch) < self.max_texts:
            if batch and tokens + len(self.queue[0].tokens) > self.max_tokens:
                break
            text = self.queue.popleft()
            if not text.answer.done():
                batch.append(text)
                tokens += len(text.tokens)
        return batch


class Rate:
    """Texts that each client may send in a second, on average, with bursts of ten seconds' worth. 0 is no limit.

    Clients are told apart by their address, so it says little behind a proxy that does not pass the address on.
    """

    SECONDS, CLIENTS = 10, 10_000

    def __init__(self, texts_per_second: float) -> None:
        self.rate = texts_per_second
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by client: texts left, when that was

    def wait(self, client: str, texts: int) -> float:
        """Seconds until the client may send these texts; 0 means now, and counts them."""
        if not self.rate:
            return 0.0
        now, most = time.monotonic(), max(self.rate * self.SECONDS, 1)
        left, before = self._left.pop(client, (most, now))
        left = min(most, left + (now - before) * self.rate)
        allowed = left >= min(texts, most)
        self._left[client] = (left - texts if allowed else left, now)
        while len(self._left) > self.CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if allowed else (min(texts, most) - left) / self.rate
