"""Every configuration of ``embed_norm`` that is compiled and examined without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastencoder.kernels._triton import DeviceLimits, Launch
from fastencoder.kernels.embed_norm.triton_kernel import plan

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_FEW, _MANY = 16, 1 << 20  # tokens: a program for each, or several in one
_WIDTHS = (72, 128, 256, 384, 768, 1024, 1280, 4096, 16384)


def configurations(limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    """Launches by name, on tensors without memory: every tile, and every table that can be absent."""
    for width in _WIDTHS:
        yield _configuration(limits, "bf16", width, _FEW)
        yield _configuration(limits, "fp16", width, _MANY)
    for width in (384, 768, 1024):
        yield _configuration(limits, "fp32", width, _FEW)
        yield _configuration(limits, "fp32", width, _MANY)
    yield _configuration(limits, "bf16", 768, _MANY)
    yield _configuration(limits, "bf16", 768, _MANY, ids=torch.int32)
    yield _configuration(limits, "bf16", 768, _MANY, types=False)
    yield _configuration(limits, "bf16", 768, _MANY, types=False, positions=False, bias=False)


def _configuration(
    limits: DeviceLimits,
    dtype: str,
    dim: int,
    tokens: int,
    ids: torch.dtype = torch.int64,
    types: bool = True,
    positions: bool = True,
    bias: bool = True,
) -> tuple[str, Launch]:
    def table(rows: int) -> torch.Tensor:
        return torch.empty((rows, dim), dtype=_DTYPES[dtype], device="meta")

    def looked_up(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(tokens, dtype=ids, device="meta"), table(rows)

    vector = torch.empty(dim, dtype=_DTYPES[dtype], device="meta")
    nothing = (None, None)
    tables = [looked_up(30522), looked_up(2) if types else nothing, looked_up(512) if positions else nothing]
    launch = plan(tables, vector, vector if bias else None, 1e-12, table(tokens), limits)
    features = {
        "few": tokens == _FEW,
        "i32": ids == torch.int32,
        "types": types,
        "positions": positions,
        "bias": bias,
    }
    name = "-".join(["embed_norm", dtype, str(dim), *(feature for feature, present in features.items() if present)])
    return name, launch
