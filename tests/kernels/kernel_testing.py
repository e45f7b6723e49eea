"""What the kernel tests share: where each implementation runs, random inputs, and a comparison with an error model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from fastencoder.kernels import implementation as _implementation
from fastencoder.kernels import native

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

IMPLEMENTATIONS = ("reference", "cpu", "triton")

# Of operations that are in the C++ extension too, where "cpu" is plain PyTorch.
NATIVE = tuple(
    pytest.param(f"cpu {isa}", marks=pytest.mark.skipif(place > native.best, reason=f"no extension, or no {isa} here"))
    for place, isa in enumerate(native.ISAS)
    if place > 0
)
ALL_IMPLEMENTATIONS = (*IMPLEMENTATIONS, *NATIVE)


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Operations run on this implementation: one of :data:`ALL_IMPLEMENTATIONS`, or "cuda"."""
    kind, _, isa = name.partition(" ")
    with _implementation(kind), native.isa(isa or "none"):
        yield


def device_of(implementation: str) -> str:
    return TRITON_DEVICE if implementation == "triton" else "cpu"


def dot_works(implementation: str, dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies the bit patterns of bfloat16 matrices."""
    return not (implementation == "triton" and TRITON_DEVICE == "cpu" and dtype == torch.bfloat16)


def random(seed: int, *shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def rounding(dtype: torch.dtype) -> float:
    """The relative error of rounding to ``dtype`` in any direction (the interpreter truncates to bfloat16)."""
    return torch.finfo(dtype).eps


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Every element of ``actual`` is finite and as near to the float64 ``expected`` as ``bound`` says."""
    assert actual.shape == expected.shape
    assert expected.dtype == torch.float64
    if not actual.numel():
        return
    actual, bound = actual.double().cpu(), bound.double().cpu()
    assert actual.isfinite().all(), f"{(~actual.isfinite()).sum()} of {actual.numel()} elements are not finite"
    excess = ((actual - expected.cpu()).abs() / bound).max().item()
    assert excess <= 1, f"an error is {excess:.3g} times its bound"
