"""What may not change an answer in the default mode: the order of a batch, its neighbours, its padding, where it is split.

With `batch_invariant=True` none of these changes a bit: `test_batch_invariant.py`.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from fastencoder import to_fast
from fastencoder.kernels import native

from . import tiny
from .text_models import MODELS, answers, texts

# Of the norm of an answer: some roundings in another order.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-2}
TEXTS = texts(12, 60, 99, seed=1)
ISAS = native.ISAS[: native.best + 1]


@cache
def _fast(name: str, dtype: torch.dtype) -> nn.Module:
    return to_fast(MODELS[name]().to(dtype))


def _compare(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]], bound: float) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        for value, reference in zip(mine, yours, strict=True):
            assert tiny.relative_error(value, reference) <= bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_rest_of_a_batch(name: str, dtype: torch.dtype, isa: str) -> None:
    model, bound = _fast(name, dtype), BOUNDS[dtype]
    with native.isa(isa):
        together = answers(model, TEXTS, 60)
        _compare(answers(model, TEXTS[:5], 60) + answers(model, TEXTS[5:], 60), together, bound)  # split
        _compare(answers(model, TEXTS, 64), together, bound)  # padded more
        _compare(answers(model, [*TEXTS, TEXTS[3][:7]], 60)[:-1], together, bound)  # with a neighbour
        _compare([answers(model, [text], len(text))[0] for text in TEXTS], together, bound)  # each by itself
        back = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(2)).tolist()
        permuted = answers(model, [TEXTS[i] for i in back], 60)
        _compare(permuted, [together[i] for i in back], bound)


@pytest.mark.skipif(native.best < 2, reason="takes the extension and AVX-512")
@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_batch_has_permuted_bits(name: str) -> None:
    model = _fast(name, torch.float32)
    together = answers(model, TEXTS, 60)
    for seed in range(5):
        order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(seed)).tolist()
        for position, answer in zip(order, answers(model, [TEXTS[i] for i in order], 60), strict=True):
            assert torch.equal(answer[0], together[position][0])


def test_a_neighbour_that_leaks_is_seen() -> None:
    """So that the bound of float32 is known to be narrow enough: one other token in a text of 60 is far outside of it."""
    model = _fast("bert", torch.float32)
    together = answers(model, TEXTS, 60)
    changed = [text.clone() for text in TEXTS]
    longest = max(changed, key=len)
    longest[-1] = 5 if longest[-1] != 5 else 6
    with pytest.raises(AssertionError):
        _compare(answers(copy.deepcopy(model), changed, 60), together, 1000 * BOUNDS[torch.float32])
