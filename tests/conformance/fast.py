"""A row's models, stock and fast, built once; and what the tests need to know about fast layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import pytest
from torch import nn

import fastencoder

from . import batches, measure
from . import case as case_module
from .case import Absent, Case
from .cases import BY_ID


@dataclass
class Models:
    """Nobody changes these: tests that do make copies."""

    case: Case
    stock: nn.Module  # fp32
    exact: nn.Module  # the stock model in fp64, where it can run in it
    fast: nn.Module  # a converted copy of `stock`


@cache
def _stock(case_id: str) -> tuple[nn.Module, nn.Module]:
    case = BY_ID[case_id]
    stock = case_module.build(case)
    return stock, measure.double(case, stock)


@cache
def _fast(case_id: str) -> nn.Module:
    return fastencoder.to_fast(copy.deepcopy(_stock(case_id)[0]))


def stock_of(case: Case) -> nn.Module:
    try:
        return _stock(case.id)[0]
    except Absent as absent:
        pytest.skip(str(absent))


def models_of(case: Case) -> Models:
    stock = stock_of(case)
    return Models(case, stock, _stock(case.id)[1], _fast(case.id))


def calls(model: nn.Module) -> tuple[int, int]:
    """How many layer calls ran fused, and how many ran the original forward, since the conversion."""
    states = [module._fastencoder for module in model.modules() if hasattr(module, "_fastencoder")]
    return sum(state.fast_calls for state in states), sum(state.delegated_calls for state in states)


def calls_of(case: Case, model: nn.Module) -> tuple[int, int]:
    """The same for the layers of the row's class alone: a model may have other fast layers."""
    own = [layer for layer in model.modules() if getattr(layer, "original_class", None) is case.layer_class()]
    states = [layer._fastencoder for layer in own]
    return sum(state.fast_calls for state in states), sum(state.delegated_calls for state in states)


def reasons(model: nn.Module) -> set[str]:
    """Why layers of this model last ran their original forward."""
    states = [module._fastencoder for module in model.modules() if hasattr(module, "_fastencoder")]
    return {state.last_reason for state in states if state.last_reason}


def layer_calls(case: Case, model: nn.Module) -> int:
    """How many times one forward of the model calls a layer of the stack."""
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [layer.register_forward_hook(hook) for layer in case.layers(model)]
    measure.run(model, batches.build(case, model, batches.patterns(case)[0]))
    for handle in handles:
        handle.remove()
    return count
