"""What the Triton launchers share: the limits of a device, one kernel launch as a value, and the precision of a dot.

A launcher is split in two: ``plan(...)`` chooses tiles and returns a :class:`Launch`, and the operation runs it. The
ahead-of-time compiler calls the same ``plan`` without a GPU, so what it checks is what runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

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


@functools.cache
def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device; of an H100 for any other device, where a kernel can only be interpreted."""
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
    arguments: dict[str, Any]  # tensors, numbers, and None for a tensor that is not given
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
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device, not on that of its arguments
                self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
        else:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 is exact unless the user has allowed TF32; 16-bit types ignore it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Reading the older allow_tf32 raises once a program has used the newer setting, which sees both.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its last dimension is contiguous, as every kernel expects, otherwise a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``; 1 for ``n <= 1``."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)
