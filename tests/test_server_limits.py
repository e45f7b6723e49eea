"""What examples/server.py does with requests that are too large, too many, too slow, or whose client leaves: in this process,
without a model."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


class Batcher:
    """In the model's place."""

    queue = ()

    def __init__(self) -> None:
        self.asked = 0

    async def ask(self, rows: list[list[int]]) -> list[list[float]]:
        self.asked += len(rows)
        return [[1.0]] * len(rows)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(EXAMPLES)
    import server

    monkeypatch.setattr(sys, "argv", ["server.py", "--rate", "2"])
    yield server


def call(server: Any, bodies: list[list[Any]], client: str = "1.2.3.4") -> list[tuple[int, dict[str, str], Any]]:
    """(status, headers, body) of requests whose bodies come in these pieces; seconds are pauses, None is a client that
    leaves."""
    app = server.make_app(server.settings())
    app.state.batcher = Batcher()

    async def one(pieces: list[Any]) -> tuple[int, dict[str, str], Any]:
        left, said = list(pieces), []

        async def receive() -> dict[str, Any]:
            while left and isinstance(left[0], float):
                await asyncio.sleep(left.pop(0))
            if not left:
                await asyncio.Event().wait()  # connected, and silent
            piece = left.pop(0)
            if piece is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": piece, "more_body": bool(left)}

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        scope = {"type": "http", "method": "POST", "path": "/embed", "headers": [], "client": (client, 1)}
        await app(scope | {"query_string": b"", "http_version": "1.1", "scheme": "http"}, receive, send)
        headers = {name.decode(): value.decode() for name, value in said[0]["headers"]}
        body = b"".join(message.get("body", b"") for message in said[1:])
        return said[0]["status"], headers, json.loads(body) if body else None

    async def all_of_them() -> list[tuple[int, dict[str, str], Any]]:
        return [await one(pieces) for pieces in bodies]

    return asyncio.run(asyncio.wait_for(all_of_them(), 60))


def test_the_rate_of_an_address_is_limited_and_it_is_told_when_to_come_again(server: Any) -> None:
    texts = json.dumps({"texts": ["a"] * 15}).encode()
    first, second = call(server, [[texts], [texts]])
    assert first[0] == 200 and first[2] == {"embeddings": [[1.0]] * 15}
    assert second[0] == 429 and second[1]["retry-after"] == "5"  # 20 at once, 2 a second
    assert "too many texts" in second[2]["error"]


def test_a_body_in_pieces_is_one_body(server: Any) -> None:
    assert call(server, [[b'{"texts": ', 0.01, b'["a"]}']])[0][2] == {"embeddings": [[1.0]]}


def test_a_body_that_is_too_large_is_read_to_its_end_and_not_kept(server: Any) -> None:
    pieces = [b" " * 2**20 for _ in range(6)]
    status, _, body = call(server, [pieces])[0]
    assert status == 413 and "more than 4194304 bytes" in body["error"]


def test_nobody_reads_a_body_without_end(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IGNORED_BYTES", 8 * 2**20)
    # The ninth piece is over the limit; behind it the client is silent, and waiting for it would be a 408.
    status, _, _ = call(server, [[*[b" " * 2**20] * 9, 30.0, b" "]])[0]
    assert status == 413


def test_a_slow_body_is_refused(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.05)
    status, _, body = call(server, [[b'{"texts": ', 30.0, b'["a"]}']])[0]
    assert status == 408 and "more than 0.05 seconds" in body["error"]


def test_a_client_that_leaves_within_the_body_is_no_error(server: Any) -> None:
    left, other = call(server, [[b'{"texts": ', None], [b'{"texts": ["a"]}']])
    assert left[0] == 499 and other[0] == 200


def test_connections_are_limited(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["server.py", "--max-connections", "7"])
    given: dict[str, Any] = {}
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **settings: given.update(settings))
    server.main()
    assert given["limit_concurrency"] == 7
