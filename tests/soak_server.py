"""A small server with defects, to see that the soak test finds them. It knows no model: `vector` is the right answer.

python -m tests.soak_server --defects wrong,leaks --port 8000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.limits import Limits, Refused, check_texts, parse

SECONDS = 0.03  # of a request; so that some wait when it is told to end
LEAK = 300_000  # bytes of a request
BALLAST = 200 * 2**20  # bytes, as a model has: a few more for a moment are no growth then


def vector(text: str) -> np.ndarray:
    """16 numbers of length 1 that depend on every letter."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    numbers = np.random.default_rng(seed).standard_normal(16).astype(np.float32)
    return numbers / np.linalg.norm(numbers)


class Application:
    """Answers as the example does, but for the defects; a wrong answer is one in twenty-five."""

    def __init__(self, defects: list[str]) -> None:
        self.defects, self.requests, self.waiting = defects, 0, 0
        self.model, self.ballast = asyncio.Lock(), b"\x01" * BALLAST
        self.kept: list[bytes] = []

    async def health(self, request: Request) -> JSONResponse:
        return JSONResponse({"queued": self.waiting})

    async def embed(self, request: Request) -> JSONResponse:
        try:
            texts = check_texts(parse(await self._body(request)), Limits())
            if any(text.count(" ") > 1000 for text in texts) and "accepts" not in self.defects:
                raise Refused(413, "too many tokens")
        except Refused as error:
            return JSONResponse({"error": "no" if "says" in self.defects else error.message}, error.status)
        except ClientDisconnect:
            return JSONResponse({})
        self.requests += 1
        self.waiting += len(texts)
        async with self.model:
            await asyncio.sleep(SECONDS)
        self.waiting -= len(texts)
        return self._answer([vector(text) for text in texts])

    def _answer(self, vectors: list[np.ndarray]) -> JSONResponse:
        if "leaks" in self.defects:
            self.kept.append(bytes(range(256)) * (LEAK // 256))
        if self._shows("wrong", 0):
            vectors[-1] = vectors[-1] + np.float32(1e-4)
        if self._shows("exchanged", 5):
            vectors = [vector("another text"), *vectors[1:]]
        if self._shows("drops", 10):
            return JSONResponse({"error": "lost"}, 500)
        if self._shows("fewer", 15):
            vectors = vectors[1:]
        answer: list[Any] = [row.tolist() for row in vectors]
        if self._shows("nan", 20):
            answer[0] = [None] * 16
        return JSONResponse({"embeddings": answer})

    def _shows(self, defect: str, when: int) -> bool:
        return defect in self.defects and self.requests % 25 == when

    async def _body(self, request: Request) -> bytes:
        body = b"".join([chunk async for chunk in request.stream()])
        if len(body) > Limits.body_bytes and "accepts" not in self.defects:
            raise Refused(413, "too many bytes")
        return body


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--defects", default="")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    made = Application(options.defects.split(","))
    app = Starlette(
        routes=[Route("/health", made.health, methods=["GET"]), Route("/embed", made.embed, methods=["POST"])]
    )
    patience = 0 if "abrupt" in options.defects else 30
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(app, port=options.port, timeout_graceful_shutdown=patience, access_log=False, log_level="error")


if __name__ == "__main__":
    main()
