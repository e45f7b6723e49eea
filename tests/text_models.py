"""Tiny text models of several kinds, and their answers for texts in a batch, for the tests of what a batch may change."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
)

from . import tiny
from .conformance.weights import sharpen

PAD = 1


def _made(cls: type, config: object) -> nn.Module:
    torch.manual_seed(0)
    model = cls(config).eval()
    sharpen(model)
    return model


def _roberta() -> nn.Module:
    sizes = {**tiny.SIZES, "vocab_size": 99, "max_position_embeddings": 90, "pad_token_id": PAD, "num_labels": 5}
    return _made(RobertaForSequenceClassification, RobertaConfig(**sizes))


def _modernbert() -> nn.Module:
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=36, vocab_size=99)
    special = dict(pad_token_id=PAD, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
    return _made(ModernBertModel, ModernBertConfig(**sizes, **special, local_attention=8, global_attn_every_n_layers=3))


def _mpnet() -> nn.Module:
    return _made(MPNetModel, MPNetConfig(**tiny.SIZES, vocab_size=99, max_position_embeddings=90))


def _t5() -> nn.Module:
    sizes = dict(d_model=48, d_kv=16, d_ff=80, num_layers=3, num_heads=3, vocab_size=99, pad_token_id=PAD)
    return _made(T5EncoderModel, T5Config(**sizes, feed_forward_proj="gated-gelu"))


# Post-LN, positions that do not count padding, rotary positions with windows and a gated block, biases by distance, RMS norms.
MODELS = {
    "bert": tiny.bert,
    "classifier": lambda: tiny.bert_classifier(num_labels=5),
    "roberta": _roberta,
    "modernbert": _modernbert,
    "mpnet": _mpnet,
    "t5": _t5,
}


def texts(count: int, longest: int, vocab: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(5, vocab, (length,), generator=generator) for length in lengths]


def answers(model: nn.Module, rows: list[torch.Tensor], size: int) -> list[list[torch.Tensor]]:
    """For each of these texts, in one batch padded on the right to `size`: hidden states of its tokens, and what is one row."""
    ids = torch.full((len(rows), size), PAD)
    mask = torch.zeros(len(rows), size, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    with torch.inference_mode():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states="logits" in _keys(model))
    hidden = out.hidden_states[-1] if "hidden_states" in out else out.last_hidden_state
    whole = [out[name] for name in ("logits", "pooler_output") if out.get(name) is not None]
    return [[hidden[i, : len(row)].clone(), *(x[i].clone() for x in whole)] for i, row in enumerate(rows)]


def _keys(model: nn.Module) -> tuple[str, ...]:
    return ("logits",) if hasattr(model, "classifier") else ()
