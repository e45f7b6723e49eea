"""What optimum's BetterTransformer promised, for all encoders of its last release: convert, invert, save, logits, pipelines."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastencoder

from ..conformance import batches, case, fast, heads, measure
from ..conformance.cases import BY_ID
from . import processors

# Model type -> the model of it, by name, and the pipeline (or "generate") that it is used in.
TEXT = {
    "albert": ("AlbertForMaskedLM", "fill-mask"),
    "bert": ("BertForTokenClassification", "token-classification"),
    "bert-generation": ("bert_generation.BertGenerationLayer", "feature-extraction"),
    "camembert": ("CamembertForSequenceClassification", "text-classification"),
    "data2vec-text": ("Data2VecTextForMaskedLM", "fill-mask"),
    "distilbert": ("DistilBertForMaskedLM", "fill-mask"),
    "electra": ("ElectraForTokenClassification", "token-classification"),
    "ernie": ("ErnieForSequenceClassification", "text-classification"),
    "layoutlm": ("LayoutLMForTokenClassification", "token-classification"),
    "markuplm": ("MarkupLMForSequenceClassification", "text-classification"),
    "rembert": ("RemBertForMaskedLM", "fill-mask"),
    "roberta": ("RobertaForSequenceClassification", "zero-shot-classification"),
    "roc_bert": ("RoCBertForTokenClassification", "token-classification"),
    "roformer": ("RoFormerForMaskedLM", "fill-mask"),
    "splinter": ("splinter.SplinterLayer", "feature-extraction"),
    "tapas": ("TapasForSequenceClassification", "text-classification"),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", "text-classification"),
}
SEQ2SEQ = {
    "bart": ("BartForConditionalGeneration", "generate"),
    "blenderbot": ("BlenderbotForConditionalGeneration", "generate"),
    "fsmt": ("FSMTForConditionalGeneration", "generate"),
    "m2m_100": ("M2M100ForConditionalGeneration", "generate"),
    "marian": ("MarianMTModel", "generate"),
    "mbart": ("MBartForConditionalGeneration", "generate"),
    "pegasus": ("PegasusForConditionalGeneration", "generate"),
    "prophetnet": ("ProphetNetForConditionalGeneration", "generate"),
    "t5": ("T5ForConditionalGeneration", "generate"),
}
IMAGES = {
    "clip": ("CLIPForImageClassification", "image-classification"),
    "deit": ("DeiTForImageClassification", "image-classification"),
    "vilt": ("ViltForQuestionAnswering", ""),  # transformers 5 has no pipeline for it
    "vit": ("ViTForImageClassification", "image-classification"),
    "vit_mae": ("vit_mae.ViTMAELayer", "image-feature-extraction"),
    "vit_msn": ("ViTMSNForImageClassification", "image-classification"),
    "yolos": ("YolosForObjectDetection", "object-detection"),
}
AUDIO = {
    "hubert": ("HubertForCTC.HubertEncoderLayer", "automatic-speech-recognition"),
    "hubert, stable norms": ("HubertForCTC.HubertEncoderLayerStableLayerNorm", "automatic-speech-recognition"),
    "wav2vec2": ("Wav2Vec2ForCTC.Wav2Vec2EncoderLayer", "automatic-speech-recognition"),
    "wav2vec2, stable norms": ("Wav2Vec2ForCTC.Wav2Vec2EncoderLayerStableLayerNorm", "automatic-speech-recognition"),
    "whisper": ("WhisperForAudioClassification", "audio-classification"),
}
TYPES = TEXT | SEQ2SEQ | IMAGES | AUDIO
every_type = pytest.mark.parametrize("name", TYPES)


class Subject:
    """A tiny model of a type, with weights under which every term shows, and a padded batch for it."""

    def __init__(self, name: str) -> None:
        self.named, self.task = TYPES[name]
        self.head = next(
            (head for head in heads.table() if self.named in (head.model, head.id.partition(".")[2])), None
        )
        self.case = self.head.case if self.head is not None else BY_ID[self.named]
        if self.head is not None:
            self.model = heads.build(self.head)
            self.batch = heads.batch(self.head, self.model)
        else:
            self.model = case.build(self.case)
            self.batch = batches.build(self.case, self.model, batches.patterns(self.case)[0])

    def answer(self, model: nn.Module, batch: batches.Batch | None = None) -> dict[str, torch.Tensor]:
        batch = batch or self.batch
        torch.manual_seed(0)  # ViLT shuffles patches
        if self.head is not None:
            return heads.answer(self.head, model, batch)
        return {"hidden": measure.last(self.case, measure.run(model, batch))}

    def use(self, model: nn.Module, folder: Path) -> Any:
        """What users get out of the model, from text, pictures or sound."""
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)  # ViTMAE masks patches at random
            if self.task == "generate":
                inputs = {name: self.batch.inputs[name] for name in ("input_ids", "attention_mask")}
                options = {
                    "use_cache": self.named != "ProphetNetForConditionalGeneration"
                }  # its cache wants more layers
                options |= {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "num_beams": 1}
                found = model.generate(**inputs, max_new_tokens=5, **options)
                logits = torch.stack(found.logits)
                assert (logits[0, 0] - logits[0, 1]).std() > 0.1, "the answers do not depend on the questions"
                return [found.sequences.tolist(), logits.clamp(min=-1e4).tolist()]
            return _run_pipeline(self.task, model, folder)


def _run_pipeline(task: str, model: Any, folder: Path) -> Any:
    config = model.config
    if task in ("automatic-speech-recognition", "audio-classification"):
        if task == "audio-classification":
            parts = {
                "feature_extractor": processors.mel_extractor(config.num_mel_bins, 2 * config.max_source_positions)
            }
            clips = processors.waves((500, 120, 900))
        else:
            parts = {"feature_extractor": processors.wave_extractor()}
            parts["tokenizer"] = processors.ctc_tokenizer(folder, config.vocab_size)
            clips = processors.waves()
        pipeline = transformers.pipeline(task, model=model, **parts)
        alone = model(torch.from_numpy(clips[0])[None]) if task != "audio-classification" else None
        return [pipeline(clips, batch_size=size) for size in (3, 1)], alone and alone.logits.tolist()
    if "image" in task or "object" in task:
        size = getattr(config, "vision_config", config).image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        parts = {"image_processor": processors.image_processor(config.model_type, size)}
        options = {"threshold": 0.0} if task == "object-detection" else {}
        return transformers.pipeline(task, model=model, **parts)(processors.images(), **options)
    tokenizer = processors.tokenizer(config.pad_token_id or 0)
    texts, options = processors.SENTENCES, {"batch_size": 4}
    if task == "fill-mask":
        texts = [text.replace(" the", " [MASK]", 1) if " the" in text else text + " [MASK]" for text in texts]
    elif task == "zero-shot-classification":
        config.label2id, config.id2label = {"entailment": 0, "other": 1}, {0: "entailment", 1: "other"}
        options["candidate_labels"] = ["cat", "dog", "tree"]
    elif task == "text-classification":
        options["top_k"] = None
    found = transformers.pipeline(task, model=model, tokenizer=tokenizer)(texts, **options)
    if task == "feature-extraction":  # a row of the batch, with its padding
        found = [each[0][: len(tokenizer(text).input_ids)] for each, text in zip(found, texts, strict=True)]
    return found


def _classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@every_type
def test_contract(name: str, tmp_path: Path) -> None:
    subject = Subject(name)
    stock, batch = subject.model, subject.batch
    model = copy.deepcopy(stock)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = subject.answer(stock)
    no_double = subject.case is not None and subject.case.no_double
    exact = given if no_double else subject.answer(copy.deepcopy(stock).double(), batch.to(torch.float64))
    used = subject.use(stock, tmp_path) if subject.task else None

    assert fastencoder.to_fast(model) is model
    ours = subject.answer(model)
    for key in exact.keys() - set(batch.meta.get("unread", ())):
        expected = measure.pick(exact[key], batch.real)
        error = measure.error(measure.pick(ours[key], batch.real), expected)
        bar = max(measure.FP32_BAR, 3 * measure.error(measure.pick(given[key], batch.real), expected))
        assert error <= bar, f"{key}: relative error {error:.2e}, bar {bar:.2e}"
    if subject.task:
        assert processors.difference(subject.use(model, tmp_path), used) < 1e-3
    assert fast.calls(model)[0] > 0, fast.reasons(model)
    if subject.case is None or not (subject.case.padding_delegates or subject.task == "automatic-speech-recognition"):
        assert fast.calls(model)[1] == 0, fast.reasons(model)

    assert fastencoder.reverse(model) is model
    assert _classes(model) == _classes(stock)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert _equal(subject.answer(model), given)
    model.save_pretrained(tmp_path / "saved")
    loaded, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for norm, own in zip(loaded.modules(), stock.modules(), strict=True):  # the configs know one eps for all norms
        if hasattr(own, "eps"):
            norm.eps = own.eps
        if hasattr(own, "variance_epsilon"):
            norm.variance_epsilon = own.variance_epsilon
    assert _equal(subject.answer(loaded.eval()), given)


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    pairs = [(ours[key], theirs[key]) for key in theirs]
    return ours.keys() == theirs.keys() and all(
        torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs
    )
