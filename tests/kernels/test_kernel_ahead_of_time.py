"""The examination without a GPU: it compiles what there is, and sees what is wrong. `make kernels` runs it on everything.

The kernels of this process may be interpreted, so other processes compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# Launches that are made worse by hand: each with what is said about it.
WORSE = """
import dataclasses, json
from fastencoder.kernels.machine_code import compile_launch, limits_of
from fastencoder.runtime import inspect_kernels
from fastencoder.runtime.accepted import Accepted
from fastencoder.runtime.inspect_kernels import Finding, configurations

hopper = limits_of((9, 0))
attention = dict(configurations("varlen_attention", hopper))["varlen_attention-bf16-d64-s512"]
good = compile_launch("good", attention, hopper)
two_warps = dataclasses.replace(attention, num_warps=2)
stages = dataclasses.replace(attention, num_stages=16)
said = {
    "good": good.problems,
    "spills": compile_launch("spills", two_warps, hopper).problems,
    "shared": compile_launch("shared", stages, hopper).problems,
    "no matrix units": dataclasses.replace(good, matrix_instructions={}).problems,
    "no warp groups": dataclasses.replace(good, matrix_instructions={"mma": 8}).problems,
    "older": dataclasses.replace(good, capability="8.0", matrix_instructions={"mma": 8}).problems,
}
finding = Finding("varlen_attention", "varlen_attention-x", "9.0", "3.9.0", ("spills registers (1 stores, 2 loads)", "else"))
known = Accepted("*attention-?", "9.*", "3.*", "spills*", "on purpose")
inspect_kernels.ACCEPTED = (known, dataclasses.replace(known, problem="gone"))
judged = inspect_kernels._judged(finding)
said["left"], said["accepted"], said["unused"] = judged.problems, judged.accepted, inspect_kernels.unused([judged])
broken = list(inspect_kernels.compile_tasks([(dataclasses.replace(attention, num_warps=3), hopper)], None))
said["broken"] = inspect_kernels._finding("linear", "x", "9.0", broken[0][1]).problems
print(json.dumps(said))
"""

# Which configurations there are, by capability and operation, and whether Triton's cache would keep two of one name apart.
NAMES = """
import json
from fastencoder.kernels import stand_in
from fastencoder.runtime.inspect_kernels import CAPABILITIES, configurations, limits_of, operations
found = {}
for capability in CAPABILITIES:
    limits = limits_of(tuple(map(int, capability.split("."))))
    with stand_in.standing_in(limits.capability):
        found[capability] = {
            operation: [(name, stand_in.cache_key(launch)) for name, launch in configurations(operation, limits)]
            for operation in operations()
        }
print(json.dumps(found))
"""


def process(*arguments: str, cache: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)


def test_every_operation_names_its_configurations(tmp_path: Path) -> None:
    done = process("-c", NAMES, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    keys = set()
    for operations in found.values():
        assert {"add_norm", "linear", "pack", "varlen_attention"} <= set(operations)
        for configurations in operations.values():
            names = [name for name, _ in configurations]
            assert len(set(names)) == len(names) > 0
            own = {key for _, key in configurations}
            assert not own & keys  # another capability is another kernel
            keys |= own
    assert list(tmp_path.iterdir()) == []  # asking for a key compiles nothing


def test_one_table_and_every_finding(tmp_path: Path) -> None:
    file = tmp_path / "findings.json"
    arguments = ("-m", "fastencoder.runtime.inspect_kernels", "8.0", "9.0", "--operation=pack", "--only=fp16", f"--json={file}")
    done = process(*arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    findings = json.loads(file.read_text())
    assert {finding["capability"] for finding in findings} == {"8.0", "9.0"}
    for finding in findings:
        assert finding["operation"] == "pack" and finding["problems"] == [] and 0 < finding["registers"] <= 255
    assert f"{len(findings)} kernels" in done.stdout


def test_nothing_to_examine_is_a_failure(tmp_path: Path) -> None:
    arguments = ("-m", "fastencoder.runtime.inspect_kernels", "8.0", "--operation=pack", "--only=nothing-has-this-name")
    assert process(*arguments, cache=tmp_path).returncode == 1


def test_what_is_wrong_is_seen(tmp_path: Path) -> None:
    done = process("-c", WORSE, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["good"] == [] and said["older"] == []
    assert any("spills registers" in problem for problem in said["spills"])
    assert any("bytes of shared memory, 232448 exist" in problem for problem in said["shared"])
    assert said["no matrix units"] == ["uses no matrix instruction"]
    assert said["no warp groups"] == ["has tiles of 64 rows and uses no wgmma"]
    assert said["left"] == ["else"] and said["accepted"] == ["spills registers (1 stores, 2 loads): on purpose"]
    assert said["unused"] == ["*attention-?"]
    assert said["broken"] and said["broken"][0].startswith("does not compile: ")
