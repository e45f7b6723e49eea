"""Every configuration of ``pack`` and ``unpack`` that is compiled and examined without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastencoder.kernels._triton import DeviceLimits, Launch
from fastencoder.kernels.pack.triton_kernel import plan_pack, plan_unpack

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_INDICES = {"i32": torch.int32, "i64": torch.int64}
# Every tile: 16 rows and fewer, one block of columns and several.
_CASES = [("bf16", width, "i32") for width in (72, 128, 256, 384, 768, 1024, 1280, 4096)]
_CASES += [("fp32", width, "i32") for width in (384, 768, 1024)] + [("fp16", 768, "i32"), ("bf16", 768, "i64")]


def configurations(limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    """Launches by name, on tensors without memory. They are the same on every device."""
    for dtype, dim, index in _CASES:
        padded = torch.empty((64 * 128, dim), dtype=_DTYPES[dtype], device="meta")
        values = torch.empty((5000, dim), dtype=_DTYPES[dtype], device="meta")
        indices = torch.empty(5000, dtype=_INDICES[index], device="meta")
        yield f"pack-{dtype}-{dim}-{index}", plan_pack(padded, indices, values)
        yield f"unpack-{dtype}-{dim}-{index}", plan_unpack(values, indices, padded)
