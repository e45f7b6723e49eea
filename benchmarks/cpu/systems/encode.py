"""`SentenceTransformer.encode` on texts, from strings to embeddings, in every backend and converted by fastencoder."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cpu.systems import ENCODE_BATCH, Arrays, Engine, Source
from benchmarks.cpu.systems.sentence import load
from benchmarks.cpu.systems.stock import DTYPES


def prepare(
    source: Source,
    dtype: str,
    threads: int,
    backend: str = "torch",
    precision: str = "",
    convert: dict[str, Any] | None = None,
    unpad: bool = False,
) -> Engine:
    """`precision` is the dtype where it is not the cell's; `convert` are the arguments of `to_fast`, or None for stock."""
    model = load(source, precision or dtype, threads, backend)
    if convert is not None:
        from fastencoder import to_fast

        to_fast(model, **{name: DTYPES.get(value, value) for name, value in convert.items()})
        model[0].unpad_inputs = unpad or None

    def run(texts: list[str]) -> np.ndarray:
        return model.encode(texts, batch_size=ENCODE_BATCH, convert_to_numpy=True, show_progress_bar=False)

    def inputs(arrays: Arrays) -> list[str]:
        return [str(text) for text in arrays["texts"]]

    return Engine(inputs, run, lambda answer: np.asarray(answer, dtype=np.float32))
