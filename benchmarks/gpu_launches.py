"""Part "launches": how often a forward launches a kernel, and how often it waits for the device."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import models
from benchmarks.common import DTYPES
from benchmarks.gpu_judge import not_available
from benchmarks.models import Model, cast, hidden, ragged
from benchmarks.store import Row
from fastencoder import to_fast

MOST_LAUNCHES, MOST_SYNCS = 7, 1  # a layer, and a forward
DEPTHS = (2, 4)  # layers; the difference between them leaves out what is done once a forward
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
_DEPTH = {"text": "num_hidden_layers", "image": "num_hidden_layers"}


@torch.inference_mode()
def count(model: Model, device: torch.device, quick: bool, cuda_graphs: bool) -> dict[str, Any]:
    """Launches and synchronisations of one forward of a ragged batch, for two depths of the model."""
    if device.type != "cuda":
        return not_available("launches are counted on a CUDA device")
    if cuda_graphs and "cuda_graphs" not in inspect.signature(to_fast).parameters:
        return not_available("to_fast has no cuda_graphs")
    shallow, deep = (_one_depth(model, depth, device, quick, cuda_graphs) for depth in DEPTHS)
    each = (deep["kernels"] - shallow["kernels"]) / (DEPTHS[1] - DEPTHS[0])
    why = []
    if each > MOST_LAUNCHES:
        why.append(f"{each:g} kernels a layer, {MOST_LAUNCHES} are allowed")
    if deep["waits"] > MOST_SYNCS:
        why.append(f"{deep['waits']} waits a forward, {MOST_SYNCS} is allowed")
    # Too many of them make nothing wrong: it is said, and the row passes.
    found = {"passed": True, "launches_a_layer": each, "launches_a_forward": deep["kernels"], "layers": DEPTHS[1]}
    return found | {"host_calls": deep["calls"], "syncs_a_forward": deep["waits"], "above_the_bar": "; ".join(why)}


def _one_depth(model: Model, depth: int, device: torch.device, quick: bool, cuda_graphs: bool) -> dict[str, int]:
    with torch.inference_mode(False), torch.no_grad():
        shallow = replace(model, config={**model.config, _DEPTH[model.kind]: depth})
        options = {"cuda_graphs": True} if cuda_graphs else {}
        fast = to_fast(shallow.make(quick).to(device=device, dtype=DTYPES["bf16"]), **options)
    inputs = cast(ragged(fast, model.kind, quick, device)[0], DTYPES["bf16"])
    for _ in range(4):
        hidden(fast, inputs)
    torch.cuda.synchronize()
    # The stock parts of the model are in both counts. The difference in depth leaves their launches out; a wait of theirs
    # counts, because a user waits for it too.
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        hidden(fast, inputs)
    events = profiler.events()
    on_device = [event.name for event in events if event.device_type == DeviceType.CUDA]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hidden(fast, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    warned = sum("synchroniz" in str(warning.message) for warning in caught)
    return {
        "kernels": sum(not name.startswith(("Memcpy", "Memset")) for name in on_device),
        "calls": sum(event.name in _LAUNCHES for event in events),
        "waits": max(warned, sum(event.name in _WAITS for event in events)),
    }


def rows(device: torch.device, quick: bool, deadline: float) -> list[Row]:
    """BERT and ViT, launched one by one and from graphs."""
    return [
        Row(f"{model.name}{' CUDA graphs' * graphs}", partial(count, model, device, quick, graphs))
        for model in (models.BERT_BASE, models.VIT_BASE)
        for graphs in (False, True)
    ]
