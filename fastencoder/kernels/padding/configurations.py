"""Every configuration of ``read_mask`` and ``token_positions`` that is compiled and examined without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastencoder.kernels._triton import DeviceLimits, Launch
from fastencoder.kernels.padding.triton_kernel import plan_positions, plan_queries, plan_rows

_MARKS = {"i64": torch.int64, "i32": torch.int32, "u8": torch.uint8, "bool": torch.bool}
_SQUARES = {"bool": torch.bool, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_BATCH = 8


def configurations(limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    """Launches by name, on tensors without memory. They are the same on every device, and for every batch and length."""
    tokens, summary = _meta(torch.bool, _BATCH, 128), _meta(torch.int32, _BATCH)
    for name, dtype in _MARKS.items():
        for marks in ("tokens", "padding"):
            yield f"read_mask-{name}-{marks}", plan_rows(_meta(dtype, _BATCH, 128), marks, tokens, summary)
    for name, dtype in _SQUARES.items():
        mask = _meta(dtype, _BATCH, 1, 1, 128)
        if dtype != torch.bool:  # a boolean row of queries is read as marks are
            yield f"read_mask-{name}-row", plan_rows(mask, "tokens", tokens, summary)
        for seqlen in (128, 87):
            mask = _meta(dtype, _BATCH, 1, seqlen, seqlen)
            yield f"read_mask-{name}-queries-{'vectors' if seqlen == 128 else 'any'}", plan_queries(mask, summary)
    offsets, positions = _meta(torch.int32, _BATCH + 1), _meta(torch.int32, 700)
    yield "token_positions", plan_positions(tokens, offsets, positions)


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
