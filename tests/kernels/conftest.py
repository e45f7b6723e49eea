"""Without a GPU, the Triton kernels of these tests run in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torch.utils._device
from kernel_testing import TRITON_DEVICE

_OPERATIONS = ("add_norm", "embed_norm", "linear", "pack", "padding", "varlen_attention")


@pytest.fixture(scope="session", autouse=True)
def interpreted_triton():
    """Import the kernels with ``TRITON_INTERPRET=1``, which ``triton.jit`` reads when it decorates, and only then."""
    if TRITON_DEVICE == "cpu":
        names = [f"fastencoder.kernels.{name}.triton_kernel" for name in _OPERATIONS]
        assert not set(names) & set(sys.modules), "the kernels were imported before they could be interpreted"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            _interpret_standard_functions()
            for name in names:
                importlib.import_module(name)


def _interpret_standard_functions() -> None:
    """Triton's own jitted functions (``tl.sum``) too, which were decorated earlier if anything has imported Triton."""
    import triton.experimental.gluon  # noqa: F401 - Triton imports it later, and then expects what it expects now
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted: dict[int, InterpretedFunction] = {}
    for module in (tl.standard, tl):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                replacement = interpreted.setdefault(id(function), InterpretedFunction(function.fn))
                setattr(module, name, replacement)


@pytest.fixture(scope="module", autouse=True)
def poisoned_empty():
    """``torch.empty`` returns NaN, so that an element which a kernel leaves unwritten cannot pass for right."""
    empty = torch.empty
    # `with torch.device(...)` remembers which functions make tensors when it is first used: that must not be these.
    torch.utils._device._device_constructors()

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield
