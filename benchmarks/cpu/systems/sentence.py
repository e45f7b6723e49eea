"""sentence-transformers with its backends: pooled, normalised embeddings from the same token ids."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from benchmarks.cpu.systems import Engine, Source
from benchmarks.cpu.systems.stock import DTYPES, tensors, to_numpy


def load(source: Source, dtype: str, threads: int, backend: str) -> SentenceTransformer:
    """The model in one of sentence-transformers' backends, in evaluation mode."""
    arguments: dict[str, Any] = {}
    if backend == "torch":
        arguments["dtype"] = DTYPES[dtype]
    elif backend == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        arguments |= {"provider": "CPUExecutionProvider", "export": True, "session_options": options}
    else:
        precision = {"fp32": "f32", "bf16": "bf16"}[dtype]
        arguments |= {
            "export": True,
            "ov_config": {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision},
        }
    return SentenceTransformer(
        str(source.folder), backend=backend, device="cpu", local_files_only=True, model_kwargs=arguments
    ).eval()


def prepare(source: Source, dtype: str, threads: int, backend: str) -> Engine:
    model = load(source, dtype, threads, backend)

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(dict(inputs))["sentence_embedding"]

    return Engine(lambda arrays: tensors(arrays, dtype), run, to_numpy)
