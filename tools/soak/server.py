"""A server in a process of its own, on a free port of 127.0.0.1: started, watched, told to end, killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "server.py"
READY_SECONDS = 240
# What a server prints when it went wrong, whatever it answered.
COMPLAINTS = ("Traceback", "Exception in ASGI", "Task exception was never retrieved")


class Server:
    """One server. It takes the port that it had when it is started again.

    Args:
        name: how it is called in reports; its output goes to `logs/name.log`.
        command: the program and its options, without --port.
        threads: of torch and OpenMP; 0 is as many as they choose.
    """

    def __init__(self, name: str, command: Sequence[str], logs: Path, threads: int = 0) -> None:
        self.name, self.log, self.threads = name, logs / f"{name.replace(' ', '-')}.log", threads
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.command = [sys.executable, *command, "--port", str(self.port)]
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Does not wait until it is ready, so that several can start at the same time."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> None:
        """Raises RuntimeError if the process ends, or takes longer than READY_SECONDS."""
        end = time.monotonic() + READY_SECONDS
        while not self.is_healthy():
            if self.running.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name} does not answer: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, f"{self.name} was not started"
        return self.process

    def is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def resident(self) -> int:
        """Bytes of memory that the process holds now."""
        return int(psutil.Process(self.running.pid).memory_info().rss)

    def terminate(self) -> None:
        """SIGTERM: it is to answer what it has, and end."""
        self.running.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: it ends at once. Also what cleans up; a process that has ended is left alone."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()

    def complaints(self) -> list[str]:
        """The lines of its output that tell of an error inside."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return [line for line in lines if any(complaint in line for complaint in COMPLAINTS)]


def example(name: str, logs: Path, threads: int, stock: bool = False, dtype: str = "fp32", *more: str) -> Server:
    """examples/server.py, with fastencoder or (`stock`) without."""
    options = ["--dtype", dtype, "--threads", str(threads), *(["--stock"] if stock else []), *more]
    return Server(name, [str(EXAMPLE), *options], logs, threads)
