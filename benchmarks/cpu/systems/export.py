"""Writes a model in the form that another engine reads: `python -m benchmarks.cpu.systems.export`, see `exported`."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.models import config
from benchmarks.cpu.systems import NotAvailable, Source
from benchmarks.cpu.systems.exported import FILES, get
from benchmarks.cpu.systems.stock import load

OPSET = 17
# Of onnxruntime.transformers, by transformers' model_type; the rest has no fusions of its own and gets BERT's.
_FUSIONS = {"vit": "vit"}


def onnx(source: Source, target: Path) -> None:
    """Eager attention and the exporter by tracing: the graph in which ONNX Runtime's optimiser finds attention."""
    wrapped, inputs = _wrapped(source, "eager")
    axes = {0: "batch"} if source.kind == "image" else {0: "batch", 1: "positions"}
    torch.onnx.export(
        wrapped,
        tuple(inputs.values()),
        str(target),
        input_names=list(inputs),
        output_names=["last_hidden_state"],
        dynamic_axes=dict.fromkeys(inputs, axes),
        opset_version=OPSET,
        dynamo=False,
    )


def onnx_optimised(source: Source, target: Path) -> None:
    """ONNX Runtime's own optimiser for transformers; beside the model, what it has fused."""
    from onnxruntime.transformers import optimizer

    values = config(source.folder)
    model = optimizer.optimize_model(
        str(get(source, "onnx")),
        model_type=_FUSIONS.get(values["model_type"], "bert"),
        num_heads=values.get("num_attention_heads") or values["num_heads"],
        hidden_size=values.get("hidden_size") or values["d_model"],
        opt_level=0,
    )
    fused = {name: count for name, count in model.get_fused_operator_statistics().items() if count}
    target.with_name("fused.json").write_text(json.dumps(fused), encoding="utf-8")
    model.save_model_to_file(str(target))


def openvino(source: Source, target: Path) -> None:
    """From the model itself: its attention becomes OpenVINO's own operation."""
    import openvino as ov

    try:
        wrapped, inputs = _wrapped(source, "sdpa")
    except NotAvailable:
        wrapped, inputs = _wrapped(source, "eager")
    ov.save_model(ov.convert_model(wrapped, example_input=tuple(inputs.values())), target, compress_to_fp16=False)


def ctranslate2(source: Source, target: Path) -> None:
    """By the library's converter, which has to be given what it asks for and our files may lack."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_model(self, model_class: Any, folder: str, **kwargs: Any) -> Any:
            model = super().load_model(model_class, folder, **kwargs)
            if not hasattr(model.config, "position_embedding_type"):  # transformers 5 has no other kind for BERT
                model.config.position_embedding_type = "absolute"
            return model

        def load_tokenizer(self, tokenizer_class: Any, folder: str, **kwargs: Any) -> Any:
            if (Path(folder) / "tokenizer.json").exists():
                return super().load_tokenizer(tokenizer_class, folder, **kwargs)
            return _Numbered(config(Path(folder))["vocab_size"])

    Converter(str(source.folder)).convert(str(target.parent), force=True)


class _Numbered:
    """The vocabulary of a model without text: its ids."""

    bos_token = eos_token = unk_token = pad_token = "0"

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(self._size)}


FORMS: dict[str, Callable[[Source, Path], None]] = {
    "onnx": onnx,
    "onnx-optimised": onnx_optimised,
    "openvino": openvino,
    "ctranslate2": ctranslate2,
}


class _LastHiddenState(torch.nn.Module):
    """The model with positional inputs and one output, which is all that tracing needs to know."""

    def __init__(self, model: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).last_hidden_state


def _wrapped(source: Source, attention: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    inputs = _example(source.kind)
    return _LastHiddenState(load(source.folder, "fp32", attention), list(inputs)).eval(), inputs


def _example(kind: str) -> dict[str, torch.Tensor]:
    """Inputs with padding, to trace with."""
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 224, 224)}
    size = 16_000 if kind == "audio" else 24
    mask = torch.ones(3, size, dtype=torch.long)
    mask[1, size // 3 :] = 0
    if kind == "audio":
        return {"input_values": torch.randn(3, size), "attention_mask": mask}
    return {"input_ids": torch.randint(3, 1000, (3, size)), "attention_mask": mask}


def main(name: str, kind: str, folder: str, exported: str, form: str) -> int:
    """Write the form, or why it cannot be written. Returns the exit status."""
    source = Source(name, kind, Path(folder), Path(exported))
    target = source.exported / FILES[form]
    partial = target.parent.with_name(f".{form}.partial")  # an interruption leaves nothing that looks complete
    for folder_there in (target.parent, partial):
        shutil.rmtree(folder_there, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FORMS[form](source, partial / target.name)
        partial.rename(target.parent)
    except Exception as error:
        target.parent.mkdir(exist_ok=True)
        said = [line for line in str(error).splitlines() if line.strip()]
        why = (
            str(error)
            if isinstance(error, NotAvailable)
            else f"{type(error).__name__}: {said[0][:200] if said else ''}"
        )
        text = json.dumps({"why": f"the export to {form} fails: {why}"})
        target.with_suffix(".failed.json").write_text(text, encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
