"""Models with heads, found by model type in transformers' own tables, with the tiny configs of the conformance rows."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

import fastencoder

from . import batches, heads_inputs, heads_setups, weights
from .case import DELEGATES, FAST, Absent, Case, build_config, merge
from .cases import CASES

# The tables: model type -> the class of the model with this head. A name that the installed release lacks counts as empty.
KINDS = [
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "MASKED_LM",
    "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
    "TEXT_ENCODING",
    "DOCUMENT_QUESTION_ANSWERING",
    "TABLE_QUESTION_ANSWERING",
    "VISUAL_QUESTION_ANSWERING",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "AUDIO_FRAME_CLASSIFICATION",
    "AUDIO_XVECTOR",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "IMAGE_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "MASKED_IMAGE_MODELING",
    "VIDEO_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "POSE_ESTIMATION",
    "FEATURES",
]
FEATURES = {
    "get_text_features": ("input_ids", "attention_mask"),
    "get_image_features": ("pixel_values",),
    "get_audio_features": ("input_features", "is_longer"),
}

UNREAD = ("hidden_states", "attentions", "past_key_values")


@dataclass(frozen=True)
class Head:
    """A class of transformers, and the conformance row whose tiny config it is built from (or a setup)."""

    kind: str
    model_type: str
    model: str
    case: Case | None

    @property
    def id(self) -> str:
        return ".".join([self.kind.lower(), self.model, *([self.case.layer] if self.case else [])])

    @property
    def setup(self) -> heads_setups.Setup:
        setups = heads_setups.SETUPS
        return setups.get(self.model) or setups.get(self.model_type) or heads_setups.Setup()


def classes(kind: str) -> dict[str, tuple[str, ...]]:
    """Model type -> names of classes with this kind of head; for "FEATURES", models of two towers with an embedding each."""
    if kind == "FEATURES":
        names = dict(modeling_auto.MODEL_MAPPING_NAMES)
    else:
        names = dict(getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}))
    found = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in names.items()}
    if kind != "FEATURES":
        return found
    return {key: value for key, value in found.items() if is_encoder(key) and _has_features(value[0])}


def _has_features(name: str) -> bool:
    try:
        return hasattr(getattr(transformers, name), next(iter(FEATURES)))
    except (AttributeError, ImportError):
        return False


def is_encoder(model_type: str) -> bool:
    """Whether a registered layer class, one of an encoder, is known to occur in models of this type."""
    return any(not entry.adapter.decoder for entry in fastencoder.registry.by_model_type(model_type))


def has_reason(head: Head, reasons: dict[str, str]) -> str | None:
    """The reason that a table has for this class, or for all of its model type."""
    return reasons.get(head.model) or reasons.get(head.model_type)


@cache
def _cases_by_type() -> dict[str, list[Case]]:
    """The first row of each layer class, by the model type of its config."""
    found: dict[str, list[Case]] = {}
    for case in CASES:
        if case.home or case.where or case.expect not in (FAST, DELEGATES):
            continue
        try:
            known = found.setdefault(build_config(case).model_type, [])
        except Absent:
            continue
        if case.layer not in [other.layer for other in known]:
            known.append(case)
    return found


def table() -> list[Head]:
    """Every head of every model type that has a row, a setup, or at least a registered layer class."""
    rows = []
    for kind in KINDS:
        for model_type, names in classes(kind).items():
            cases: list[Case | None] = list(_cases_by_type().get(model_type, []))
            if model_type in heads_setups.SETUPS or (not cases and is_encoder(model_type)):
                cases = [None]
            rows += [Head(kind, model_type, name, case) for name in names for case in cases]
    return rows


def build(head: Head) -> nn.Module:
    """The tiny model in fp32 and eval mode, with weights under which every term of its layers shows.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    model_class = getattr(transformers, head.model)
    setup = head.setup
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        if head.case is None:
            config = transformers.AutoConfig.for_model(head.model_type, **setup.config)
        else:
            config = type(build_config(head.case))(**merge(head.case.config, setup.config))
        model = model_class(config).float().eval()
        weights.sharpen(model)
        for path in setup.quiet:
            weights.scale(model.get_submodule(path), 0.1)
        for name, value in (head.case.options if head.case else {}).get("buffers", {}).items():
            model.get_buffer(name).fill_(value)
        full = batch(head, model, padded=False)
        known = [module for module in model.modules() if fastencoder.registry.by_class(type(module))]
        with torch.no_grad():
            weights.calibrate(known, lambda: answer(head, model, full))
    return model


def batch(head: Head, model: nn.Module, padded: bool = True) -> batches.Batch:
    """Inputs of the head: a ragged batch, where the model takes a mask."""
    setup = head.setup
    if setup.inputs or head.case is None:
        made = heads_inputs.build(setup.inputs, model, padded, setup.options)
    else:
        inner = next((module for module in model.modules() if isinstance(module, head.case.model_class())), model)
        wanted = (batches.RIGHT, batches.NONE) if padded else (batches.ONES, batches.NONE)
        pattern = next(each for each in wanted if each in batches.patterns(head.case))
        made = batches.build(head.case, inner, pattern)
    heads_inputs.adapt(head.kind, model, made)
    taken = inspect.signature(model.forward).parameters
    made.inputs = {name: value for name, value in made.inputs.items() if name in taken}
    return made


@torch.no_grad()
def answer(head: Head, model: nn.Module, given: batches.Batch) -> dict[str, torch.Tensor]:
    """Every floating-point tensor that the model answers with, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if head.kind != "FEATURES":
            return _tensors("", model(**given.inputs))
        found = {}
        for method, takes in FEATURES.items():
            inputs = {name: value for name, value in given.inputs.items() if name in takes}
            if not hasattr(model, method) or not inputs:
                continue
            found.update(_tensors(method, getattr(model, method)(**inputs)))
        return found


def _tensors(name: str, value: Any) -> dict[str, torch.Tensor]:
    """Hidden states and attentions, of which the conformance rows have tests, are left out."""
    if torch.is_tensor(value):
        return {name: value} if value.is_floating_point() else {}
    if isinstance(value, dict):
        parts = {
            key: each
            for key, each in value.items()
            if not key.endswith(("hidden_states", "attentions", "past_key_values"))
        }
    elif isinstance(value, (tuple, list)):
        parts = {str(index): each for index, each in enumerate(value)}
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, each in parts.items():
        found.update(_tensors(f"{name}.{key}".strip("."), each))
    return found
