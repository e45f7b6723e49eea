"""`verify(model, batches)`: every fast layer by itself, and the whole model, beside stock in the most exact dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import explain, to_fast
from ..layers.settings import Memory
from ..report import LayerRow
from .compare import Outputs, bound, errors_of, real_tokens, run
from .compare import error as error_of
from .inputs import Batch
from .layers import Calls, counts, record, reference_of, with_hidden_states_of
from .machine import machine, versions
from .verification import Compared, Left, Verification

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
#: Models that run each batch, one after the other: what `step` is called for.
SIDES = ("the reference", "stock", "fast")

Step = Callable[[str], None]


def verify(
    model: Any,
    batches: Sequence[Batch],
    *,
    compute_dtype: torch.dtype | None = None,
    memory: Memory = "default",
    step: Step = lambda what: None,
) -> Verification:
    """Compares a converted copy of a model with the model itself.

    Args:
        model: a stock model of transformers in evaluation mode, on the device to check on. It is not changed.
        batches: what to run: `ragged(model)`, say.
        compute_dtype, memory: as for `to_fast`. Layers that are refused stay as they are, and are listed.
        step: called before each batch of each of the three `SIDES`.
    """
    rows = list(explain(model, compute_dtype=compute_dtype, memory=memory))
    chosen = {row.name: row for row in rows if row.status == "eligible"}
    left = tuple(
        Left(row.name, _short(row), row.status, "; ".join(row.reasons)) for row in rows if row.name not in chosen
    )
    about = _about(model, compute_dtype, memory)
    sizes = tuple(f"{batch.name} ({batch.rows} x, {batch.tokens} real tokens)" for batch in batches)
    if not chosen:
        return Verification(about, sizes, (), (), left)

    own: torch.dtype = model.dtype
    reference, exact = reference_of(model, batches[0])
    about["reference"] = f"stock in {NAMES[exact]}"
    expected = [_both(reference, chosen, batch, exact, None, step, SIDES[0]) for batch in batches]
    del reference
    given = [calls for _, calls in expected]

    # Stock computes in 16 bits what the fast layers do, so it is asked in each dtype that one of them has.
    dtypes = {name: _dtype(row, own) for name, row in chosen.items()}
    stock_layers: dict[str, float] = {}
    stock_outputs: dict[str, float] = {}
    lowest = min(dtypes.values(), key=lambda dtype: (dtype.itemsize, dtype == torch.float16))
    for dtype in dict.fromkeys(dtypes.values()):
        peer = copy.deepcopy(model).to(dtype)
        got = [
            _both(peer, chosen, batch, dtype, calls, step, SIDES[1])
            for batch, calls in zip(batches, given, strict=True)
        ]
        errors = _errors_of_layers(got, expected, batches)
        stock_layers |= {name: errors.get(name, 0.0) for name, its in dtypes.items() if its == dtype}
        if dtype == lowest:
            stock_outputs = errors_of([o for o, _ in got], [o for o, _ in expected], batches)

    fast = to_fast(copy.deepcopy(model), strict=False, compute_dtype=compute_dtype, memory=memory)
    got = [_both(fast, chosen, batch, own, calls, step, SIDES[2]) for batch, calls in zip(batches, given, strict=True)]
    layer_errors = _errors_of_layers(got, expected, batches)
    output_errors = errors_of([o for o, _ in got], [o for o, _ in expected], batches)
    ran = counts(fast, chosen)

    layers = []
    for name, row in chosen.items():
        dtype, stock = dtypes[name], stock_layers.get(name, 0.0)
        its_error = layer_errors.get(name, 0.0)
        limit = bound(dtype, stock)
        numbers = (NAMES[dtype], its_error, stock, limit, *ran[name][:2], ran[name][2] or "")
        layers.append(Compared(name, _short(row), row.level or "", *numbers))
    outputs = []
    for name, its_error in output_errors.items():
        stock = stock_outputs.get(name, 0.0)
        outputs.append(Compared(name, "", "", NAMES[lowest], its_error, stock, bound(lowest, stock)))
    return Verification(about, sizes, tuple(layers), tuple(outputs), left)


def _both(
    model: Any, names: Any, batch: Batch, dtype: torch.dtype, given: Calls | None, step: Step, side: str
) -> tuple[Outputs, Calls]:
    """The outputs of a forward that nobody watches, and what each layer did in one that was watched."""
    step(f"{side}: {batch.name}")
    outputs = run(model, batch, dtype)
    if given is None:
        return outputs, record(model, list(names), batch, dtype)
    return outputs, with_hidden_states_of(given, model, batch, dtype)


def _errors_of_layers(
    got: Sequence[tuple[Outputs, Calls]], expected: Sequence[tuple[Outputs, Calls]], batches: Sequence[Batch]
) -> dict[str, float]:
    """The largest error of each layer over all of its calls. A layer that was called less often is infinitely wrong."""
    found: dict[str, float] = {}
    for (_, ours), (_, theirs), batch in zip(got, expected, batches, strict=True):
        for name, calls in theirs.items():
            if len(ours.get(name, ())) != len(calls):
                found[name] = float("inf")
                continue
            for mine, its in zip(ours[name], calls, strict=True):
                a, b = real_tokens(mine.left, batch), real_tokens(its.left, batch)
                if a is not None and b is not None:
                    found[name] = max(found.get(name, 0.0), error_of(a, b))
    return found


def _about(model: Any, compute_dtype: torch.dtype | None, memory: str) -> dict[str, str]:
    settings = [f"dtype {NAMES.get(model.dtype, str(model.dtype))}"]
    if compute_dtype is not None:
        settings.append(f"compute_dtype {NAMES[compute_dtype]}")
    return {
        "model": f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters",
        "settings": ", ".join([*settings, f"memory {memory}"]),
        "stock attention": str(getattr(model.config, "_attn_implementation", "?")),
        "machine": machine(model.device),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _dtype(row: LayerRow, own: torch.dtype) -> torch.dtype:
    """What a layer computes in; its own dtype where only its attention is fast."""
    dtype: torch.dtype = getattr(torch, row.compute_dtype) if row.compute_dtype else own
    return dtype


def _short(row: LayerRow) -> str:
    return row.layer_class.rpartition(".")[2]
