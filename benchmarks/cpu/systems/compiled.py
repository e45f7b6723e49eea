"""torch.compile of the stock model, for the very shape or for any."""

from __future__ import annotations

import torch

from benchmarks.cpu.systems import Engine, Source
from benchmarks.cpu.systems.stock import load, tensors, to_numpy


def prepare(source: Source, dtype: str, threads: int, dynamic: bool) -> Engine:
    torch._dynamo.config.recompile_limit = 64  # every shape is one more
    model = load(source.folder, dtype)
    compiled = torch.compile(model, dynamic=dynamic)
    notes = {"attention": model.config._attn_implementation}
    return Engine(
        lambda arrays: tensors(arrays, dtype), lambda inputs: compiled(**inputs).last_hidden_state, to_numpy, notes
    )
