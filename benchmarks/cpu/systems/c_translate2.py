"""CTranslate2's encoder, converted from the saved model."""

from __future__ import annotations

from typing import Any

import ctranslate2
import numpy as np

from benchmarks.cpu.systems import Arrays, Engine, NotAvailable, Source
from benchmarks.cpu.systems.exported import get

_TYPES = {"fp32": "float32", "bf16": "bfloat16"}


def prepare(source: Source, dtype: str, threads: int) -> Engine:
    known = ctranslate2.get_supported_compute_types("cpu")
    if _TYPES[dtype] not in known:
        raise NotAvailable(f"no {dtype} on this CPU; it has {', '.join(sorted(known))}")
    if source.kind != "text":
        raise NotAvailable("only text encoders are converted")
    folder = get(source, "ctranslate2").parent
    encoder = ctranslate2.Encoder(str(folder), compute_type=_TYPES[dtype], inter_threads=1, intra_threads=threads)

    def inputs(arrays: Arrays) -> tuple[list[np.ndarray], list[Any]]:
        both = (arrays["input_ids"], arrays["attention_mask"].sum(1))
        kept = [np.ascontiguousarray(array, dtype=np.int32) for array in both]  # a view does not keep its array alive
        return kept, [ctranslate2.StorageView.from_array(array) for array in kept]

    def run(given: tuple[list[np.ndarray], list[Any]]) -> Any:
        return encoder.forward_batch(*given[1]).last_hidden_state

    return Engine(inputs, run, lambda hidden: np.array(hidden.to(ctranslate2.DataType.float32)))
