"""Faults, each put in by hand: afterwards the model answers as if nothing had been, nothing is left open, and what is given up
for good is said once.

One test for each line of the list in docs/reliability.md.
"""

from __future__ import annotations

import copy
import json
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastencoder import kernels, reverse, to_fast
from fastencoder.kernels import _dispatch, native
from fastencoder.layers import weights
from fastencoder.layers.stack import _local as windows
from fastencoder.layers.stack import current_call
from fastencoder.runtime import graphs

from . import tiny
from .attention_cases import CASES
from .faults import EPS, answer, assert_as_new, said_once

# ---------------------------------------------------------------------------------------------------------------- kernels


class _CompilationError(Exception):
    """As Triton's own, which no name imports it by where Triton is missing."""


class _OutOfResources(Exception):
    pass


OPERATIONS = {"varlen_attention": kernels.varlen_attention, "add_norm": kernels.add_norm, "pack": kernels.pack}


@pytest.fixture
def as_on_cuda(monkeypatch) -> dict[str, list]:
    """Operations choose as on a CUDA device, and their Triton kernels are stand-ins: the reference, until a fault is put in."""
    calls: dict[str, list] = {}
    found = [
        value
        for module in (__import__(f"fastencoder.kernels.{name}", fromlist=["_"]) for name in (
            "add_norm", "embed_norm", "linear", "pack", "padding", "varlen_attention"
        ))
        for value in vars(module).values()
        if isinstance(value, _dispatch.Dispatcher)
    ]  # fmt: skip
    for dispatcher in found:
        reference = dispatcher._implementation("reference")

        def stand_in(*args: object, reference: Callable = reference, name: str = dispatcher.name) -> object:
            calls.setdefault(name, []).append(len(args))
            if name in faults:
                raise faults[name]
            return reference(*args)

        monkeypatch.setattr(dispatcher, "_loaded", {**dispatcher._loaded, "triton_kernel": stand_in})
        monkeypatch.setattr(dispatcher, "_triton_failed", False)
    faults: dict[str, Exception] = {}
    calls["faults"] = faults  # type: ignore[assignment]
    with kernels.implementation("cuda"):
        yield calls


@pytest.mark.parametrize("operation", ["varlen_attention", "add_norm"])
def test_a_triton_compile_error(as_on_cuda, operation: str) -> None:
    model = to_fast(tiny.bert())
    as_on_cuda["faults"][operation] = _CompilationError("at 12:8: unsupported operand")
    with said_once(f"'{operation}' cannot run here", "unsupported operand", "results stay right"):
        answer(model)
        answer(model)
    assert len(as_on_cuda[operation]) == 1, "a kernel that has failed is not tried again"
    assert tiny.calls(model)[1] == 0
    assert_as_new(model)


@pytest.mark.parametrize("operation", ["varlen_attention", "add_norm"])
def test_a_launch_failure(as_on_cuda, operation: str) -> None:
    """In the middle of a model that has run: shared memory that a longer batch needs and the GPU does not have."""
    model = to_fast(tiny.bert())
    answer(model)
    before = len(as_on_cuda[operation])
    as_on_cuda["faults"][operation] = _OutOfResources("out of resource: shared memory, Required: 270336")
    with said_once(f"'{operation}' cannot run here", "shared memory"):
        answer(model)
        answer(model)
    assert before > 1 and len(as_on_cuda[operation]) == before + 1
    assert_as_new(model)


def test_a_kernel_that_fails_in_several_threads_at_once() -> None:
    dispatcher, all_inside = _dispatch.Dispatcher("fastencoder.kernels.add_norm", "add_norm"), threading.Barrier(4)

    def broken(*_: object) -> None:
        all_inside.wait(60)
        raise _OutOfResources("out of resource: shared memory")

    dispatcher._loaded["triton_kernel"] = broken
    x = torch.randn(3, 8)
    expected = torch.nn.functional.layer_norm(x, (8,))
    with kernels.implementation("cuda"), said_once("'add_norm' cannot run here"), ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: dispatcher(x, None, torch.ones(8), torch.zeros(8), 1e-5, None), range(4)):
            torch.testing.assert_close(result[0], expected)


def test_out_of_memory_on_a_gpu_in_the_middle_of_a_forward(as_on_cuda) -> None:
    model = to_fast(tiny.bert())
    answer(model)
    as_on_cuda["faults"]["varlen_attention"] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is given up
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
                answer(model)
            assert not any(windows.calls.values())
    as_on_cuda["faults"].clear()
    before = len(as_on_cuda["varlen_attention"])
    answer(model)
    assert len(as_on_cuda["varlen_attention"]) > before
    assert_as_new(model)


