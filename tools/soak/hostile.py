"""Clients that send what they should not, and clients that leave, while others are at work.

Each of the first gets an answer of 4xx that says what is wrong. The second get none; what matters is what the others get.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from .answers import Answers
from .server import Server
from .wire import Connection, post, say, texts_body

# What is sent, the status that it has to get, and words that the message has to have.
BAD: dict[str, tuple[bytes, int, str]] = {
    "an empty text": (texts_body(["a", ""]), 422, "text 1 is empty"),
    "a text of spaces": (texts_body([" \n\t "]), 422, "text 0 is empty"),
    "no text": (texts_body([]), 422, "there is no text"),
    "no list of texts": (b'{"texts": "a"}', 422, "has to be"),
    "texts that are numbers": (b'{"texts": [1, NaN, 1e999]}', 422, "has to be"),
    "a text of 100,000 characters": (texts_body(["a" * 100_000]), 413, "100000 characters"),
    "a text of 5,000 words": (texts_body(["of " * 5_000]), 413, "tokens"),
    "129 texts": (texts_body(["a"] * 129), 413, "129 texts"),
    "100,000 texts": (texts_body(["a"] * 100_000), 413, "100000 texts"),
    "a body of 5 MiB": (b" " * (5 * 2**20), 413, "bytes"),
    "invalid UTF-8": (b'{"texts": ["\xff\xfe"]}', 400, "not UTF-8: byte 12"),
    "half a surrogate pair": (b'{"texts": ["\\ud800"]}', 400, "surrogate"),
    "half of a JSON": (b'{"texts": ["a"', 400, "not JSON"),
    "no body": (b"", 400, "not JSON"),
    "a JSON nested 100,000 times": (b"[" * 100_000, 400, "nested too deeply"),
    "a number of 10,000 digits": (b"9" * 10_000, 400, "not JSON"),
}
LEAVING = ("leaves before the body", "leaves within the body", "leaves while it waits")


@dataclass
class Hostility:
    """What was sent, how often, and what was not answered as it has to be."""

    sent: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)


async def annoy(server: Server, answers: Answers, seconds: float, pause: float = 0.05, seed: int = 0) -> Hostility:
    """For so many seconds, and at least until everything was sent once: one after the other, in a new order each time."""
    seen, draw, end = Hostility(), random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end or not seen.sent:
        for kind in draw.sample([*BAD, *LEAVING, "no HTTP"], len(BAD) + len(LEAVING) + 1):
            if seen.sent[kind] and time.monotonic() >= end:
                break
            try:
                unexpected = await _one(server, answers, kind, draw)
            except (OSError, TimeoutError) as error:
                unexpected = f"{type(error).__name__}: {error}"
            seen.sent[kind] += 1
            if unexpected:
                seen.unexpected.append(f"{kind}: {unexpected}")
            await asyncio.sleep(pause)
    return seen


async def _one(server: Server, answers: Answers, kind: str, draw: random.Random) -> str:
    if kind in LEAVING:
        await _leave(server, kind, draw.sample(answers.texts, min(8, len(answers.texts))), draw)
        return ""
    if kind == "no HTTP":
        answer = await say(server.port, b"\x16\x03\x01 hello\r\n\r\n")
        return "" if answer.status == 400 else f"status {answer.status}"
    body, status, words = BAD[kind]
    answer = await say(server.port, post(body))
    if answer.status != status or words not in answer.error():
        return f"status {answer.status} instead of {status}, {answer.body[:80]!r}"
    return ""


async def _leave(server: Server, kind: str, texts: list[str], draw: random.Random) -> None:
    connection, body = await Connection.to(server.port), texts_body(texts)
    if kind == "leaves before the body":
        await connection.send(post(b"", claimed=len(body)))
    elif kind == "leaves within the body":
        await connection.send(post(body[:-5], claimed=len(body)))
    else:
        await connection.send(post(body))
    await asyncio.sleep(draw.uniform(0, 0.05))
    connection.leave()
