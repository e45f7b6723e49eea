"""What the Triton launchers share: the limits of a device, one kernel launch as a value, and the precision of a dot.

A launcher is split in two: ``plan(...)`` chooses tiles and returns a :class:`Launch`, and the operation runs it. Without
a GPU, :func:`recording` collects the launches of a whole dry run instead, so that what is compiled ahead of time is what a
real run asks for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastencoder.kernels import _dispatch

# Shared memory that one program may use, in KiB, by compute capability (CUDA C++ Programming Guide, technical
# specifications per compute capability). Anything not listed gets the smallest amount since compute capability 8.0.
_SHARED_KIB = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_SHARED_KIB_DEFAULT = 99


class DeviceLimits(NamedTuple):
    """What tile sizes depend on."""

    capability: tuple[int, int]
    multiprocessors: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program may use, in bytes."""
        return 1024 * _SHARED_KIB.get(self.capability, _SHARED_KIB_DEFAULT)


def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device; of an H100 for any other device, where a kernel can only be interpreted. Inside
    :func:`recording`, the limits that were given there."""
    return _recording.limits if _recording is not None else _limits_of(device)


@functools.cache
def _limits_of(device: torch.device) -> DeviceLimits:
    if device.type != "cuda":
        return DeviceLimits((9, 0), 132)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return DeviceLimits((7, 5), properties.multi_processor_count)  # 64 KiB of shared memory as well
    return DeviceLimits((properties.major, properties.minor), properties.multi_processor_count)


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with everything it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors, their descriptors, numbers, and None for a tensor that is not given
    constants: dict[str, Any]  # the kernel's tl.constexpr parameters
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Compilation options. Multiply-add fusion is asked for by name, because Triton's default changes with 3.9."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of ``device``; an empty grid launches nothing."""
        if 0 in self.grid:
            return
        if _recording is not None:
            _recording.launches.append(self)
            return
        _load_named_bundle()
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device, not on that of its arguments
                self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
        else:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


@functools.cache
def _load_named_bundle() -> None:
    """Before the first launch: the kernels that FASTENCODER_BUNDLE names, if it names any."""
    folder = os.environ.get("FASTENCODER_BUNDLE")
    if folder:
        importlib.import_module("fastencoder.runtime").load_bundle(folder)


class _Recording(NamedTuple):
    limits: DeviceLimits
    launches: list[Launch]


_recording: _Recording | None = None


@contextlib.contextmanager
def recording(limits: DeviceLimits) -> Iterator[list[Launch]]:
    """A dry run: inside the block operations choose as on a CUDA device with these limits, on tensors of any device (also
    ``meta``), and nothing is launched. Yields the list that fills with the launches. For one thread at a time."""
    global _recording
    previous, _recording = _recording, _Recording(limits, [])
    _dispatch.may_fall_back = False
    try:
        with _dispatch.implementation("cuda"):
            yield _recording.launches
    finally:
        _recording = previous
        _dispatch.may_fall_back = previous is None


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 is exact unless the user has allowed TF32; 16-bit types ignore it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Reading the older allow_tf32 raises once a program has used the newer setting, which sees both.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


@contextlib.contextmanager
def user_precision(dtype: str) -> Iterator[None]:
    """What a user's setting would be inside the block: float32 matrix products in TF32 for "tf32", exact otherwise."""
    matmul = torch.backends.cuda.matmul
    previous, matmul.fp32_precision = matmul.fp32_precision, "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = previous


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its last dimension is contiguous, as every kernel expects, otherwise a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``; 1 for ``n <= 1``."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)
