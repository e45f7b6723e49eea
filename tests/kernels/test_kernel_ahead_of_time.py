"""The machine code of the Triton kernels, compiled without a GPU: it exists, fits, spills nothing, uses matrix units.

The kernels of this process are interpreted, so another process compiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

CAPABILITIES = ("8.0", "9.0", "10.0")
MATRIX_INSTRUCTIONS = {"8.0": {"HMMA"}, "9.0": {"HMMA", "HGMMA"}, "10.0": {"HMMA", "UTCHMMA"}}

# A kernel that is made to spill, and one that asks for more shared memory than there is.
BAD_LAUNCHES = """
import dataclasses
from fastencoder.kernels import ahead_of_time as aot
limits = aot.limits_of((9, 0))
launches = dict(aot.configurations(limits))
attention = launches["varlen_attention-bf16-d128-s512"]
spilling = dataclasses.replace(attention, num_warps=1)
print(aot.compile_launch("spilling", spilling, limits).problems)
linear = launches["linear-fp16-8192x3072x768-gelu"]
hungry = dataclasses.replace(linear, num_stages=12)
print(aot.compile_launch("hungry", hungry, limits).problems)
plain = dataclasses.replace(aot.compile_launch("plain", linear, limits), matrix_instructions={})
print(plain.problems)
"""


def compiling_process(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert run.stdout, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return json.loads(compiling_process("-m", "fastencoder.kernels.ahead_of_time", *CAPABILITIES, "--json"))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_has_a_problem(compiled, capability):
    kernels = [kernel for kernel in compiled if kernel["capability"] == capability]
    assert {kernel["name"].split("-")[0] for kernel in kernels} == {
        "pack", "unpack", "linear", "varlen_attention", "add_norm"
    }  # fmt: skip
    assert {kernel["name"]: kernel["problems"] for kernel in kernels if kernel["problems"]} == {}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_matrix_instructions(compiled, capability):
    """16 bit and TF32 run on the matrix units, of the newest kind where the tile allows it; exact float32 does not."""
    found = set()
    for kernel in compiled:
        if kernel["capability"] != capability:
            continue
        operation, dtype = kernel["name"].split("-")[:2]
        if operation in ("linear", "varlen_attention") and dtype != "fp32":
            assert kernel["matrix_instructions"], kernel["name"]
            found |= set(kernel["matrix_instructions"])
        else:
            assert not kernel["matrix_instructions"], kernel["name"]
    assert found == MATRIX_INSTRUCTIONS[capability]


def test_two_large_tiles_fit_a_hopper_multiprocessor(compiled):
    """What the largest GEMM tile is chosen for: 64 Ki registers and 227 KiB of shared memory hold two programs."""
    (kernel,) = [k for k in compiled if k["capability"] == "9.0" and k["name"] == "linear-fp16-8192x3072x768-gelu"]
    assert 2 * kernel["registers"] * 32 * kernel["num_warps"] <= 65536
    assert 2 * kernel["shared_bytes"] <= 227 * 1024


def test_problems_are_seen():
    spilling, hungry, plain = compiling_process("-c", BAD_LAUNCHES).splitlines()
    assert "spills registers" in spilling
    assert "bytes of shared memory, 232448 exist" in hungry
    assert plain == "['uses no matrix instruction']"
