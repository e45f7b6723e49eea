"""Running a row's model and comparing two runs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from .batches import Batch
from .case import Case

FP32_BAR = 1e-5  # relative error of the fast fp32 model against the stock model in fp64


@torch.no_grad()
def run(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """One forward without gradients and without the warnings of the model's own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**batch.inputs, **more)


def last(case: Case, output: Any) -> torch.Tensor:
    """The hidden states that a row is judged by: [batch, tokens, hidden]; of several, the last."""
    value = output[case.outputs[0].split("+")[0]]
    return value[-1] if isinstance(value, (tuple, list)) else value


def pick(value: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The real tokens of [batch, tokens, ...]; everything, where the shape is another one than the mask's."""
    if real is None or value.shape[:2] != real.shape:
        return value
    return value[real]


def last_real(case: Case, output: Any, batch: Batch) -> torch.Tensor:
    """The real tokens of everything that a row is judged by ("a+b": two towers), in one tensor."""
    parts = []
    for name in case.outputs[0].split("+"):
        real = batch.meta.get("real_" + name, batch.real)
        values = output[name] if isinstance(output[name], (tuple, list)) else [output[name]]
        parts += [pick(value, real).flatten() for value in values]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN counts as infinite."""
    assert value.shape == reference.shape, f"shape {tuple(value.shape)} against {tuple(reference.shape)}"
    if reference.numel() == 0:
        return 0.0
    ratio = float((value.double() - reference.double()).norm() / reference.double().norm())
    return ratio if ratio == ratio else float("inf")


def double(case: Case, model: nn.Module) -> nn.Module:
    """The stock model to compare with: in fp64 where the stock code can run in it."""
    other = copy.deepcopy(model)
    return other if case.no_double else other.double()


def reference(case: Case, stock64: nn.Module, batch: Batch, **more: Any) -> Any:
    return run(stock64, batch if case.no_double else batch.to(torch.float64), **more)
