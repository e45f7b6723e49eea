"""The optional C++ extension ``fastencoder._native``: whether it is there, and which instructions this processor has for it.

It is built when the package is installed and there is a C++ compiler. Without it the same operations run in plain PyTorch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

try:
    from fastencoder import _native as library
except ImportError:  # no compiler at the installation, or another processor than x86
    library = None

ISAS = ("none", "avx2", "avx512", "avx512_vnni")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# FASTENCODER_NATIVE=0 does without, for comparisons and to rule it out as a cause.
best = 0 if library is None or os.environ.get("FASTENCODER_NATIVE") == "0" else library.isa()
current = best


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Inside the block the extension uses these instructions, or is not used ("none"): for tests and benchmarks.

    Raises:
        ValueError: the extension is missing, or this processor does not have them.
    """
    global current
    if name not in ISAS[: best + 1]:
        raise ValueError(f"isa must be one of {ISAS[: best + 1]} here, not {name!r}")
    previous, current = current, ISAS.index(name)
    try:
        yield
    finally:
        current = previous


def address(x: torch.Tensor | None) -> int:
    """Where a tensor's first element is; 0 for None."""
    return 0 if x is None else x.data_ptr()


def float32(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x` as contiguous float32: itself, if it is that already."""
    return None if x is None else x.to(torch.float32).contiguous()
