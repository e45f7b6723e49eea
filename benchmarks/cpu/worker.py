"""One system with one model in a process of its own: `python -m benchmarks.cpu.worker`, started by `pool`.

It reads requests, one JSON object a line, and answers each with one line. Between requests it sleeps in `read`: no thread of
its engine may still be spinning when another system is timed, so an answer is given only when the process is at rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu.systems import EVERY, Engine, NotAvailable, Source

_REST_WATCHED, _REST_CPU, _REST_LIMIT = 0.01, 0.002, 3.0  # seconds
_PACKAGES = (
    "torch",
    "transformers",
    "onnxruntime",
    "openvino",
    "ctranslate2",
    "sentence-transformers",
    "optimum",
    "optimum-onnx",
    "optimum-intel",
)


class Worker:
    """What the requests ask for."""

    def __init__(self, system: str, source: Source, dtype: str, threads: int) -> None:
        self.system, self.source, self.dtype, self.threads = EVERY[system], source, dtype, threads
        self._engine: Engine | None = None
        self._calls: dict[str, Any] = {}
        self._base = 0

    def prepare(self) -> dict[str, Any]:
        """Load the model."""
        module = importlib.import_module(f"benchmarks.cpu.systems.{self.system.module}")
        self._base = resident()["VmRSS"]
        self._engine = module.prepare(self.source, self.dtype, self.threads, **self.system.options)
        return {"notes": self._engine.notes, "versions": versions(), "beside": list(self._engine.beside)}

    def batch(self, name: str, file: str, real_lengths: list[int], answer: str) -> dict[str, Any]:
        """Take a batch, write the answer; a second call shows the memory, and both warm up."""
        engine = self._engine
        assert engine is not None
        with np.load(file) as stored:
            arrays = {key: stored[key] for key in stored.files}
        self._calls.clear()  # what the batch before held is no memory of this one
        began = time.perf_counter()
        with no_gradients():
            inputs = engine.inputs(arrays)
            self._calls[name] = lambda: engine.run(inputs)
            np.save(answer, engine.answer(engine.run(inputs)))
            warm_seconds = time.perf_counter() - began
            forget_peak()
            engine.run(inputs)
            peak = resident()["VmHWM"]
            for made in engine.beside:
                self._calls[f"{made} {name}"] = engine.beside[made](real_lengths)
        return {"warm_seconds": warm_seconds, "peak_bytes": peak, "base_bytes": self._base}

    def run(self, name: str, visit: float) -> dict[str, Any]:
        """Call until `visit` seconds are over, once at least. The first of several calls finds cold caches and is left out."""
        call, times = self._calls[name], list[float]()
        with no_gradients():
            while sum(times) < visit:
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
        return {"seconds": statistics.median(times[1:] or times)}


def no_gradients() -> contextlib.AbstractContextManager[object]:
    """torch's inference mode, where there is torch."""
    torch = sys.modules.get("torch")
    return torch.inference_mode() if torch else contextlib.nullcontext()


def rest() -> float:
    """Wait until no thread of this process is busy (OpenMP and other pools spin for a while). Returns the seconds waited."""
    began = time.perf_counter()
    while time.perf_counter() - began < _REST_LIMIT:
        before = time.process_time()
        time.sleep(_REST_WATCHED)
        if time.process_time() - before < _REST_CPU:
            break
    return time.perf_counter() - began


def resident() -> dict[str, int]:
    """Resident memory now (VmRSS) and at its peak (VmHWM), bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def forget_peak() -> None:
    """Give back what the allocator keeps from before, and begin a new peak here, where the system lets a process do so."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of the packages that matter, as far as they are installed here."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def short(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def main(system: str, name: str, kind: str, folder: str, exported: str, dtype: str, threads: str) -> int:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(system, Source(name, kind, Path(folder), Path(exported)), dtype, int(threads))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("do"))(**request)
        except NotAvailable as error:
            reply = {"not_available": str(error)}
        except Exception as error:
            traceback.print_exc()
            reply = {"failed": short(error)}
        reply["rest_seconds"] = rest()
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
