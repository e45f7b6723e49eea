"""An embedding server with dynamic batching, on FastAPI, made fast with one line (in embedder.py).

    pip install 'fastencoder[examples]'
    python examples/server.py --port 8000                      # or --stock, to compare under load
    curl -d '{"texts": ["How do I catch an error?"]}' http://127.0.0.1:8000/embed

POST /embed takes {"texts": [...]} and gives {"embeddings": [[...], ...]}. GET /health says whether it takes requests. On
SIGTERM it takes no new connections, answers what it has, and ends.

Every option can also be set in the environment: --max-wait-ms as EMBED_MAX_WAIT_MS.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import torch
import uvicorn
from batching import Batcher, QueueFull, Rate
from embedder import DTYPES, Embedder, TextTokenizer, default_folder
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from limits import Limits, Refused, check_texts, check_tokens, parse
from starlette.requests import ClientDisconnect

BODY_SECONDS = 10  # to send a body in
IGNORED_BYTES = 64 * 2**20  # of a body that is too large, before the connection is closed


def settings() -> argparse.Namespace:
    """From the command line, else from the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, default: Any, help: str, **more: Any) -> None:
        default = os.environ.get(f"EMBED_{name[2:].upper().replace('-', '_')}", default)
        parser.add_argument(name, default=default, help=f"{help} (default: {default})", **more)

    option("--model", None, "a local folder with model and tokenizer; all-MiniLM-L6-v2 if there is none")
    option("--dtype", "fp32", "of the weights", choices=DTYPES)
    option("--threads", 0, "torch's threads; 0: as many as it chooses", type=int)
    option("--host", "127.0.0.1", "address to listen on; 0.0.0.0 takes requests from other machines")
    option("--port", 8000, "port to listen on", type=int)
    option("--max-batch-texts", 64, "texts of a batch", type=int)
    option("--max-batch-tokens", 8192, "tokens of a batch", type=int)
    option("--max-wait-ms", 5, "how long a text waits for company", type=float)
    option("--max-queued", 1024, "texts that may wait; more are told to come again", type=int)
    option("--max-connections", 512, "connections at a time; more are answered with 503", type=int)
    option("--max-texts", Limits.texts, "texts of a request", type=int)
    option("--max-characters", Limits.characters, "characters of a text", type=int)
    option("--max-tokens", Limits.tokens, "tokens of a text, as far as the model can read", type=int)
    option("--rate", 0, "texts a second that one address may send; 0: no limit", type=float)
    option("--drain-seconds", 30, "how long requests may take to be answered after SIGTERM", type=int)
    stock = os.environ.get("EMBED_STOCK", "") not in ("", "0")
    parser.add_argument("--stock", action="store_true", default=stock, help="leave the model as it is, to compare")
    return parser.parse_args()


def make_app(options: argparse.Namespace) -> FastAPI:
    """The application. The model is loaded when the server starts, before it takes requests."""
    folder = options.model or default_folder()
    tokenizer = TextTokenizer(folder)
    tokens = min(options.max_tokens, tokenizer.max_tokens)
    limits = Limits(texts=options.max_texts, characters=options.max_characters, tokens=tokens)
    rate = Rate(options.rate)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if options.threads:
            torch.set_num_threads(options.threads)
        embedder = Embedder(folder, options.stock, options.dtype)
        embedder.embed(tokenizer.ids(["The first call is the slowest."]))
        app.state.batcher = Batcher(
            embedder.embed,
            options.max_batch_texts,
            options.max_batch_tokens,
            options.max_wait_ms / 1000,
            options.max_queued,
        )
        yield  # uvicorn comes back when every request is answered
        await app.state.batcher.close()

    app = FastAPI(title="embeddings", lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "fast": not options.stock, "queued": len(app.state.batcher.queue)}

    @app.post("/embed")
    async def embed(request: Request) -> Response:
        try:
            body = await read_body(request, limits)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        texts = check_texts(parse(body), limits)
        wait = rate.wait(request.client.host if request.client else "", len(texts))
        if wait:
            return come_again(429, "too many texts from this address", wait)
        rows = await asyncio.to_thread(tokenizer.ids, texts)
        check_tokens(rows, limits)
        try:
            vectors = await unless_gone(request, app.state.batcher.ask(rows))
        except QueueFull:
            return come_again(503, "too many texts are waiting", 1)
        return Response(status_code=499) if vectors is None else JSONResponse({"embeddings": vectors})

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": error.message}, error.status)

    return app


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, as long as it is not too large and does not take too long. Raises Refused.

    What is too large is read to its end and forgotten, within limits: a connection that is closed with bytes unread is reset,
    and its client may lose the answer that says why.
    """
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limits.body_bytes:
                    body += chunk
                elif size > IGNORED_BYTES:
                    break
    except TimeoutError:
        raise Refused(408, f"the body took more than {BODY_SECONDS} seconds") from None
    if size > limits.body_bytes:
        raise Refused(413, f"the body has more than {limits.body_bytes} bytes")
    return bytes(body)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` gives; None if the client leaves before, so that nothing is computed for nobody."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(request.receive())
    await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        working.cancel()
        return None
    leaving.cancel()
    return working.result()


def come_again(status: int, message: str, seconds: float) -> JSONResponse:
    """A refusal that says when to try again."""
    return JSONResponse({"error": message}, status, headers={"Retry-After": str(math.ceil(seconds))})


def main() -> None:
    options = settings()
    uvicorn.run(
        make_app(options),
        host=options.host,
        port=options.port,
        timeout_graceful_shutdown=options.drain_seconds,
        limit_concurrency=options.max_connections,
        access_log=False,
    )


if __name__ == "__main__":
    main()