needs_extension = pytest.mark.skipif(
    not native.best, reason="the C++ extension is not built, or this processor has no AVX2"
)


@needs_extension
@pytest.mark.parametrize("function", ["add_norm", "attention", "linear", "layers", "embed_norm"])
def test_out_of_memory_in_the_extension(monkeypatch, function: str) -> None:
    if function in ("add_norm", "attention", "linear"):  # what makes up a layer that has more to it than BERT's
        monkeypatch.setattr(weights, "native_layer", lambda *_: None)
    model, batch = to_fast(tiny.bert()), tiny.ragged(batch=9, seqlen=20)
    answer(model)
    real, raised = native.library, []

    def full(*_: object) -> None:
        raised.append(function)
        raise MemoryError

    names = [name for name in dir(real) if not name.startswith("_")]
    monkeypatch.setattr(native, "library", SimpleNamespace(**{name: getattr(real, name) for name in names}))
    monkeypatch.setattr(native.library, function, full)
    with torch.inference_mode(), pytest.raises(MemoryError):
        model(**batch)
    assert raised and not any(windows.calls.values())
    monkeypatch.setattr(native, "library", real)
    with torch.inference_mode():
        expected = tiny.bert()(**batch).last_hidden_state
        assert tiny.relative_error(model(**batch).last_hidden_state, expected, batch["attention_mask"]) < EPS
    assert_as_new(model)


def test_a_cuda_graph_that_cannot_be_captured(monkeypatch) -> None:
    def capture(*_: object) -> None:
        raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "new_pool", lambda device: object())
    monkeypatch.setattr(graphs, "has_graphs", lambda device: True)
    model = to_fast(tiny.bert(), cuda_graphs=True)
    answer(model)
    with said_once("legacy stream", "without graphs", "results stay right"):
        answer(model)
        answer(model)
    assert tiny.calls(model) == (9, 0)
    assert_as_new(model)


# ------------------------------------------------------------------------------------------------------------------ bundles


def _bundle(folder: Path) -> Path:
    """A bundle of one kernel that never was one; every check before the kernels' contents passes."""
    pytest.importorskip("triton")
    from fastencoder.kernels import stand_in
    from fastencoder.runtime import bundle

    cache = folder / "cache" / "ABCDEFGH234567"
    cache.mkdir(parents=True)
    for name, contents in (("kernel.json", b"{}"), ("kernel.cubin", b"machine code")):
        (cache / name).write_bytes(contents)
    with stand_in.standing_in((9, 0)):
        bundle.write_bundle(folder / "bundle", {"sm_90": [{path.name: str(path) for path in cache.iterdir()}]}, {})
    return folder / "bundle"


def _flip_a_byte(bundle: Path) -> None:
    path = bundle / "kernels" / "ABCDEFGH234567" / "kernel.cubin"
    contents = bytearray(path.read_bytes())
    contents[3] ^= 1
    path.write_bytes(contents)


def _remove_a_file(bundle: Path) -> None:
    (bundle / "kernels" / "ABCDEFGH234567" / "kernel.json").unlink()


