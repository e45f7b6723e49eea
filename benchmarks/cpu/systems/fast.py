"""fastencoder, and beside it the bare GEMMs of the same model: the limit of what any system on these cores can reach."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cpu.systems import Engine, NotAvailable, Source
from benchmarks.cpu.systems.stock import DTYPES, load, tensors, to_numpy
from fastencoder import explain, to_fast

_IN_A_LAYER = re.compile(r"\.\d+\.")  # encoder.layer.3.output.dense, but not pooler.dense


def prepare(source: Source, dtype: str, threads: int, arguments: dict[str, str] | None = None) -> Engine:
    arguments = arguments or {}
    unknown = [name for name in arguments if name not in inspect.signature(to_fast).parameters]
    if unknown:
        raise NotAvailable(f"to_fast has no {', '.join(unknown)}")
    given: dict[str, Any] = {name: DTYPES.get(value, value) for name, value in arguments.items()}
    stored = "fp32" if "compute_dtype" in given else dtype
    model = load(source.folder, stored)
    beside: dict[str, Callable[[list[int]], Callable[[], object]]] = {}
    weights = layer_weights(model)
    parameters = sum(weight.numel() for weight in weights)
    if not arguments:  # once is enough
        beside["gemm"] = lambda lengths: gemms(weights, sum(lengths))
    to_fast(model, **given)
    report = explain(model)
    layers = sorted({row.level for row in report if row.status == "eligible"})
    notes = {
        "extra_bytes": report.extra_bytes,
        "level": ", ".join(layers),
        "layer_weights": parameters,
        "hidden_size": model.config.hidden_size,
        "layers": model.config.num_hidden_layers,
    }
    return Engine(
        lambda arrays: tensors(arrays, stored),
        lambda inputs: model(**inputs).last_hidden_state,
        to_numpy,
        notes,
        beside,
    )


def layer_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """The weights `[out, in]` of the linears inside layers, in their order."""
    return [
        module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and _IN_A_LAYER.search(f".{name}.")
    ]


def gemms(weights: list[torch.Tensor], tokens: int) -> Callable[[], object]:
    """A call that multiplies `[tokens, in]` by every one of the weights, and does nothing else."""
    sizes = {weight.shape[1] for weight in weights}
    inputs = {size: torch.randn(tokens, size).to(weights[0].dtype) for size in sizes}

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return run
