"""Outputs of a model by name, which of their values belong to real tokens, and how far two of them are from each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .inputs import Batch

#: Relative error that fp32 may always have, however exact stock is. 16-bit dtypes are held to stock's own error.
FLOOR = {torch.float32: 1e-5, torch.float64: 1e-5}
#: Of stock's own error in the same dtype: as much as the fast model may have.
FACTOR = 2.0

Outputs = dict[str, torch.Tensor]


def bound(dtype: torch.dtype, stock_error: float) -> float:
    """The largest error that is within rounding, for a dtype in which stock itself is `stock_error` away."""
    return max(FLOOR.get(dtype, 0.0), FACTOR * stock_error)


@torch.inference_mode()
def run(model: Any, batch: Batch, dtype: torch.dtype) -> Outputs:
    """Every floating tensor that a model returns for a batch, by name, with its values on the CPU in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(**batch.to(dtype, model.device))
    named = output if isinstance(output, Mapping) else {"output": output}
    return {name: value.detach().cpu().double() for name, value in _tensors(named)}


def _tensors(named: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in named.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, (tuple, list)):
            yield from _tensors({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}.")


def real_tokens(value: torch.Tensor, batch: Batch) -> torch.Tensor | None:
    """`[N, ...]`: the real tokens of `[B, S, ...]` or `[S, B, ...]`; all positions of an input without padding, and of a
    tensor of another shape None, since nothing says which of its positions are real."""
    if batch.real is None:
        return value.reshape(-1, value.shape[-1])
    if value.shape[:2] == batch.real.shape:
        return value[batch.real]
    if value.shape[:2] == batch.real.T.shape:
        return value.transpose(0, 1)[batch.real]
    return None


def real_rows(value: torch.Tensor, batch: Batch) -> torch.Tensor | None:
    """What of a model's output depends on real tokens alone: of an answer for each sequence (`[B, C]`, or `[B, T, C]` of a
    decoder) the sequences that begin with a real token, since poolers take the first position; else as `real_tokens`."""
    if batch.real is None or value.dim() == 0:
        return value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)
    rows = batch.real[:, 0]
    of_decoder = batch.inputs.get("decoder_input_ids")
    if value.shape == (len(rows), len(rows)):  # every text with every text or image
        return value[rows][:, rows]
    if value.shape[0] == len(rows) and (value.dim() == 2 and value.shape != batch.real.shape):
        return value[rows]
    if of_decoder is not None and value.shape[:2] == of_decoder.shape:
        return value[rows].flatten(0, 1)
    return real_tokens(value, batch)


def error(values: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest relative error of any row of `[N, D]`: norm of the difference over norm of the reference, or over the mean
    norm of all rows where that is larger. A NaN or an infinity on either side is an infinite error."""
    if values.shape != reference.shape:
        return math.inf
    if not values.numel():
        return 0.0
    values, reference = (tensor.reshape(len(tensor), -1) for tensor in (values, reference))
    if values.shape[1] == 1:  # of single numbers, all together
        values, reference = values.T, reference.T
    if not (torch.isfinite(values).all() and torch.isfinite(reference).all()):
        return math.inf
    sizes = reference.norm(dim=1)
    difference = (values - reference).norm(dim=1)
    return float(torch.where(difference == 0, difference, difference / sizes.clamp(min=float(sizes.mean()))).max())


def errors_of(outputs: Sequence[Outputs], reference: Sequence[Outputs], batches: Sequence[Batch]) -> dict[str, float]:
    """The largest error of each output over all batches; an output that is missing in one of the two is infinitely wrong,
    and one that cannot be told apart from padding in any batch is left out."""
    found: dict[str, float] = {}
    for ours, theirs, batch in zip(outputs, reference, batches, strict=True):
        for name in theirs.keys() | ours.keys():
            if name not in theirs or name not in ours:
                found[name] = math.inf
                continue
            a, b = real_rows(ours[name], batch), real_rows(theirs[name], batch)
            if a is not None and b is not None:
                found[name] = max(found.get(name, 0.0), error(a, b))
    return dict(sorted(found.items()))
