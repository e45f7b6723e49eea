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
from fastencoder.kernels import native

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
        if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):  # not in every build of torch
            beside["packed gemm"] = lambda lengths: packed_gemms(weights, sum(lengths), DTYPES[dtype])
            if dtype == "bf16":  # which is slower than fp32 where the processor does not multiply it
                beside["packed fp32 gemm"] = lambda lengths: packed_gemms(weights, sum(lengths), torch.float32)
    to_fast(model, **given)
    report = explain(model)
    layers = sorted({row.level for row in report if row.status == "eligible"})
    notes = {
        "extra_bytes": report.extra_bytes,
        "extension": native.ISAS[native.best],
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
    inputs = _inputs(weights, tokens)

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return run


def packed_gemms(weights: list[torch.Tensor], tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    """The same products in this dtype, with weights in oneDNN's own order, which saves ordering them in every call.

    One weight of each shape stands for all, so that the process does not hold the model twice.
    """
    inputs = {size: x.to(dtype) for size, x in _inputs(weights, tokens).items()}
    packed = {
        weight.shape: _packed(weight.to(dtype)) for weight in {weight.shape: weight for weight in weights}.values()
    }

    def run() -> None:
        for weight in weights:
            torch.ops.mkldnn._linear_pointwise(inputs[weight.shape[1]], packed[weight.shape], None, "none", [], "")

    return run


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def _inputs(weights: list[torch.Tensor], tokens: int) -> dict[int, torch.Tensor]:
    return {size: torch.randn(tokens, size).to(weights[0].dtype) for size in {weight.shape[1] for weight in weights}}
