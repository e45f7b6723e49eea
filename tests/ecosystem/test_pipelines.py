"""transformers' pipelines around a converted model, on real weights and real text."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import pipeline

from fastencoder import reverse, to_fast

from .. import tiny
from ..conformance import heads
from . import processors, real

QUESTIONS = [("Who sat on the mat?", "A large cat sat on the mat, and the dog ran off."), ("Where?", "On a mat.")]
LABELS = ["animals", "sport", "the weather of last year"]
ANSWERS = {  # task -> (head, texts, arguments of the call)
    "fill-mask": ("AutoModelForMaskedLM", ["short [MASK]", "a [MASK] of a few more words than the others have"], {}),
    "text-classification": ("AutoModelForSequenceClassification", real.TEXTS, {"top_k": None}),
    "token-classification": ("AutoModelForTokenClassification", [text for text in real.TEXTS if text], {}),
    "zero-shot-classification": (
        "AutoModelForSequenceClassification",
        real.TEXTS[1:2] * 3,
        {"candidate_labels": LABELS},
    ),
}


def run(task: str, model: Any, *given: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipeline(task, model=model, tokenizer=real.tokenizer())(*given, batch_size=4, **options)


@pytest.mark.parametrize("task", ANSWERS)
def test_answers_are_the_stock_models(task: str) -> None:
    auto, texts, options = ANSWERS[task]
    model = real.model(auto, labels=3)
    if task == "zero-shot-classification":
        model.config.id2label = {0: "contradiction", 1: "neutral", 2: "entailment"}
        model.config.label2id = {label: index for index, label in model.config.id2label.items()}
    expected = run(task, model, texts, **options)
    to_fast(model)
    assert processors.difference(run(task, model, texts, **options), expected) < 1e-4
    assert tiny.calls(model)[0] > 0 and tiny.calls(model)[1] == 0
    reverse(model)
    assert run(task, model, texts, **options) == expected


def test_features_of_real_tokens() -> None:
    """The pipeline returns rows as long as the longest of their batch; behind a text's own tokens a fast model has zeros."""
    model = real.model()
    expected = run("feature-extraction", model, real.TEXTS)
    got = run("feature-extraction", to_fast(model), real.TEXTS)
    for ours, theirs, text in zip(got, expected, real.TEXTS, strict=True):
        ours, theirs = torch.tensor(ours)[0], torch.tensor(theirs)[0]
        tokens = len(real.tokenizer()(text).input_ids)
        assert ours.shape == theirs.shape and len(ours) > tokens or text == real.TEXTS[3]
        assert tiny.relative_error(ours[:tokens], theirs[:tokens]) < 1e-5
        assert (ours[tokens:] == 0).all()
    assert tiny.calls(model) == (6, 0)


def test_spans_of_answers() -> None:
    """transformers 5 has no pipeline for them: logits over question and context, and the best span."""
    stock, inputs = (
        real.model("AutoModelForQuestionAnswering"),
        real.tokenizer()(QUESTIONS, padding=True, return_tensors="pt"),
    )
    answers = []
    for model in (stock, to_fast(real.model("AutoModelForQuestionAnswering"))):
        with torch.inference_mode():
            output = model(**inputs)
        context = torch.tensor([[part == 1 for part in inputs.sequence_ids(row)] for row in range(2)])
        starts, ends = (logits.masked_fill(~context, -torch.inf) for logits in (output.start_logits, output.end_logits))
        scores = (starts[:, :, None] + ends[:, None, :]).masked_fill(
            ~torch.ones(starts.shape[1:] * 2).triu().bool(), -torch.inf
        )
        answers.append((scores[scores.isfinite()], scores.flatten(1).argmax(1)))
    assert torch.equal(answers[1][1], answers[0][1])
    assert tiny.relative_error(answers[1][0], answers[0][0]) < 1e-5
    assert "question-answering" not in transformers.pipelines.SUPPORTED_TASKS


def test_a_pipeline_that_exists_already() -> None:
    """Conversion is in place, so a server's pipeline becomes fast, and stock again, while it is there."""
    served = pipeline(
        "text-classification", model=real.model("AutoModelForSequenceClassification"), tokenizer=real.tokenizer()
    )
    expected = served(real.TEXTS, batch_size=4, top_k=None)
    to_fast(served.model)
    assert processors.difference(served(real.TEXTS, batch_size=4, top_k=None), expected) < 1e-4
    assert tiny.calls(served.model) == (6, 0)
    reverse(served.model)
    assert served(real.TEXTS, batch_size=4, top_k=None) == expected


def test_transcripts_of_clips_of_different_lengths(tmp_path) -> None:
    """The pipeline decodes every frame, those of padding too: in a padded batch they are computed as they were."""
    model = heads.build(next(head for head in heads.table() if head.id == "ctc.Wav2Vec2ForCTC.Wav2Vec2EncoderLayer"))
    parts = {"feature_extractor": processors.wave_extractor(), "tokenizer": processors.ctc_tokenizer(tmp_path, 32)}
    recogniser, clips = pipeline("automatic-speech-recognition", model=model, **parts), processors.waves()
    expected = {size: recogniser(clips, batch_size=size) for size in (1, 3)}
    assert expected[1] != expected[3]  # the frames of padding are in the text
    to_fast(model)
    assert recogniser(clips, batch_size=3) == expected[3]
    assert tiny.calls(model) == (0, 2)
    assert recogniser(clips, batch_size=1) == expected[1]
    assert tiny.calls(model) == (6, 2)


def test_pictures() -> None:
    model = tiny.vit()
    stock = transformers.ViTForImageClassification(model.config).eval()
    tiny.sharpen(stock)
    processor = processors.image_processor("vit", (32, 32))
    classifier = pipeline("image-classification", model=stock, image_processor=processor)
    expected = classifier(processors.images(), batch_size=2)
    to_fast(stock)
    assert processors.difference(classifier(processors.images(), batch_size=2), expected) < 1e-5
    assert tiny.calls(stock) == (6, 0)
