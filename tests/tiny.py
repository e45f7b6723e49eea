"""Tiny models with weights under which every term shows, and ragged batches, for the tests of the core."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, ViTConfig, ViTModel

from fastencoder.kernels import native
from fastencoder.kernels.linear.cpu_native import Panels
from fastencoder.layers import FastLayer, LayerState

from .conformance.weights import sharpen

SIZES = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=80)


def bert(seed: int = 0, cls: type = BertModel, **config) -> BertModel:
    model = cls(BertConfig(vocab_size=99, max_position_embeddings=64, **{**SIZES, **config})).eval()
    sharpen(model, seed)
    return model


def bert_classifier(**config) -> BertForSequenceClassification:
    return bert(cls=BertForSequenceClassification, **config)


def vit(seed: int = 0, **config) -> ViTModel:
    model = ViTModel(ViTConfig(image_size=32, patch_size=8, **{**SIZES, **config})).eval()
    sharpen(model, seed)
    return model


def ragged(batch: int = 5, seqlen: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Right padding, left padding, holes, an all-padding row and one more ragged row; no row is full."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 99, (batch, seqlen), generator=generator)
    mask = torch.ones(batch, seqlen, dtype=torch.long)
    mask[0, 7:] = 0
    mask[1, :3] = 0
    mask[2, [2, 5, 11]] = 0
    mask[3] = 0
    mask[4:, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def states(model: torch.nn.Module) -> list[LayerState]:
    return [layer._fastencoder for layer in model.modules() if isinstance(layer, FastLayer)]


def calls(model: torch.nn.Module) -> tuple[int, int]:
    """(fast, delegated) layer calls since the conversion."""
    return sum(s.fast_calls for s in states(model)), sum(s.delegated_calls for s in states(model))


def reasons(model: torch.nn.Module) -> set[str]:
    return {s.last_reason for s in states(model) if s.last_reason}


def relative_error(value: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    if mask is not None:
        value, reference = value[mask.bool()], reference[mask.bool()]
    assert value.shape == reference.shape
    assert torch.isfinite(value).all()
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def packed_weights(projections) -> list:
    """What a layer with three plain projections beside queries, keys and values keeps of its weights on the CPU."""
    return [projections._qkv_weight, *(projections.slots[slot].packed for slot in ("out", "up", "down"))]


def packed_bytes(weight) -> int:
    """Of a weight in oneDNN's layout or in panels, without what fills the last panel."""
    if isinstance(weight, Panels):
        return weight.weight[0].nbytes * weight.outputs // native.library.panel_width(weight.isa)
    return weight.numel() * weight.element_size()
