"""What a figure has to say about where it was measured: versions and machine."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

from ..kernels import native

_PACKAGES = ("torch", "transformers", "triton")


def versions() -> dict[str, str]:
    """Of Python, of this package and of what it computes with; a package that is not installed is left out."""
    import fastencoder

    found = {"fastencoder": fastencoder.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> str:
    """The device in a few words; of a CPU also its threads, and the instructions of the C++ extension."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    extension = f"C++ extension: {native.ISAS[native.best]}"
    counted = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{_processor()}, {counted}, {torch.backends.cpu.get_cpu_capability()}, {extension}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
