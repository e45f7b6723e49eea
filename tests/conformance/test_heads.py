"""Models with heads, as users have them: every output of the fast model against the stock model in fp64.

Which heads there are is asked of transformers' own tables, by model type: a new row of an encoder brings its heads along.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fastencoder

from . import heads, measure
from .case import DELEGATES
from .fast import calls, reasons
from .heads_setups import NOT_BUILT, NOT_RUN, SETUPS

TABLE = heads.table()
NEWEST = "5.23.0"
WRITTEN = [head for head in TABLE if not heads.has_reason(head, NOT_BUILT)]
BUILT = [head for head in WRITTEN if head.case or {head.model, head.model_type} & set(SETUPS)]
RUN = [head for head in BUILT if not heads.has_reason(head, NOT_RUN)]


def _ids(chosen: list[heads.Head]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("head", chosen, ids=lambda head: head.id)


@_ids(RUN)
def test_every_output_of_a_head(head: heads.Head) -> None:
    stock = heads.build(head)
    fast = fastencoder.to_fast(copy.deepcopy(stock))
    batch = heads.batch(head, stock)
    keeps = head.setup.no_double or (head.case.no_double if head.case else "")
    exact = heads.answer(head, stock, batch) if keeps else heads.answer(head, stock.double(), batch.to(torch.float64))
    ours = heads.answer(head, fast, batch)
    assert exact and ours.keys() == exact.keys()
    for name in exact.keys() - set(batch.meta.get("unread", ())):
        expected = measure.pick(exact[name], batch.real)
        error, bar = measure.error(measure.pick(ours[name], batch.real), expected), measure.FP32_BAR
        if error > bar:  # a head that amplifies every rounding amplifies those of the stock model, too
            stock32 = heads.answer(head, heads.build(head), batch)[name]
            bar = 3 * measure.error(measure.pick(stock32, batch.real), expected)
        assert error <= bar, f"{name}: relative error {error:.2e}, bar {bar:.2e}"
    ran_fast, delegated = calls(fast)
    if head.case is not None and not head.setup.delegates:
        padded = (head.case.padding_delegates or head.kind == "CTC") and batch.real is not None
        assert (delegated > 0) == (padded or head.case.expect == DELEGATES), reasons(fast)
        assert (ran_fast > 0) == (not delegated)
    elif head.setup.delegates:
        assert delegated > 0 and all(head.setup.delegates in reason for reason in reasons(fast)), reasons(fast)
    else:
        assert ran_fast > 0 and delegated == 0, reasons(fast)


@_ids([head for head in BUILT if head not in RUN])
def test_what_is_not_run_cannot_be(head: heads.Head) -> None:
    """A reason that no longer holds has to go."""
    with pytest.raises(Exception) as caught:
        heads.build(head)
    assert heads.has_reason(head, NOT_RUN) in f"{type(caught.value).__name__}: {caught.value}"


def test_every_head_is_run_or_has_a_reason() -> None:
    missing = {head.id for head in WRITTEN if head not in BUILT}
    assert not missing, "give a setup or a reason in heads_setups.py"


def test_no_setup_and_no_reason_is_stale() -> None:
    if transformers.__version__ != NEWEST:
        pytest.skip("other releases have fewer models")
    known = {head.model for head in TABLE} | {head.model_type for head in TABLE}
    assert {*SETUPS, *NOT_RUN, *NOT_BUILT} <= known
    assert not {*SETUPS} & {*NOT_BUILT}


def test_there_are_many() -> None:
    """The tables of transformers were found, and the rows in them."""
    assert len({head.kind for head in RUN}) > 22
    assert len(RUN) > 250
