"""Which implementation of an operation runs, and how an operation becomes a ``torch.library`` operator.

Every operation is one package with the same modules: ``reference.py`` (plain PyTorch, always present), ``cpu.py`` and
``triton_kernel.py``. All of them define one function with the name of the operation. Nothing but the reference is
imported before a tensor of that device asks for it, so that importing the package needs neither Triton nor a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator

import torch

_LIBRARY = torch.library.Library("fastencoder", "DEF")

# What the Triton kernels are written for: masks and ids, and these. float64 goes to the reference without a word.
_TRITON_DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32}
)

_failing = threading.Lock()
_forced: str | None = None
_local = threading.local()
may_fall_back = True  # False in a dry run, where an error must show


class Dispatcher:
    """Chooses by the device of an operation's first tensor: CUDA -> Triton, CPU -> ``cpu``, anything else -> reference.

    A Triton implementation that cannot be imported, compiled or launched is given up for the life of the process: the
    operation warns once and runs on the reference, which is right on every device and slower.
    """

    def __init__(self, package: str, name: str) -> None:
        self.name = name
        self._package = package
        self._loaded: dict[str, Callable] = {}
        self._triton_failed = False

    def __call__(self, first: torch.Tensor, *rest):
        kind = device_kind(first)
        if kind == "cpu":
            return self._implementation("cpu")(first, *rest)
        if kind == "cuda" and first.dtype in _TRITON_DTYPES and not self._triton_failed:
            return self._triton_or_reference(first, *rest)
        if kind == "triton":  # asked for by name: an error must show, not fall back
            return self._implementation("triton_kernel")(first, *rest)
        return self._implementation("reference")(first, *rest)

    def _triton_or_reference(self, *args):
        try:
            return self._implementation("triton_kernel")(*args)
        except torch.OutOfMemoryError:  # the reference needs more memory, not less
            raise
        except Exception as error:
            if not may_fall_back or is_batch_invariant():
                raise
            with _failing:  # of several threads one says so
                said, self._triton_failed = self._triton_failed, True
            if not said:
                warnings.warn(
                    f"fastencoder: the Triton kernel of '{self.name}' cannot run here ({type(error).__name__}: {error}). "
                    "The plain PyTorch implementation is used from now on: results stay right, but slower.",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return self._implementation("reference")(*args)

    def _implementation(self, module: str) -> Callable:
        function = self._loaded.get(module)
        if function is None:
            function = getattr(importlib.import_module(f"{self._package}.{module}"), self.name)
            self._loaded[module] = function
        return function


def device_kind(x: torch.Tensor) -> str:
    """The type of the device that operations on ``x`` run for: its own, unless :func:`implementation` says otherwise."""
    return _forced or x.device.type


def on_gpu(device: torch.device) -> bool:
    """Whether operations on this device run as on a GPU: through Triton or the vendor's library."""
    return (_forced or device.type) in ("cuda", "triton")


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Run every operation inside the block on one implementation, whatever the device: for tests, benchmarks,
    debugging.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` (every operation in Triton; on CPU tensors that needs
            ``TRITON_INTERPRET=1``), or ``"cuda"`` (chosen as on a CUDA device: Triton or the vendor's library).
    """
    global _forced
    if name not in ("reference", "cpu", "triton", "cuda"):
        raise ValueError(f"implementation must be 'reference', 'cpu', 'triton' or 'cuda', not {name!r}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside the block, in this thread, kernels on CUDA are chosen without a look at the number of tokens or the lengths of
    sequences, so that an element is always summed in one order; and an operation that cannot run in Triton raises."""
    previous, _local.invariant = is_batch_invariant(), True
    try:
        yield
    finally:
        _local.invariant = previous


def is_batch_invariant() -> bool:
    """Whether this thread is inside of :func:`batch_invariant`."""
    return getattr(_local, "invariant", False)


def register(schema: str, run: Callable, fake: Callable) -> None:
    """Register ``fastencoder::<schema>``, so that ``torch.compile``, export and CUDA graphs see through the operation.

    Args:
        schema: the operator's schema, without its namespace. No output may alias an input.
        run: the implementation, for every device. It repeats the schema's defaults, which the dispatcher leaves out.
        fake: returns empty outputs with the shapes, dtypes and devices that ``run`` returns.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastencoder::{name}", fake, lib=_LIBRARY)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` are kept: float32 for 16-bit types, otherwise ``dtype`` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
