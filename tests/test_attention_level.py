"""The attention-only level: models whose layers are not known, over their real tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastencoder
from fastencoder.attention_level import VarlenAttention

from .attention_cases import CASES, AttentionCase
from .conformance import batches, measure

BAR = 1e-5
PATTERNS = (batches.RIGHT, batches.LEFT, batches.HOLES, batches.EMPTY, batches.SINGLE, batches.FULL)
AT_END = (batches.RIGHT, batches.EMPTY, batches.SINGLE, batches.FULL)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def varlen(model: Any) -> list[VarlenAttention]:
    return [module for module in model.modules() if isinstance(module, VarlenAttention)]


def counts(model: Any) -> tuple[int, int]:
    states = [module._fastencoder_attention for module in varlen(model)]
    return sum(state.fast_calls for state in states), sum(state.delegated_calls for state in states)


def reasons(model: Any) -> set[str | None]:
    return {module._fastencoder_attention.last_reason for module in varlen(model)}


@every_case
def test_real_tokens_of_every_kind_of_batch(case: AttentionCase) -> None:
    stock = case.build()
    exact, fast = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    fastencoder.to_fast(fast)
    assert len(varlen(fast)) == case.modules
    for pattern in AT_END if case.at_end_only else PATTERNS:
        mask = batches.mask(pattern, case.mask_size)
        batch, real = case.batch(stock, mask), case.real(stock, mask)
        before = counts(fast)
        ours = case.run(fast, batch)[case.output]
        theirs = case.run(exact, batch)[case.output]
        error = measure.error(ours[real], theirs[real])
        assert error <= BAR, f"{pattern}: relative error {error:.2e}"
        ran = counts(fast)[0] - before[0], counts(fast)[1] - before[1]
        runs = case.padding == "runs" or case.padding == "at end" and pattern in AT_END
        assert ran == ((case.modules, 0) if runs else (0, case.modules)), f"{pattern}: {ran}; {reasons(fast)}"
        assert torch.isfinite(ours).all()
