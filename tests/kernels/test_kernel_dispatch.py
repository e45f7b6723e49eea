"""How an operation is reached: by device, through ``torch.ops``, when compiled, and when its Triton kernel fails."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings

import pytest
import torch
from kernel_testing import random

from fastencoder import kernels
from fastencoder.kernels import _dispatch
from fastencoder.kernels._dispatch import Dispatcher


def arguments_of(name, dtype=torch.float32):
    """Arguments of every operation, with every optional part."""

    def tensor(seed, *shape):
        return random(seed, *shape, dtype=dtype, device="cpu")

    indices = torch.tensor([0, 1, 3, 4], dtype=torch.int32)
    qkv = tensor(0, 9, 3, 2, 16)
    return {
        "pack": (tensor(0, 2, 3, 8), indices),
        "unpack": (tensor(0, 4, 8), indices, 2, 3),
        "linear": (tensor(0, 5, 8), tensor(1, 7, 8), tensor(2, 7), "gelu", tensor(3, 5, 7)),
        "varlen_attention": (*qkv.unbind(1), torch.tensor([0, 4, 4, 9], dtype=torch.int32), 5, 0.25),
        "add_norm": (tensor(0, 5, 8), tensor(1, 5, 8), tensor(2, 8), tensor(3, 8), 1e-5, tensor(4, 8)),
    }[name]


OPERATIONS = ("pack", "unpack", "linear", "varlen_attention", "add_norm")


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype):
    operator = getattr(torch.ops.fastencoder, name).default
    torch.library.opcheck(operator, arguments_of(name, dtype))


def test_opcheck_without_optional_parts():
    x, weight = random(0, 5, 8, dtype=torch.float32, device="cpu"), torch.ones(8)
    torch.library.opcheck(torch.ops.fastencoder.add_norm.default, (x, None, weight, None, 1e-5))
    torch.library.opcheck(torch.ops.fastencoder.linear.default, (x, torch.ones(3, 8)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operator_and_function_agree(name):
    arguments = arguments_of(name)
    expected = getattr(kernels, name)(*arguments)
    assert_same(getattr(torch.ops.fastencoder, name)(*arguments), expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_compiled_function_calls_the_operator(name):
    """One graph, one node of ours in it, and the result of the eager function."""
    graphs = []

    def backend(module, _):
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    function, arguments = getattr(kernels, name), arguments_of(name)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    assert_same(compiled(*arguments), function(*arguments))
    (graph,) = graphs
    ours = [str(node.target) for node in graph.nodes if "fastencoder" in str(node.target)]
    assert ours == [f"fastencoder.{name}"]


def test_an_operator_returns_no_input():
    """The function may return its input as the sum; an operator may not, and copies."""
    x = random(0, 5, 8, dtype=torch.float32, device="cpu")
    _, total = torch.ops.fastencoder.add_norm(x, None, torch.ones(8), None, 1e-5)
    assert total is not x
    assert total.data_ptr() != x.data_ptr()
    assert torch.equal(total, x)


def on_cuda(monkeypatch):
    """Dispatch as on a CUDA device, without one."""
    monkeypatch.setattr(_dispatch, "_forced", "cuda")


@pytest.mark.parametrize("name", OPERATIONS)
def test_cuda_runs_triton(monkeypatch, name):
    package = "pack" if name == "unpack" else name
    dispatcher = Dispatcher(f"fastencoder.kernels.{package}", name)
    dispatcher._loaded["triton_kernel"] = lambda *_: "triton"
    on_cuda(monkeypatch)
    assert dispatcher(*arguments_of(name)) == "triton"
    assert dispatcher(*arguments_of(name, torch.float64)) != "triton"


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failing_triton_kernel_warns_once_and_stays_right(monkeypatch, name):
    calls = []

    def broken(*_):
        calls.append(name)
        raise RuntimeError("out of resources")

    package = "pack" if name == "unpack" else name
    dispatcher = Dispatcher(f"fastencoder.kernels.{package}", name)
    dispatcher._loaded["triton_kernel"] = broken
    arguments = arguments_of(name)
    expected = getattr(kernels, name)(*arguments)
    on_cuda(monkeypatch)
    with pytest.warns(
        RuntimeWarning, match=f"'{name}' cannot run here .*out of resources.*right, but slower"
    ) as caught:
        assert_same(dispatcher(*arguments), expected)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(dispatcher(*arguments), expected)
    assert len(calls) == 1, "a kernel that has failed is not tried again"


def test_a_missing_triton_falls_back(monkeypatch):
    dispatcher = Dispatcher("fastencoder.kernels.add_norm", "add_norm")
    monkeypatch.setitem(sys.modules, "fastencoder.kernels.add_norm.triton_kernel", None)
    on_cuda(monkeypatch)
    with pytest.warns(RuntimeWarning, match="ModuleNotFoundError"):
        dispatcher(*arguments_of("add_norm"))


def test_out_of_memory_is_not_a_reason_to_fall_back(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    dispatcher = Dispatcher("fastencoder.kernels.add_norm", "add_norm")
    dispatcher._loaded["triton_kernel"] = full
    on_cuda(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        dispatcher(*arguments_of("add_norm"))


def test_implementation_names():
    with pytest.raises(ValueError, match="'reference', 'cpu', 'triton' or 'cuda'"), kernels.implementation("gpu"):
        pass
    assert _dispatch._forced is None
    with kernels.implementation("reference"), kernels.implementation("cpu"):
        assert _dispatch._forced == "cpu"
    assert _dispatch._forced is None


@contextlib.contextmanager
def float32_precision(setting):
    previous, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, setting
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous


@pytest.mark.parametrize("setting", ["none", "ieee", "tf32"])
def test_float32_is_exact_unless_tf32_is_allowed(setting):
    from fastencoder.kernels._triton import dot_precision

    with float32_precision(setting):
        assert dot_precision(torch.float32) == ("tf32" if setting == "tf32" else "ieee")
        assert dot_precision(torch.float16) == "ieee"


def test_importing_needs_no_triton():
    code = "import sys, fastencoder.kernels; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
