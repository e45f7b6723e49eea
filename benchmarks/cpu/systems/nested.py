"""`torch.nn.TransformerEncoder` with its nested fast path, which is what BetterTransformer put into models."""

from __future__ import annotations

import torch

from benchmarks import nested
from benchmarks.cpu.systems import Engine, NotAvailable, Source
from benchmarks.cpu.systems.stock import load, tensors, to_numpy


def prepare(source: Source, dtype: str, threads: int) -> Engine:
    bert = load(source.folder, dtype)
    if bert.config.model_type != "bert":
        raise NotAvailable(nested.ONLY_BERT)
    with torch.inference_mode(False), torch.no_grad():
        model = nested.Nested(bert)

    def inputs(arrays: dict) -> dict[str, torch.Tensor]:
        made = tensors(arrays, dtype)
        if bool(made["attention_mask"].all()):  # it would only be read
            del made["attention_mask"]
        return made

    return Engine(inputs, model, to_numpy)