def _write_a_wrong_hash(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["kernels"][0]["files"]["kernel.cubin"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _truncate_the_manifest(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text[: len(text) // 2])


def _pickle_the_manifest(bundle: Path) -> None:
    """One that would write a file when it is loaded."""
    import pickle

    class Harm:
        def __reduce__(self):
            return open, (str(bundle / "ran"), "w")

    (bundle / "manifest.json").write_bytes(pickle.dumps(Harm()))


def _name_a_file_outside(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["kernels"][0]["files"] = {"../../../secret.json": "0" * 64}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    _flip_a_byte: "kernel.cubin is damaged",
    _remove_a_file: "kernel.json is missing",
    _write_a_wrong_hash: "kernel.cubin is damaged",
    _truncate_the_manifest: "cannot be read",
    _pickle_the_manifest: "cannot be read",
    _name_a_file_outside: "manifest.json is damaged",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__.strip("_"))
def test_a_damaged_bundle(tmp_path: Path, monkeypatch, damage: Callable) -> None:
    folder = _bundle(tmp_path)
    import triton

    from fastencoder.kernels import stand_in
    from fastencoder.runtime import bundle

    monkeypatch.setattr(bundle, "_loaded", {})
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)
    with stand_in.standing_in((9, 0)):
        assert bundle.load_bundle(folder) and set(bundle._loaded) == {"ABCDEFGH234567"}  # what is whole is taken
        bundle._loaded.clear()
        monkeypatch.setattr(triton.knobs.cache, "manager_class", None)
        damage(folder)
        with said_once(DAMAGE[damage], "is not used", "Kernels are compiled when they are first needed"):
            assert bundle.load_bundle(folder) is False
    assert not bundle._loaded and triton.knobs.cache.manager_class is None
    assert not (folder / "ran").exists()
    assert_as_new(to_fast(tiny.bert()))


# ---------------------------------------------------------------------------------------------------- hooks and interrupts


def _before(model: nn.Module, fault: Callable) -> list:
    return [model.encoder.register_forward_pre_hook(fault), model.encoder.layer[0].register_forward_pre_hook(fault)]


def _between(model: nn.Module, fault: Callable) -> list:
    return [
        model.encoder.layer[1].register_forward_hook(fault),
        model.encoder.layer[2].register_forward_pre_hook(fault),
    ]


def _inside(model: nn.Module, fault: Callable) -> list:
    return [model.encoder.layer[1].attention.output.register_forward_hook(fault)]


def _after(model: nn.Module, fault: Callable) -> list:
    return [model.encoder.layer[2].register_forward_hook(fault), model.encoder.register_forward_hook(fault)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", [_before, _between, _inside, _after], ids=lambda where: where.__name__.strip("_"))
def test_an_exception_in_a_users_hook(where: Callable, error: type[BaseException]) -> None:
    model = to_fast(tiny.bert())
    answer(model)
    count = len(where(copy.deepcopy(model), lambda *_: None))
    for index in range(count):

        def fault(*_: object) -> None:
            raise error("of the user's")

        handles = where(model, fault)
        for other, handle in enumerate(handles):
            if other != index:
                handle.remove()
        with pytest.raises(error, match="of the user's"):
            answer(model)
        handles[index].remove()
    assert_as_new(model)


@pytest.mark.parametrize("layer", [0, 1])
def test_keyboard_interrupt_between_two_layers(monkeypatch, layer: int) -> None:
    """As a signal would raise it: when a layer has handed on its packed tokens, and the next one has not begun. No hook of
    PyTorch is told."""
    model = to_fast(tiny.bert())
    answer(model)
    original, interrupted = type(model.encoder.layer[0]).__call__, []

    def call(self: nn.Module, *args: object, **kwargs: object) -> object:
        output = original(self, *args, **kwargs)
        if self is model.encoder.layer[layer] and not interrupted:
            assert current_call(self._fastencoder.stack).carried is output, "the next layer takes over from this one"
            interrupted.append((output, args[1:], kwargs))
            raise KeyboardInterrupt
        return output

    monkeypatch.setattr(type(model.encoder.layer[0]), "__call__", call)
    with pytest.raises(KeyboardInterrupt) as held:  # whose traceback keeps the frames
        answer(model)
    monkeypatch.undo()
    assert interrupted and held
    handed_on, args, kwargs = interrupted[0]
    with torch.inference_mode():
        again, stock = (each.encoder.layer[layer + 1](handed_on, *args, **kwargs) for each in (model, tiny.bert()))
        assert tiny.relative_error(again, stock, tiny.ragged()["attention_mask"]) < EPS
    hidden = torch.randn(2, 7, 48)
    for each, stock in zip(model.encoder.layer, tiny.bert().encoder.layer, strict=True):
        with torch.inference_mode():
            assert tiny.relative_error(each(hidden), stock(hidden)) < EPS
    assert_as_new(model)


def test_reverse_at_once_after_an_interrupt(monkeypatch) -> None:
    model = to_fast(tiny.bert())
    original = type(model.encoder.layer[0]).__call__

    def call(self: nn.Module, *args: object, **kwargs: object) -> object:
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model.encoder.layer[0]), "__call__", call)
    with pytest.raises(KeyboardInterrupt):
        answer(model)
    monkeypatch.undo()
    reverse(model)
    assert torch.equal(answer(model), answer(tiny.bert()))


def test_an_interrupt_in_attention_alone() -> None:
    case = CASES[0]
    model, stock = to_fast(case.build()), case.build()
    mask = torch.ones(3, case.mask_size, dtype=torch.long)
    mask[0, case.mask_size - 4 :] = 0
    batch = case.batch(model, mask)
    site = next(module for module in model.modules() if hasattr(module, "_fastencoder_attention"))

    def fault(*_: object) -> None:
        raise KeyboardInterrupt

    handle = site.register_forward_hook(fault)
    with torch.inference_mode():
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        handle.remove()
        expected = stock(**batch)[case.output]
        real = case.real(model, mask)
        assert tiny.relative_error(model(**batch)[case.output], expected, real) < EPS
        reverse(model)
        assert torch.equal(model(**batch)[case.output], expected)
