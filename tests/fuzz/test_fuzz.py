"""The short run of the fuzzer, always with the same examples; and what it has found, as tests."""

from __future__ import annotations

import pytest
import torch

from fastencoder.kernels.varlen_attention import cpu_native
from fastencoder.layers import whole
from fastencoder.packing import PackedBatch

from . import kernels, models, run


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "examples", "cases"), [("models", 100, 400), ("kernels", 1500, 1200)])
def test_no_difference(subject: str, examples: int, cases: int) -> None:
    outcome = run.run(subject, examples, start=None)
    assert outcome.example is None, f"{outcome.error}\n\n{outcome.as_test(subject)}"
    assert outcome.cases >= cases, f"only {outcome.cases} cases, {outcome.impossible} examples were impossible"


# What the long run has found, shrunk.
FOUND = {
    "oneDNN's fused relu turned NaN into 0": kernels.Linear(
        tokens=1, inputs=1, outputs=1, activation="relu", bias=False, residual=False, scale=False, gated=False,
        packed=False, dtype="bfloat16", isa="none", poisoned=0, seed=0,
    ),
    "DeBERTa's distances of a batch of padding alone": models.Model(
        row="deberta_v2.DebertaV2Layer", config=(), seed=0, scale=1.0, dtype="float32", memory="default",
        calls=(models.Call(entry="forward", pattern="empty", rows=1, size=1, seed=0),),
    ),
    "WavLM's and SpeechT5's kind of a batch of padding alone": models.Model(
        row="speecht5.SpeechT5EncoderLayer", config=(), seed=0, scale=1.0, dtype="float32", memory="default",
        calls=(models.Call(entry="forward", pattern="empty", rows=1, size=1, seed=1),),
    ),
    "a batch in which the stock model is lucky": models.Model(
        row="bert.BertLayer.relu", config=(), seed=0, scale=2.5, dtype="float32", memory="default",
        calls=(models.Call(entry="loaded", pattern="none", rows=4, size=11, seed=566),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("example", FOUND.values(), ids=FOUND)
def test_found(example) -> None:
    check = models.check if isinstance(example, models.Model) else kernels.check
    assert check(example) > 0


def test_a_small_wrong_term_is_more_than_luck(monkeypatch) -> None:
    """The bound of a model that magnifies rounding stays far below an error that somebody made."""
    example = FOUND["a batch in which the stock model is lucky"]
    take, run_layers = PackedBatch.take, whole.run_layers
    ramp = torch.linspace(1, 1.001, 48)  # a constant factor would be lost in the norm
    monkeypatch.setattr(PackedBatch, "take", lambda self, hidden: take(self, hidden) * ramp)
    monkeypatch.setattr(whole, "run_layers", lambda isa, fields, batch, x: run_layers(isa, fields, batch, x * ramp))
    with pytest.raises(AssertionError, match="relative error"):
        models.check(example)


def test_a_wrong_layer_is_found_and_printed(monkeypatch) -> None:
    """Padding goes into the packed batch: the smallest failing example has one call, and its test fails when pasted."""
    monkeypatch.setattr(PackedBatch, "take", lambda self, hidden: hidden.flatten(0, 1)[: len(self.indices)])
    bert = (models.models(rows=("bert.BertLayer",), most_calls=3), models.check)
    monkeypatch.setitem(run.SUBJECTS, "models", bert)
    models.built.cache_clear()
    outcome = run.run("models", 20, start=None)
    models.built.cache_clear()
    assert outcome.example is not None and outcome.error is not None
    assert outcome.example.count("Call(") == 1
    names: dict = {}
    exec(outcome.as_test("models"), names)
    with pytest.raises(Exception):  # noqa: B017 - whatever this mutation breaks
        names["test_found_by_fuzzing"]()
    models.built.cache_clear()


def test_a_kernel_that_leaves_memory_unwritten_is_found(monkeypatch) -> None:
    monkeypatch.setattr(cpu_native.native.library, "attention", lambda *_: None)
    outcome = run.run("kernels", 200, start=None)
    assert outcome.example is not None and outcome.example.startswith("Attention(")
