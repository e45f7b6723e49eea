"""The kernel tests, as they are, on the device: one row a file, with the counts and the first failure's text."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT
from benchmarks.gpu_judge import not_available
from benchmarks.store import Row

PROCESSES = 4  # of one file, beside those of the other files
FOLDER = ROOT / "tests" / "kernels"
# Compiles for devices that are not here, which is what `make kernels` does.
NOT_HERE = ("ahead_of_time", "configurations", "machine_code", "bundle")


def rows(device: torch.device, deadline: float) -> list[Row]:
    """One row a file. None on a CPU, where these tests interpret the kernels, as the test suite does."""
    if device.type == "cpu":
        return []
    files = [path for path in sorted(FOLDER.glob("test_*.py")) if not any(word in path.name for word in NOT_HERE)]
    return [Row(f"pytest {path.name}", partial(run_file, path, deadline)) for path in files]


def run_file(path: Path, deadline: float) -> dict[str, Any]:
    """Run one file of tests in a process of its own, so that nothing it does to torch lasts."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return not_available(f"there is no {' and no '.join(missing)} here")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--maxfail=5", "-p", "no:cacheprovider", str(path)]
        command += [f"--junitxml={report}"]
        if importlib.util.find_spec("xdist") is not None:  # compiling is what takes the time
            command += ["-n", str(PROCESSES), "--dist", "worksteal"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(deadline - time.time(), 20.0),
            )
        except subprocess.TimeoutExpired:
            return {"passed": False, "why": "the tests did not end in the time of this part"}
        if not report.exists():
            return {"passed": False, "why": (done.stdout + done.stderr).strip()[-500:]}
        return read_report(report)


def read_report(report: Path) -> dict[str, Any]:
    """Counts, and the first failure, from pytest's JUnit XML."""
    suite = xml.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    found: dict[str, Any] = {"passed": not failed and counts["tests"] > 0, "counts": counts}
    if not counts["tests"]:
        found["why"] = "no test was run"
    for case in suite.iter("testcase"):
        problem = next((part for part in case if part.tag in ("failure", "error")), None)
        if problem is not None:
            message = (problem.get("message") or problem.text or "").strip().splitlines()
            name = case.get("name")
            found["why"] = f"{failed} of {counts['tests']} failed, first {name}: {' '.join(message)[:500]}"
            found["first_failure"] = (problem.text or "")[-4000:]
            break
    return found
