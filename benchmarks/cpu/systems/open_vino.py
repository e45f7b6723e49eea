"""OpenVINO, compiled for any shape or for the very shape of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino

from benchmarks.cpu.systems import Arrays, Engine, Source
from benchmarks.cpu.systems.exported import get

Prepared = tuple[Any, list[np.ndarray]]


def prepare(source: Source, dtype: str, threads: int, static: bool) -> Engine:
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",  # one stream with all threads: one caller, who waits
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
    }
    path = get(source, "openvino")
    dynamic = None if static else core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()

    def inputs(arrays: Arrays) -> Prepared:
        given = list(arrays.values())  # in the order in which the model was traced
        if dynamic is not None:
            return dynamic, given
        model = core.read_model(path)
        model.reshape({port: array.shape for port, array in zip(model.inputs, given, strict=True)})
        return core.compile_model(model, "CPU", settings).create_infer_request(), given

    def run(prepared: Prepared) -> Any:
        request, given = prepared
        return request.infer(given, share_inputs=True, share_outputs=True)[0]

    return Engine(inputs, run, lambda hidden: np.array(hidden, dtype=np.float32))
