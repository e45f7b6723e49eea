"""The GPU examination as a program, on the CPU: a dry run of everything, and runs that are cut short."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import gpu, gpu_kernels, gpu_processes
from benchmarks.common import dispatchers
from benchmarks.gpu_systems import COMPILED, EAGER, FAST, NESTED, REDUCE, STOCK
from benchmarks.store import Store

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part_and_writes_a_report(tmp_path):
    done = program("--device", "cpu", "--quick", "--out", str(tmp_path), "--minutes", "60")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "gpu.log").read_text()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["gpu.json", "gpu.jsonl", "gpu.log", "gpu.md", "gpu_speedup.png", "gpu_tokens.png"]
    assert len(names) <= 8 and all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert {"device", "torch", "transformers", "triton", "date", "git_commit", "source_digest"} <= set(data["environment"])
    parts = data["parts"]
    assert list(parts) == list(gpu.PARTS) and all(part["finished"] for part in parts.values())
    assert {name.split()[0] for name in parts["kernels"]["rows"]} == set(gpu_kernels.MAKERS)
    for part in ("kernels", "parity"):
        assert not [name for name, found in parts[part]["rows"].items() if "not_available" in found]
    assert len(parts["parity"]["rows"]) == 10 * 4 + 2
    cell = next(found for name, found in parts["speed"]["rows"].items() if name.startswith("bert-base"))
    for system in (STOCK, EAGER, NESTED, FAST):
        assert cell["systems"][system]["status"] == "timed", system
    assert cell["systems"][FAST]["of_vendor_gemm"] > 0 and cell["systems"][STOCK]["ours_is_faster"]["median"] > 0
    modes = {system for found in parts["compile"]["rows"].values() for system in found["systems"]}
    assert {COMPILED, REDUCE} <= modes
    report = (tmp_path / "gpu.md").read_text()
    assert "Everything passed." in report and report.count("| not measured |") == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_cuda_device_one_line_says_so(tmp_path):
    done = program("--part", "kernels", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1 and "CUDA" in done.stderr
    assert list(tmp_path.iterdir()) == []


WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks.store import Row, Store, run_rows
folder = Path({folder!r})
def run(name):
    with open(folder / "ran", "a") as ran:
        ran.write(name)
    {act}
    return {{"passed": True}}
(folder / "pid").write_text(str(os.getpid()))
store = Store(folder / "gpu.jsonl")
store.append({{"part": "rates", "expected": list("abc")}})
run_rows(store, "rates", [Row(name, lambda name=name: run(name)) for name in "abc"], lambda: False)
"""


@pytest.fixture
def part_of_three(tmp_path, monkeypatch):
    """Runs a part of three rows in a process; `act` is what a row does."""

    def run_part(act: str, minutes: float = 2.0) -> str:
        script = tmp_path / "worker.py"
        script.write_text(WORKER.format(root=str(ROOT), folder=str(tmp_path), act=act))
        monkeypatch.setattr(gpu_processes, "_command", lambda *_: [sys.executable, str(script)])
        shown = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
        deadline = time.time() + 60 * minutes
        gpu_processes.run_part(gpu.parse(["--quick"]), "rates", tmp_path, deadline, shown)
        return shown.export_text()

    Store.begin(tmp_path / "gpu.jsonl", {}, quick=True)
    return run_part


def test_a_process_that_dies_is_followed_by_another(tmp_path, part_of_three):
    shown = part_of_three("if name == 'b': os._exit(9)")
    part = Store(tmp_path / "gpu.jsonl").part("rates")
    assert part["finished"] and part["rows"]["a"]["passed"] and part["rows"]["c"]["passed"]
    assert part["rows"]["b"]["why"] == "the process died in this row" and part["rows"]["b"]["deaths"] == 2
    assert "FAILED rates b" in shown and (tmp_path / "ran").read_text() == "abcb"


def test_a_row_that_hangs_is_stopped_and_the_next_run_goes_on(tmp_path, part_of_three, monkeypatch):
    monkeypatch.setattr(gpu_processes, "GRACE", 0.0)
    assert "did not end" in part_of_three("if name == 'b': time.sleep(600)", minutes=0.1)
    assert not Store(tmp_path / "gpu.jsonl").part("rates")["finished"]
    assert (tmp_path / "ran").read_text() in ("a", "ab")
    part_of_three("pass")
    part = Store(tmp_path / "gpu.jsonl").part("rates")
    assert part["finished"] and all(found["passed"] for found in part["rows"].values())
    assert (tmp_path / "ran").read_text() == "abcb"  # a row that ended a process comes last


def test_a_run_that_is_killed_leaves_what_it_found(tmp_path):
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from rich.console import Console
from benchmarks import gpu, gpu_processes
script = Path({str(tmp_path)!r}) / "worker.py"
gpu_processes._command = lambda *_: [sys.executable, str(script)]
gpu_processes.run_part(gpu.parse(["--quick"]), "rates", script.parent, time.time() + 600, Console(quiet=True))
"""
    act = "if name == 'b': time.sleep(600 if not (folder / 'again').exists() else 0)"
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT), folder=str(tmp_path), act=act))
    journal = tmp_path / "gpu.jsonl"
    Store.begin(journal, {}, quick=True)
    running, began = subprocess.Popen([sys.executable, "-c", program]), time.monotonic()
    while not (tmp_path / "ran").exists() or (tmp_path / "ran").read_text() != "ab":
        assert running.poll() is None and time.monotonic() - began < 100
        time.sleep(0.02)
    running.kill()
    running.wait()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # the machine would end it, too
    rows = Store(journal).part("rates")["rows"]
    assert rows["a"]["passed"] and rows["b"]["running"]
    (tmp_path / "again").touch()
    subprocess.run([sys.executable, "-c", program], timeout=100, check=True)
    assert Store(journal).part("rates")["finished"] and (tmp_path / "ran").read_text() == "abcb"


def test_every_operation_has_rows():
    gpu_kernels.rows(CPU, quick=True, deadline=0.0)  # imports all of them
    assert {dispatcher.name for dispatcher in dispatchers()} <= set(gpu_kernels.MAKERS), "an operation was added"
