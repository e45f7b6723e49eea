"""The whole path of a CUDA device, in Triton's interpreter: answers, launches of a layer, and waits of a forward."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from kernel_testing import TRITON_DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from fastencoder import kernels, to_fast
from fastencoder.kernels._triton import Launch
from fastencoder.layers.stack import Stack
from tests import tiny

pytestmark = pytest.mark.skipif(TRITON_DEVICE == "cuda", reason="without an interpreter nothing here is a stand-in")

# Memory that is not filled; `fill_` is the poison of these tests.
_NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "fill_", "detach_"}
_WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "unique_consecutive", "masked_select"}
_READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu")


class _Counter(TorchDispatchMode):
    """Counts what a CUDA device would launch, and how often the host would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._interpreting = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        output = function(*args, **(kwargs or {}))
        if not self._interpreting:
            if name in _WAITS:
                self.waits[name] += 1
            elif name not in _NO_LAUNCH and (name.endswith("_") or not _is_view(output, args)):
                self.launches[name] += 1
        return output

    @contextlib.contextmanager
    def counting(self):
        run = Launch.run

        def counted(launch, device):
            self.launches[launch.kernel.__name__] += 1
            self._interpreting = True
            try:
                run(launch, device)
            finally:
                self._interpreting = False

        def read(name):
            original = getattr(torch.Tensor, name)

            def counted_read(tensor, *args, **kwargs):
                self.waits[name] += not self._interpreting
                return original(tensor, *args, **kwargs)

            return counted_read

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(Launch, "run", counted)
            for name in _READS:
                patch.setattr(torch.Tensor, name, read(name))
            yield self


def _is_view(output, args) -> bool:
    """Whether an operation only looks at its input in another way, or has nothing to do."""
    (first,) = {x.untyped_storage().data_ptr() for x in args[:1] if isinstance(x, torch.Tensor)} or {None}
    outputs = output if isinstance(output, list | tuple) else [output]
    return all(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == first for x in outputs)


def _encoder_input(model, batch):
    """The module that runs the layers, and what it is called with."""
    owner = next(module for module in model.modules() if Stack.installed(module))
    seen = {}
    handle = owner.register_forward_pre_hook(lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True)
    with torch.inference_mode():
        model(**batch)
    handle.remove()
    return owner, seen["args"], seen["kwargs"]


def _count(model, batch) -> _Counter:
    counter = _Counter()
    with torch.inference_mode(), kernels.implementation("cuda"):
        model(**batch)  # once before: weights are joined, layers are checked
        owner, args, kwargs = _encoder_input(model, batch)
        with counter.counting():
            owner(*args, **kwargs)
    assert tiny.calls(model)[1] == 0, tiny.reasons(model)
    return counter


@pytest.mark.parametrize("make, batch", [
    (tiny.bert, tiny.ragged()),
    (tiny.vit, {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}),
], ids=["post-LN", "pre-LN"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_launches_of_a_layer_and_waits_of_a_forward(make, batch, dtype):
    """Two models that differ in the number of layers tell what a layer launches and what happens once."""
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    one, two = (_count(to_fast(make(num_hidden_layers=layers).to(dtype)), batch) for layers in (1, 2))
    of_a_layer = two.launches.total() - one.launches.total()
    # float32 without TF32 uses the vendor's GEMM, whose epilogue is another launch.
    assert of_a_layer <= (7 if dtype == torch.float16 else 9), two.launches
    if "input_ids" in batch:  # the mask (twice: it has memory for every query), the positions of its tokens, pack, unpack
        assert one.launches.total() - of_a_layer <= 5, one.launches
    assert one.waits == two.waits
    assert two.waits.total() <= ("input_ids" in batch), two.waits


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, None)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("make", [tiny.bert, tiny.vit], ids=["post-LN", "pre-LN"])
def test_the_same_answers(make, dtype, bound):
    batch = tiny.ragged() if make is tiny.bert else {"pixel_values": torch.randn(3, 3, 32, 32)}
    mask = batch.get("attention_mask")
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    with torch.inference_mode():
        expected = make().double()(**{n: v.double() if v.is_floating_point() else v for n, v in batch.items()})
        stock = make().to(dtype)(**half).last_hidden_state
        model = to_fast(make().to(dtype))
        with kernels.implementation("cuda"):
            ours = model(**half).last_hidden_state
    assert tiny.calls(model) == (3, 0), tiny.reasons(model)
    bound = bound or 2 * tiny.relative_error(stock, expected.last_hidden_state, mask)
    assert tiny.relative_error(ours, expected.last_hidden_state, mask) <= bound
    if mask is not None:
        assert not ours[~mask.bool()].any()
