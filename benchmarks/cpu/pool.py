"""The worker processes of one model in one dtype: started, asked, ended. Only pipes connect them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.cpu import environments
from benchmarks.cpu.systems import EVERY, FAST, STOCK_EAGER, STOCK_SDPA, Source

Reply = dict[str, Any]
PATIENCE = 600.0  # seconds; compiling takes its time
AT_ONCE = 2  # workers that load or warm up, which is not timed
SPARE_MEMORY = 2**32  # bytes that stay free; a system that does not fit beside the others says so


class Dead(Exception):
    """The worker's process ended, or did not answer in time."""


class WorkerProcess:
    """One worker; see `benchmarks.cpu.worker` for what it can be asked."""

    def __init__(self, system: str, source: Source, dtype: str, threads: int, log: Path) -> None:
        self.system, self._left = system, b""
        python = str(environments.python(EVERY[system].environment))
        arguments = [system, source.name, source.kind, str(source.folder), str(source.exported), dtype, str(threads)]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = open(log, "ab")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.cpu.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=_environment(threads),
            process_group=0,
        )

    def ask(self, request: Reply, patience: float = PATIENCE) -> Reply:
        """The answer to a request.

        Raises:
            Dead: there is none.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise Dead(self._ending()) from None
        return json.loads(self._line(patience))

    def _line(self, patience: float) -> bytes:
        assert self._process.stdout is not None
        until = time.monotonic() + patience
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._left:
                if not selector.select(max(until - time.monotonic(), 0)):
                    self.stop()
                    raise Dead(f"no answer within {patience:.0f} s")
                read = os.read(self._process.stdout.fileno(), 65536)
                if not read:
                    raise Dead(self._ending())
                self._left += read
        line, _, self._left = self._left.partition(b"\n")
        return line

    def _ending(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"its process ended with status {self._process.wait(5)}; see {Path(self._log.name).name}"
        return "its process does not listen"

    def stop(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                pipe.close()


class Pool:
    """Workers of several systems with one model in one dtype. A context manager: they end with it.

    `status` says of every system what came of it; those in `running` can be asked.
    """

    def __init__(
        self, systems: Iterable[str], source: Source, dtype: str, threads: int, say: Callable[[str], None]
    ) -> None:
        self.source, self.dtype, self._threads, self._say = source, dtype, threads, say
        self.running: dict[str, WorkerProcess] = {}
        self.status: dict[str, Reply] = {system: {} for system in systems}
        self.versions: dict[str, dict[str, str]] = {}

    def __enter__(self) -> Pool:
        try:
            # Ours and stock first: where memory ends, it is a peer that has no place, and says so.
            first = (FAST, STOCK_SDPA, STOCK_EAGER)
            self._each(sorted(self.status, key=lambda system: system not in first), self._start)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker."""
        for worker in list(self.running.values()):
            worker.stop()
        self.running.clear()

    def warm(self, name: str, file: Path, real_lengths: list[int], answers: Path) -> dict[str, Reply]:
        """Give every running worker a batch. System -> what it said; answers lie in `answers`/system.npy."""
        said: dict[str, Reply] = {}

        def give(system: str) -> None:
            self._say(f"{system}: warming up on {name}")
            request = {"do": "batch", "name": name, "file": str(file), "real_lengths": real_lengths}
            said[system] = self.ask(system, request | {"answer": str(answers / f"{system}.npy")})

        self._each(list(self.running), give)
        return said

    def ask(self, system: str, request: Reply) -> Reply:
        """The answer, or what became of the worker: {"failed": why}."""
        try:
            return self.running[system].ask(dict(request))
        except Dead as death:
            self.running.pop(system).stop()
            self.status[system] = {"failed": str(death)}
            return self.status[system]

    def _start(self, system: str) -> None:
        why = self._not_here(system)
        if why:
            self.status[system] = {"not_available": why}
            return
        self._say(f"{system}: loading")
        log = environments.CACHE / "logs" / f"{self.source.name} {self.dtype} {system}.log"
        worker = self.running[system] = WorkerProcess(system, self.source, self.dtype, self._threads, log)
        reply = self.ask(system, {"do": "prepare"})
        if "not_available" in reply or "failed" in reply:
            worker.stop()
            self.running.pop(system, None)
        else:
            self.versions[EVERY[system].environment] = reply["versions"]
        self.status[system] = reply

    def _not_here(self, system: str) -> str:
        chosen = EVERY[system]
        why = chosen.without.get(self.dtype) or environments.missing(chosen.environment)
        if not why and chosen.models and self.source.name not in chosen.models:
            why = f"only run with {', '.join(chosen.models)}"
        if not why and _available_memory() < SPARE_MEMORY + _size(self.source.folder):
            why = "not enough memory for it beside the other systems"
        return why

    @staticmethod
    def _each(systems: list[str], call: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for done in [threads.submit(call, system) for system in systems]:
                done.result()


def _environment(threads: int) -> dict[str, str]:
    """The same number of threads for every library; no hub; compiled code kept from run to run."""
    count = str(threads)
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(environments.CACHE / "inductor"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
