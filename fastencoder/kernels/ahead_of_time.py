"""Compile the Triton kernels without a GPU, and read from the machine code what it will cost to run them.

``python -m fastencoder.kernels.ahead_of_time 8.0 9.0 10.0`` compiles every configuration in the table below for those
compute capabilities and prints one line each. The launches come from the launchers' own ``plan`` functions, on tensors
without storage, so that what is compiled here is the specialisation that the launcher would compile on such a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastencoder.kernels._triton import DeviceLimits, Launch
from fastencoder.kernels.add_norm import triton_kernel as add_norm
from fastencoder.kernels.linear import triton_kernel as linear
from fastencoder.kernels.linear.reference import ACTIVATIONS
from fastencoder.kernels.pack import triton_kernel as pack
from fastencoder.kernels.varlen_attention import triton_kernel as varlen_attention

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
_TRITON_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Multiprocessors of the GPUs that these capabilities are best known for: A100, H100, B200.
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}
# Matrix instructions: of warps (8.x and short tiles), of warp groups (9.0), of the fifth generation (10.0).
_MATRIX_INSTRUCTION = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|QGMMA|QMMA)\b")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs of a multiprocessor, and the matrix instructions that it runs."""

    name: str
    capability: str
    registers: int  # of a thread
    spill_stores: int  # instructions
    spill_loads: int  # instructions
    stack_bytes: int  # of a thread
    shared_bytes: int  # of a program
    shared_limit: int
    num_warps: int
    num_stages: int
    matrix_instructions: dict[str, int]
    needs_matrix_instructions: bool  # the kernel has a dot of a type that matrix units take

    @property
    def problems(self) -> list[str]:
        """Why this kernel would not run, or not run well; empty if there is nothing to say."""
        problems = []
        if self.spill_stores or self.spill_loads:
            problems.append(f"spills registers ({self.spill_stores} stores, {self.spill_loads} loads)")
        if self.shared_bytes > self.shared_limit:
            problems.append(f"needs {self.shared_bytes} bytes of shared memory, {self.shared_limit} exist")
        if self.needs_matrix_instructions and not self.matrix_instructions:
            problems.append("uses no matrix instruction")
        return problems


def limits_of(capability: tuple[int, int]) -> DeviceLimits:
    """The device that a compute capability stands for in the table."""
    return DeviceLimits(capability, _MULTIPROCESSORS.get(capability, 100))


