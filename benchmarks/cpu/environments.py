"""The environments of the peers, made by `make bench-setup` in `.bench/`: their packages must not meet the project's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.cpu.systems import ENGINES, MAIN, OPTIMUM, NotAvailable, Source, exported

CACHE = ROOT / ".bench"
# torch comes first and by its version: asked for as a dependency it brings gigabytes of CUDA libraries.
TORCH = "torch==2.13.0"
PACKAGES = {
    ENGINES: (
        "transformers>=5.17,<6",
        "onnxruntime>=1.22",
        "onnx",
        "onnxscript",
        "openvino>=2025.3",
        "ctranslate2>=4.6",
    ),
    # optimum's exporters want an older transformers than the other engines run with.
    OPTIMUM: ("sentence-transformers>=5", "optimum-onnx[onnxruntime]", "optimum-intel[openvino]"),
}


def python(environment: str) -> Path:
    """The interpreter of an environment; the running one for the project's own."""
    return Path(sys.executable) if environment == MAIN else CACHE / environment / "bin" / "python"


def missing(environment: str) -> str:
    """Empty if the environment is ready, else what to do."""
    return (
        "" if environment == MAIN or _stamp(environment).exists() else f"no environment {environment}: make bench-setup"
    )


def make(environment: str) -> None:
    """Make the environment anew, unless it is there with these packages.

    Raises:
        subprocess.CalledProcessError: venv or pip failed.
    """
    wanted = "\n".join((TORCH, *PACKAGES[environment]))
    stamp = _stamp(environment)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(CACHE / environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(CACHE / environment)], check=True)
    for packages in ((TORCH,), PACKAGES[environment]):
        install = [str(python(environment)), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages]
        subprocess.run(install, check=True)
    stamp.write_text(wanted, encoding="utf-8")


def export(source: Source) -> Iterator[str]:
    """Write a model in every form that the engines read. Yields what cannot be written and why."""
    for form in exported.FILES:
        try:
            exported.get(source, form, str(python(ENGINES)))
        except NotAvailable as reason:
            yield f"{source.name}: {reason}"


def forget_failures() -> None:
    """Let exports that failed be tried again: another version may know more."""
    for note in CACHE.glob("exported/**/*.failed.json"):
        note.unlink()


def _stamp(environment: str) -> Path:
    return CACHE / environment / "installed.txt"
