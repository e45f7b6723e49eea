"""HTTP/1.1 by hand: for clients that httpx is too well-behaved to be, and for knowing when a request has left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = 60


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes

    def error(self) -> str:
        """The message of a refusal; empty if there is none."""
        try:
            return str(json.loads(self.body)["error"])
        except (ValueError, KeyError, TypeError):
            return ""


class Connection:
    """One connection to 127.0.0.1, for one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> Answer:
        """All that comes until the server closes. Raises ConnectionError if that is no answer, TimeoutError."""
        async with asyncio.timeout(SECONDS):
            data = await self.reader.read(-1)
        head, _, body = data.partition(b"\r\n\r\n")
        words = head.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/"):
            raise ConnectionError(f"no answer, but {data[:40]!r}")
        return Answer(int(words[1]), body)

    def leave(self) -> None:
        """Without a word: what is not sent yet is not sent, and nobody reads the answer."""
        self.writer.transport.abort()


def post(body: bytes, claimed: int | None = None) -> bytes:
    """A POST to /embed that asks the server to close afterwards; `claimed` is another Content-Length than the body's."""
    size = len(body) if claimed is None else claimed
    return b"POST /embed HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size + body


def texts_body(texts: Sequence[str]) -> bytes:
    return json.dumps({"texts": list(texts)}).encode()


async def say(port: int, data: bytes) -> Answer:
    """Sends the bytes and gives what comes back."""
    connection = await Connection.to(port)
    try:
        await connection.send(data)
        return await connection.answer()
    finally:
        connection.leave()
