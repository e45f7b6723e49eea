"""transformers as it is, with eager or sdpa attention, and what a careful user does by hand: sort by length, run in parts."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.cpu.systems import Arrays, Engine, NotAvailable, Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PADDING = 0.15  # of a part, at most
Inputs = dict[str, torch.Tensor]


def load(folder: Path, dtype: str, attention: str | None = None) -> Any:
    """The model in evaluation mode, without a pooler: what is compared are the hidden states, and exporters drop what leads
    nowhere. `attention` is transformers' default for the class if it is not given.

    Raises:
        NotAvailable: the class has no such attention.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    cls = getattr(transformers, named)
    chosen: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if "add_pooling_layer" in inspect.signature(cls).parameters:
        chosen["add_pooling_layer"] = False
    try:
        model = cls.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True, **chosen)
    except ValueError as error:
        if attention and "scaled_dot_product_attention" in str(error):
            raise NotAvailable(f"{named} has no {attention} attention in transformers") from None
        raise
    return model.eval()


def tensors(arrays: Arrays, dtype: str) -> Inputs:
    """The same as tensors; floating ones in the model's dtype."""
    made = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: x.to(DTYPES[dtype]) if x.is_floating_point() else x for name, x in made.items()}


def to_numpy(hidden: torch.Tensor) -> np.ndarray:
    """In float32."""
    return hidden.detach().float().numpy()


def parts(lengths: list[int]) -> list[list[int]]:
    """Rows in the order of their lengths, cut where a part would hold more than 15 % padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    made: list[list[int]] = []
    for row in order:
        if made:
            total = sum(lengths[other] for other in made[-1]) + lengths[row]
            if 1 - total / ((len(made[-1]) + 1) * lengths[row]) <= _PADDING:
                made[-1].append(row)
                continue
        made.append([row])
    return made


def run_sorted(model: Any, inputs: Inputs) -> torch.Tensor:
    """The last hidden state, zero at padding, computed part by part."""
    mask = inputs["attention_mask"]
    lengths = mask.sum(1).tolist()
    hidden: torch.Tensor | None = None
    for rows in parts(lengths):
        longest = max(lengths[row] for row in rows)
        index = torch.tensor(rows)
        part = {name: x[index, :longest] for name, x in inputs.items()}
        out = model(**part).last_hidden_state
        if hidden is None:
            hidden = out.new_zeros(*mask.shape, out.shape[-1])
        hidden[index, :longest] = out
    assert hidden is not None
    return hidden


def prepare(source: Source, dtype: str, threads: int, attention: str, sort: bool = False) -> Engine:
    if sort and source.kind != "text":
        raise NotAvailable("only texts are sorted by length")
    try:
        model = load(source.folder, dtype, attention)
    except NotAvailable:
        if not sort:
            raise
        model = load(source.folder, dtype)  # sorting helps with any attention
    run = (lambda inputs: run_sorted(model, inputs)) if sort else (lambda inputs: model(**inputs).last_hidden_state)
    notes = {"attention": model.config._attn_implementation}
    return Engine(lambda arrays: tensors(arrays, dtype), run, to_numpy, notes)
