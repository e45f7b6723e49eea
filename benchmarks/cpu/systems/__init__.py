"""The systems that are compared: what each is called, where it runs, and the interface that its module fills.

A module has `prepare(source, dtype, threads, **options) -> Engine`. It is imported only in the worker process that runs it,
in the environment that has its packages, so that it may import them at its top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

MAIN, ENGINES, OPTIMUM = "main", "engines", "optimum"
FAST = "fastencoder"
STOCK_EAGER, STOCK_SDPA, STOCK_SORTED = "stock eager", "stock sdpa", "stock sorted"


class NotAvailable(Exception):
    """This system cannot run this model; the message says why."""


@dataclass(frozen=True)
class Source:
    """One model's files.

    Args:
        name, kind: of `benchmarks.cpu.models.MODELS`.
        folder: config and weights as transformers saves them.
        exported: a folder for forms of it that a system makes once and keeps.
    """

    name: str
    kind: str
    folder: Path
    exported: Path


@dataclass
class Engine:
    """One model, ready to run in one system.

    Args:
        inputs: NumPy arrays -> what `run` takes; done once a batch and not timed.
        run: the timed call; what it returns is complete.
        answer: what `run` returned -> float32 `[B, S, D]` hidden states, or `[B, D]` pooled embeddings.
        notes: what a reader should know of it, for the results.
        beside: more timed calls, made of (inputs, real lengths): the rate of the bare GEMMs.
    """

    inputs: Callable[[Arrays], Any]
    run: Callable[[Any], Any]
    answer: Callable[[Any], np.ndarray]
    notes: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Callable[[list[int]], Callable[[], object]]] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """One way to run a model.

    Args:
        name: as in the tables.
        module: in this package.
        options: for its `prepare`.
        environment: which of the three that `make bench-setup` makes.
        engine: the engine of which this is one way ("best engine" is the fastest of them); empty for stock and for ours.
        without: dtype -> why the system does not have it.
        models: the only models it is for; empty for all.
    """

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: str = MAIN
    engine: str = ""
    without: dict[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ()


_NO_BF16 = "no bf16 on the CPU"
_ASKED_BF16 = "asks for bf16"
_COMPILE, _ORT, _OPENVINO, _CTRANSLATE2, _NESTED = "torch.compile", "ONNX Runtime", "OpenVINO", "CTranslate2", "nested"
_MINILM = ("minilm",)

SYSTEMS = {
    system.name: system
    for system in (
        System(STOCK_EAGER, "stock", {"attention": "eager"}),
        System(STOCK_SDPA, "stock", {"attention": "sdpa"}),
        System(STOCK_SORTED, "stock", {"attention": "sdpa", "sort": True}),
        System("torch.compile static", "compiled", {"dynamic": False}, engine=_COMPILE),
        System("torch.compile dynamic", "compiled", {"dynamic": True}, engine=_COMPILE),
        System("nn.TransformerEncoder", "nested", engine=_NESTED),
        System("ONNX Runtime", "onnx_runtime", {}, ENGINES, _ORT, {"bf16": _NO_BF16}),
        System("ONNX Runtime optimised", "onnx_runtime", {"optimise": True}, ENGINES, _ORT, {"bf16": _NO_BF16}),
        System("OpenVINO dynamic", "open_vino", {"static": False}, ENGINES, _OPENVINO),
        System("OpenVINO static", "open_vino", {"static": True}, ENGINES, _OPENVINO),
        System("CTranslate2", "c_translate2", {}, ENGINES, _CTRANSLATE2),
        System("sentence-transformers torch", "sentence", {"backend": "torch"}, models=_MINILM),
        System("sentence-transformers onnx", "sentence", {"backend": "onnx"}, OPTIMUM, "", {"bf16": _NO_BF16}, _MINILM),
        System("sentence-transformers openvino", "sentence", {"backend": "openvino"}, OPTIMUM, models=_MINILM),
        System(FAST, "fast"),
        System("fastencoder lean", "fast", {"arguments": {"memory": "lean"}}),
        System(
            "fastencoder compute bf16",
            "fast",
            {"arguments": {"compute_dtype": "bf16"}},
            without={"fp32": _ASKED_BF16},
        ),
    )
}

# Whole texts, tokenizing and pooling included: `benchmarks.cpu.encode`.
ENCODE_BATCH = 32  # texts
_UNPADDED = {"convert": {}, "unpad": True}
ENCODERS = {
    system.name: system
    for system in (
        System("encode torch", "encode", {"backend": "torch"}),
        System("encode torch fp32", "encode", {"backend": "torch", "precision": "fp32"}),
        System("encode onnx fp32", "encode", {"backend": "onnx", "precision": "fp32"}, OPTIMUM),
        System("encode openvino", "encode", {"backend": "openvino"}, OPTIMUM),
        System("encode openvino fp32", "encode", {"backend": "openvino", "precision": "fp32"}, OPTIMUM),
        System("encode fastencoder", "encode", {"convert": {}}),
        System("encode fastencoder unpadded", "encode", _UNPADDED),
        System(
            "encode fastencoder compute bf16",
            "encode",
            {"convert": {"compute_dtype": "bf16"}, "precision": "fp32"},
            without={"fp32": _ASKED_BF16},
        ),
    )
}
EVERY = SYSTEMS | ENCODERS

# What counts as ours in a ratio: the fastest of these.
OURS = {"fp32": (FAST,), "bf16": (FAST, "fastencoder compute bf16")}
ENGINES_COMPARED = (_COMPILE, _ORT, _OPENVINO, _CTRANSLATE2, _NESTED)
