"""What all benchmarks share: where they run, what is right, and results that survive an interruption."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import pkgutil
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastencoder import kernels
from fastencoder.demo.measure import FP32_BOUND, LOW_PRECISION_FACTOR
from fastencoder.kernels._dispatch import Dispatcher

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float64; infinite where it is not a number.

    Raises:
        ValueError: the shapes differ.
    """
    if value.shape != reference.shape:
        raise ValueError(f"shape {tuple(value.shape)} instead of {tuple(reference.shape)}")
    if not reference.numel():
        return 0.0
    exact = reference.double()
    error = float((value.to(exact) - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def error_bar(dtype: str, stock_error: float) -> float:
    """The largest relative error that passes, both against the same reference: see `fastencoder.demo.measure`."""
    return FP32_BOUND if dtype == "fp32" else LOW_PRECISION_FACTOR * stock_error


def dispatchers() -> Iterator[Dispatcher]:
    """The dispatchers of all kernels."""
    for name in (found.name for found in pkgutil.iter_modules(kernels.__path__) if found.ispkg):
        module = sys.modules.get(f"fastencoder.kernels.{name}")
        if module is not None:
            yield from (value for value in vars(module).values() if isinstance(value, Dispatcher))


def fallbacks() -> list[str]:
    """The operations whose Triton kernel was given up in this process; empties the list.

    The warning comes once a process, so that a later benchmark would not see it: the dispatcher itself is asked.
    """
    fallen = [dispatcher for dispatcher in dispatchers() if dispatcher._triton_failed]
    for dispatcher in fallen:
        dispatcher._triton_failed = False
    return [dispatcher.name for dispatcher in fallen]


def complaints(caught: list[warnings.WarningMessage]) -> list[str]:
    """What fastencoder itself warned of: a kernel that fell back, gradients that keep the original layers running."""
    messages = [str(warning.message) for warning in caught]
    return [message for message in messages if message.startswith("fastencoder:")]


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know about the machine and the code."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": len(_git("status", "--porcelain").splitlines()) if _git("rev-parse", "HEAD") else None,
        "source_digest": source_digest(),
    }
    for package in ("transformers", "triton", "numpy", "flash_attn", "pytest"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    else:
        found |= {"threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
        found["cpu_flags"] = cpu_flags()
    return found


def cpu_flags() -> dict[str, bool]:
    """The instruction sets on which the speed of low precisions depends; empty where the system does not tell."""
    words = set(_cpuinfo("flags").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
    return {flag: flag in words for flag in wanted} if words else {}


def source_digest() -> str:
    """Names the code that ran, also where there is no git: a hash over the package's and the benchmarks' sources.

    What only writes reports does not count: a better table is no reason to measure anew.
    """
    digest = hashlib.sha256()
    for folder in ("fastencoder", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.stem.startswith("gpu_report"):
                continue
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field), "")


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(ROOT), *arguments)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