def configurations(limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    """Every configuration that is checked, by name: each operation at the shapes of real encoders."""
    yield from _attention_configurations(limits)
    yield from _linear_configurations(limits)
    yield from _add_norm_configurations()
    yield from _pack_configurations()


def _attention_configurations(limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    cases = [("fp16", dim, 128) for dim in (32, 64, 128)] + [("fp16", dim, 512) for dim in (32, 64, 80)]
    cases += [("bf16", 64, 16), ("bf16", 64, 32), ("bf16", 64, 64), ("bf16", 128, 512), ("fp16", 256, 512)]
    cases += [("tf32", 64, 128), ("tf32", 128, 512), ("fp32", 64, 128), ("fp32", 128, 512)]
    for dtype, dim, seqlen in cases:
        heads, tokens = 12, 8 * seqlen
        q, k, v = _meta(tokens, 3, heads, dim, dtype=DTYPES[dtype]).unbind(1)
        offsets = _meta(9, dtype=torch.int32)
        with _precision(dtype):
            launch = varlen_attention.plan(q, k, v, offsets, seqlen, dim**-0.5, _like(q), limits)
        yield f"varlen_attention-{dtype}-d{dim}-s{seqlen}", launch


def _linear_configurations(limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    cases = [("fp16", 8192, 3072, 768, activation, False) for activation in ACTIVATIONS if activation != "identity"]
    cases += [("bf16", tokens, 3072, 768, "gelu", False) for tokens in (16, 128, 512)]
    cases += [("bf16", 8192, 768, 3072, "identity", True), ("fp16", 8192, 760, 72, "silu", True)]
    cases += [("tf32", 8192, 3072, 768, "gelu", False), ("tf32", 128, 768, 3072, "identity", True)]
    cases += [("fp32", 128, 3072, 768, "gelu", False), ("fp32", 8192, 768, 3072, "identity", True)]
    for dtype, tokens, out_dim, in_dim, activation, with_residual in cases:
        x, weight = _meta(tokens, in_dim, dtype=DTYPES[dtype]), _meta(out_dim, in_dim, dtype=DTYPES[dtype])
        bias, out = _meta(out_dim, dtype=DTYPES[dtype]), _meta(tokens, out_dim, dtype=DTYPES[dtype])
        residual = _like(out) if with_residual else None
        name = f"linear-{dtype}-{tokens}x{out_dim}x{in_dim}-{activation}{'-residual' if with_residual else ''}"
        with _precision(dtype):
            launch = linear.plan(x, weight, bias, activation, residual, out, limits)
        yield name, launch


def _add_norm_configurations() -> Iterator[tuple[str, Launch]]:
    cases = [("fp16", 768, True, False), ("bf16", 384, True, True)]
    cases += [("fp32", 1024, True, False), ("fp16", 16384, True, True)]
    for dtype, dim, with_residual, with_scale in cases:
        x, vector = _meta(8192, dim, dtype=DTYPES[dtype]), _meta(dim, dtype=DTYPES[dtype])
        residual, scale = _like(x) if with_residual else None, _like(vector) if with_scale else None
        total = _like(x) if with_residual or with_scale else None
        launch = add_norm.plan(x, residual, vector, _like(vector), 1e-12, scale, _like(x), total)
        name = f"add_norm-{dtype}-{dim}{'-residual' if with_residual else ''}{'-scale' if with_scale else ''}"
        yield name, launch


def _pack_configurations() -> Iterator[tuple[str, Launch]]:
    for dtype, dim, index in (("fp16", 768, torch.int32), ("fp32", 72, torch.int64)):
        padded, values = _meta(64 * 128, dim, dtype=DTYPES[dtype]), _meta(5000, dim, dtype=DTYPES[dtype])
        indices = _meta(5000, dtype=index)
        yield f"pack-{dtype}-{dim}", pack.plan_pack(padded, indices, values)
        yield f"unpack-{dtype}-{dim}", pack.plan_unpack(values, indices, padded)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    """What a user's setting would be inside the block: float32 matrix products in TF32 for "tf32", exact otherwise."""
    matmul = torch.backends.cuda.matmul
    previous, matmul.fp32_precision = matmul.fp32_precision, "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = previous


def compile_launch(name: str, launch: Launch, limits: DeviceLimits) -> Resources:
    """Compile one launch for a compute capability and read its machine code. Needs no GPU.

    Raises:
        triton.CompilationError and others: the kernel does not compile for that capability.
    """
    major, minor = limits.capability
    compiled = triton.compile(
        _source(launch), target=GPUTarget("cuda", 10 * major + minor, 32), options=dict(launch.options)
    )
    usage, instructions = _disassemble(compiled.asm["cubin"])
    return Resources(
        name=name,
        capability=f"{major}.{minor}",
        registers=usage["REG"],
        spill_stores=instructions["STL"],
        spill_loads=instructions["LDL"],
        stack_bytes=usage["STACK"],
        shared_bytes=compiled.metadata.shared,
        shared_limit=limits.shared_bytes,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        matrix_instructions={opcode: n for opcode, n in instructions.items() if _MATRIX_INSTRUCTION.fullmatch(opcode)},
        needs_matrix_instructions=_has_matrix_dot(launch),
    )


def _has_matrix_dot(launch: Launch) -> bool:
    """Whether the kernel multiplies matrices of 16-bit numbers or in TF32; exact float32 has no matrix unit."""
    if "PRECISION" not in launch.constants:
        return False
    return launch.constants["PRECISION"] == "tf32" or launch.arguments["out_ptr"].dtype != torch.float32


def _source(launch: Launch) -> ASTSource:
    """The specialisation that Triton's launcher makes of them: it folds None and 1, and notes multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    values = launch.arguments | launch.constants
    for position, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(position,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TRITON_NAMES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0  # allocations themselves are aligned
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name], aligned = "fp32", False
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _disassemble(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    """Resource usage of the kernel and how often each opcode stands in its machine code."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    # "/*0010*/   @!P0 HMMA.16816.F32 R4, ..." -> HMMA
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text, flags=re.MULTILINE)
    return usage, Counter(opcodes)


def compile_all(capabilities: list[tuple[int, int]], jobs: int = 2, only: str = "") -> list[Resources]:
    """Every configuration whose name contains ``only``, for every capability, on ``jobs`` threads."""
    tasks = [
        (name, launch, limits)
        for limits in map(limits_of, capabilities)
        for name, launch in configurations(limits)
        if only in name
    ]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda task: compile_launch(*task), tasks))


def main() -> int:
    """Print one line a kernel; 1 if any of them has a problem."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("capabilities", nargs="+", help="compute capabilities, e.g. 8.0 9.0")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="threads")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    arguments = parser.parse_args()
    capabilities = [tuple(map(int, capability.split("."))) for capability in arguments.capabilities]
    results = compile_all(capabilities, arguments.jobs, arguments.only)
    if arguments.json:
        print(json.dumps([asdict(result) | {"problems": result.problems} for result in results]))
    else:
        for r in results:
            matrix = " ".join(f"{opcode}:{count}" for opcode, count in r.matrix_instructions.items()) or "-"
            print(
                f"{r.capability:5} {r.name:50} {r.registers:3} registers {r.shared_bytes:6} bytes shared "
                f"{r.num_warps} warps {r.num_stages} stages {matrix:16} {'; '.join(r.problems)}"
            )
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
