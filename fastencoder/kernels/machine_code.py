"""Compile one launch for a GPU that is not there, and read from the machine code what it will cost to run it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import triton

from fastencoder.kernels import stand_in
from fastencoder.kernels._triton import DeviceLimits, Launch

# Multiprocessors of the GPUs that a compute capability is best known for: A100, A40, L40S, H100, B200, RTX PRO 6000.
_MULTIPROCESSORS = {(8, 0): 108, (8, 6): 84, (8, 9): 142, (9, 0): 132, (10, 0): 148, (12, 0): 188}
# PTX instructions that run on the matrix units: issued by a warp, by a warp group (9.0), by one thread (10.0).
_MATRIX_INSTRUCTION = re.compile(r"^\s*(?:@%?!?\w+\s+)?(?:(wgmma)\.mma_async|(tcgen05)\.mma|(mma)\.sync)\.", re.MULTILINE)
# "%x = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<128x64xf16> * ..."; shape and type of the left operand
_DOT = re.compile(r"tt\.dot [^:]*?(inputPrecision = tf32)?\s*:\s*tensor<(?:\d+x)?(\d+)x\d+x(\w+)>")
# A warp group of 9.0 multiplies 64 rows at a time.
_WARP_GROUP_ROWS = 64


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
    matrix_instructions: dict[str, int]  # by PTX family: mma, wgmma, tcgen05
    dots: tuple[tuple[int, str], ...]  # rows and type of the left operand of every dot that matrix units can take

    @property
    def problems(self) -> list[str]:
        """Why this kernel would not run, or not run well; empty if there is nothing to say."""
        problems = []
        if self.spill_stores or self.spill_loads:
            problems.append(f"spills registers ({self.spill_stores} stores, {self.spill_loads} loads)")
        if self.shared_bytes > self.shared_limit:
            problems.append(f"needs {self.shared_bytes} bytes of shared memory, {self.shared_limit} exist")
        if self.dots and not self.matrix_instructions:
            problems.append("uses no matrix instruction")
        elif self._could_use_warp_groups and not self.matrix_instructions.get("wgmma"):
            problems.append("has tiles of 64 rows and uses no wgmma")
        return problems

    @property
    def _could_use_warp_groups(self) -> bool:
        return self.capability == "9.0" and any(rows >= _WARP_GROUP_ROWS for rows, _ in self.dots)


def limits_of(capability: tuple[int, int]) -> DeviceLimits:
    """The device that a compute capability stands for."""
    return DeviceLimits(capability, _MULTIPROCESSORS.get(capability, 100))


def compile_launch(name: str, launch: Launch, limits: DeviceLimits) -> Resources:
    """Compile one launch for a compute capability and read its machine code. Needs no GPU.

    Raises:
        triton.CompilationError and others: the kernel does not compile for that capability.
    """
    with stand_in.standing_in(limits.capability):
        compiled = stand_in.warm_up(launch)
    return read_resources(name, compiled, launch, limits)


def read_resources(name: str, compiled: Any, launch: Launch, limits: DeviceLimits) -> Resources:
    """What a kernel that Triton has compiled for ``limits`` needs."""
    usage, opcodes = _read_cubin(compiled.asm["cubin"])
    matrix = Counter(next(filter(None, found)) for found in _MATRIX_INSTRUCTION.findall(compiled.asm["ptx"]))
    return Resources(
        name=name,
        capability=".".join(map(str, limits.capability)),
        registers=usage["REG"],
        spill_stores=opcodes["STL"],
        spill_loads=opcodes["LDL"],
        stack_bytes=usage["STACK"],
        shared_bytes=compiled.metadata.shared,
        shared_limit=limits.shared_bytes,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        matrix_instructions=dict(matrix),
        dots=_matrix_dots(compiled.asm["ttir"]),
    )


def _matrix_dots(ttir: str) -> tuple[tuple[int, str], ...]:
    """The dots of 16-bit numbers or in TF32; exact float32 has no matrix unit."""
    found = {
        (int(rows), "tf32" if tf32 else dtype) for tf32, rows, dtype in _DOT.findall(ttir) if tf32 or dtype != "f32"
    }
    return tuple(sorted(found))


def _read_cubin(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    """Resource usage of the kernel, and how often each opcode stands in its machine code if it has a stack at all.

    Spilled registers live on the stack; disassembling takes a hundred times as long as reading the usage.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _cuobjdump("-res-usage", file.name)
        usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        if not usage["STACK"] and not usage["LOCAL"]:
            return usage, Counter()
        text = _cuobjdump("-sass", file.name)
    # "/*0010*/   @!P0 HMMA.16816.F32 R4, ..." -> HMMA
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text, flags=re.MULTILINE)
    return usage, Counter(opcodes)


def _cuobjdump(*arguments: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
