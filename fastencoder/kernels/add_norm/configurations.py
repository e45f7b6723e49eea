"""Every configuration of ``add_norm`` that is compiled and examined without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastencoder.kernels._triton import DeviceLimits, Launch
from fastencoder.kernels.add_norm.triton_kernel import plan

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_FEW, _MANY = 16, 1 << 20  # rows: a program for each, or several in one
# One width for every tile of the heuristics; 72 and 760 are no multiple of a vector, or of a warp's vectors.
_WIDTHS = (72, 128, 256, 384, 760, 768, 1024, 1280, 4096, 8192, 16384)


def configurations(limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    """Launches by name, on tensors without memory: every tile, and every operand that can be absent."""
    for width in _WIDTHS:
        yield _configuration(limits, "bf16", width, _FEW)
        yield _configuration(limits, "fp16", width, _MANY)
    for width in (384, 768, 1024, 4096, 16384):
        yield _configuration(limits, "fp32", width, _FEW)
        yield _configuration(limits, "fp32", width, _MANY)
    yield _configuration(limits, "bf16", 768, _MANY)
    yield _configuration(limits, "bf16", 768, _MANY, residual=False, keep_sum=False)
    yield _configuration(limits, "bf16", 768, _MANY, scale=True, x_bias=True)
    yield _configuration(limits, "bf16", 768, _MANY, rms=True, bias=False)
    for parts in (2, 4, 8):
        yield _configuration(limits, "bf16", 768, _FEW, parts=parts, x_bias=True, keep_sum=False)
    yield _configuration(limits, "bf16", 1024, _FEW, parts=4, x_bias=True, scale=True)
    yield _configuration(limits, "fp32", 1024, _FEW, parts=4, x_bias=True)
    yield _configuration(limits, "bf16", 16384, _FEW, parts=8, x_bias=True)


def _configuration(
    limits: DeviceLimits,
    dtype: str,
    dim: int,
    rows: int,
    parts: int = 0,
    residual: bool = True,
    bias: bool = True,
    scale: bool = False,
    x_bias: bool = False,
    rms: bool = False,
    keep_sum: bool = True,
) -> tuple[str, Launch]:
    def meta(*shape: int, dtype: torch.dtype = _DTYPES[dtype]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    launch = plan(
        meta(parts, rows, dim, dtype=torch.float32) if parts else meta(rows, dim),
        meta(rows, dim) if residual else None,
        meta(dim),
        meta(dim) if bias else None,
        1e-12,
        meta(dim) if scale else None,
        meta(dim) if x_bias else None,
        rms,
        meta(rows, dim),
        meta(rows, dim) if keep_sum else None,
        limits,
    )
    features = {
        "few": rows == _FEW,
        f"parts{parts}": parts > 0,
        "residual": residual,
        "scale": scale,
        "xbias": x_bias,
        "rms": rms,
        "sum": keep_sum,
    }
    name = "-".join(["add_norm", dtype, str(dim), *(feature for feature, present in features.items() if present)])
    return name, launch
