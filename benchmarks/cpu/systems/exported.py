"""Where other forms of a model are kept. Needs no torch: what makes them runs in a process of its own, so that the worker
that is measured holds its engine and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.cpu.systems import NotAvailable, Source

_ROOT = Path(__file__).resolve().parents[3]
FILES = {
    "onnx": "onnx/model.onnx",
    "onnx-optimised": "onnx-optimised/model.onnx",
    "openvino": "openvino/model.xml",
    "ctranslate2": "ctranslate2/model.bin",
}


def get(source: Source, form: str, python: str = sys.executable) -> Path:
    """The model's file in this form, made by this interpreter if it is not there. A failure is remembered until the next
    setup.

    Raises:
        NotAvailable: it cannot be made; with the exporter's own words.
    """
    source.exported.mkdir(parents=True, exist_ok=True)
    with open(source.exported / f"{form}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers may want it at once
        return _get(source, form, python)


def _get(source: Source, form: str, python: str) -> Path:
    target = source.exported / FILES[form]
    failed = target.with_suffix(".failed.json")
    if target.exists():
        return target
    if not failed.exists():
        arguments = [source.name, source.kind, str(source.folder), str(source.exported), form]
        made = subprocess.run(
            [python, "-m", "benchmarks.cpu.systems.export", *arguments], stdout=sys.stderr, cwd=_ROOT, check=False
        )
        if made.returncode == 0 and target.exists():
            return target
        if not failed.exists():
            raise NotAvailable(f"the export to {form} ended with status {made.returncode}")
    raise NotAvailable(json.loads(failed.read_text(encoding="utf-8"))["why"])
