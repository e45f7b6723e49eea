"""The same embedding server on LitServe, which has the dynamic batching itself and runs the model in a process of its own.

    pip install 'fastencoder[examples]'
    python examples/server_litserve.py --port 8000              # or --stock, to compare under load
    curl -d '{"texts": ["How do I catch an error?"]}' http://127.0.0.1:8000/embed

LitServe counts a batch in requests, not in texts or tokens. A request that fails inside of a batch fails the whole batch, so
everything about a request is checked before it is queued.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from typing import Any

import litserve as ls
import torch
from embedder import DTYPES, Embedder, TextTokenizer, default_folder
from limits import Limits, Refused, check_texts, check_tokens, parse


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local folder with model and tokenizer (default: all-MiniLM-L6-v2)")
    parser.add_argument("--stock", action="store_true", help="leave the model as it is, to compare")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: as many as it chooses")
    parser.add_argument("--host", default="127.0.0.1", choices=("127.0.0.1", "0.0.0.0", "::"))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=16, help="requests of a batch")
    parser.add_argument("--max-wait-ms", type=float, default=5, help="how long a request waits for company")
    parser.add_argument("--max-requests", type=int, default=256, help="requests in work; more are told to come again")
    parser.add_argument("--drain-seconds", type=int, default=30, help="how long answers may take after SIGTERM")
    return parser.parse_args()


class EmbedAPI(ls.LitAPI):
    """Runs in the model's process; each request is a list of token ids for each of its texts."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        super().__init__(max_batch_size=options.max_batch, batch_timeout=options.max_wait_ms / 1000, api_path="/embed")
        self.options, self.folder = options, folder

    def setup(self, device: str) -> None:
        # Ctrl+C reaches all processes, and the main one tells this one when to stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        self.embedder = Embedder(self.folder, self.options.stock, self.options.dtype)

    def decode_request(self, request):  # an annotation would be a schema to LitServe
        return request["rows"]

    def batch(self, inputs: list[list[list[int]]]) -> list[list[list[int]]]:
        return inputs

    def predict(self, requests: list[list[list[int]]]) -> list[list[list[float]]]:
        if self.max_batch_size == 1:
            return self.embedder.embed(requests)
        vectors = iter(self.embedder.embed([row for request in requests for row in request]))
        return [[next(vectors) for _ in request] for request in requests]

    def unbatch(self, output: list[list[list[float]]]) -> list[list[list[float]]]:
        return output

    def encode_response(self, output: list[list[float]]) -> dict[str, Any]:
        return {"embeddings": output}


class Gate:
    """Looks at each request before LitServe does: bounds how many are in work, checks the texts, and tokenizes them."""

    def __init__(self, app: Any, tokenizer: TextTokenizer, limits: Limits, max_requests: int) -> None:
        self.app, self.tokenizer, self.limits, self.max_requests = app, tokenizer, limits, max_requests
        self.in_work = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/embed":
            await self.app(scope, receive, send)
        elif self.in_work >= self.max_requests:
            await _say(send, 503, "too many requests are waiting", (b"retry-after", b"1"))
        else:
            self.in_work += 1
            try:
                await self._pass_on(scope, receive, send)
            finally:
                self.in_work -= 1

    async def _pass_on(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        try:
            texts = check_texts(parse(await self._body(receive)), self.limits)
            rows = self.tokenizer.ids(texts)
            check_tokens(rows, self.limits)
        except Refused as error:
            await _say(send, error.status, error.message)
            return
        body = json.dumps({"rows": rows}).encode()
        headers = [
            (name, value) for name, value in scope["headers"] if name not in (b"content-length", b"content-type")
        ]
        headers += [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_rows() -> dict[str, Any]:
            return next(messages, None) or await receive()

        await self.app({**scope, "headers": headers}, receive_rows, send)

    async def _body(self, receive: Any) -> bytes:
        body = bytearray()
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if len(body) > self.limits.body_bytes:
                raise Refused(413, f"the body has more than {self.limits.body_bytes} bytes")
            if not message.get("more_body"):
                return bytes(body)
        raise Refused(400, "the client left")


async def _say(send: Any, status: int, message: str, *headers: tuple[bytes, bytes]) -> None:
    body = json.dumps({"error": message}).encode()
    start = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", b"application/json"), *headers],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})


class DrainingServer(ls.LitServer):
    """LitServe closes the way back from the model first, and requests in work would wait for nothing. Here the web server is
    told first, and ends when it has answered them."""

    def _perform_graceful_shutdown(
        self, manager: Any, uvicorn_workers: dict[int, Any], *more: Any, **named: Any
    ) -> None:
        for worker in uvicorn_workers.values():
            worker.terminate()  # uvicorn takes this as: no new connections, answer the others
        for worker in uvicorn_workers.values():
            worker.join(self.uvicorn_graceful_timeout)
        super()._perform_graceful_shutdown(manager, uvicorn_workers, *more, **named)


def main() -> None:
    options = settings()
    folder = options.model or default_folder()
    tokenizer = TextTokenizer(folder)
    limits = Limits(tokens=min(Limits.tokens, tokenizer.max_tokens))
    gate = (Gate, {"tokenizer": tokenizer, "limits": limits, "max_requests": options.max_requests})
    server = DrainingServer(EmbedAPI(options, folder), accelerator="cpu", devices=1, middlewares=[gate], timeout=False)
    server.uvicorn_graceful_timeout = options.drain_seconds

    main_process = os.getpid()

    def stop(*_: Any) -> None:  # the web server's process has this handler too
        raise KeyboardInterrupt if os.getpid() == main_process else SystemExit(0)

    signal.signal(signal.SIGTERM, stop)  # LitServe shuts down in order on Ctrl+C alone
    server.run(host=options.host, port=options.port, generate_client_file=False, num_api_servers=1)


if __name__ == "__main__":
    main()
