"""ONNX Runtime, as exported and after its optimiser for transformers (fused attention, GELU, residual norms)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.cpu.systems import Arrays, Engine, Source
from benchmarks.cpu.systems.exported import get


def prepare(source: Source, dtype: str, threads: int, optimise: bool = False) -> Engine:
    path = get(source, "onnx-optimised" if optimise else "onnx")
    notes: dict[str, Any] = {}
    if optimise:
        notes["fused"] = json.loads(path.with_name("fused.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    narrow = {node.name for node in session.get_inputs() if "int32" in node.type}

    def inputs(arrays: Arrays) -> Arrays:
        names = [node.name for node in session.get_inputs()]
        return {name: arrays[name].astype(np.int32) if name in narrow else arrays[name] for name in names}

    return Engine(inputs, lambda feed: session.run(None, feed)[0], lambda hidden: hidden, notes)
