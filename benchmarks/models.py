"""The models of the GPU benchmarks, built from their configs: the sizes of well-known checkpoints, random weights.

The weights are those of the conformance tests (`tests/conformance/weights.py`): every bias, norm and score shows in the
output, which is not so for freshly initialised ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from fastencoder import explain, registry
from fastencoder.demo.data import ragged_lengths
from fastencoder.layers.binding import Binding
from tests.conformance.weights import calibrate, sharpen

Inputs = dict[str, torch.Tensor]
VOCABULARY = 2000  # few, because the embedding is no part of what is measured


@dataclass(frozen=True)
class Model:
    """One model: how to build it, and what it takes.

    Args:
        name: as in the tables.
        kind: "text", "image" or "audio".
        build: config values -> the model on the CPU.
        config: config values that differ from transformers' defaults.
        tiny: config values for a dry run.
    """

    name: str
    kind: str
    build: Callable[[dict[str, Any]], nn.Module]
    config: dict[str, Any]
    tiny: dict[str, Any]

    def make(self, quick: bool) -> nn.Module:
        """The model in float32 and evaluation mode, with weights under which every term shows."""
        torch.manual_seed(0)
        model = self.build({**self.config, **(self.tiny if quick else {})}).eval()
        sharpen(model)
        return model


_TEXT = {"vocab_size": VOCABULARY}
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
_TINY_IMAGE = {**_TINY, "image_size": 32, "patch_size": 8}


def _roberta(config: dict[str, Any]) -> nn.Module:
    return transformers.RobertaModel(transformers.RobertaConfig(**config), add_pooling_layer=False)


def _clip_vision(config: dict[str, Any]) -> nn.Module:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config))


def _bert(config: dict[str, Any]) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**config), add_pooling_layer=False)


def _distilbert(config: dict[str, Any]) -> nn.Module:
    return transformers.DistilBertModel(transformers.DistilBertConfig(**config))


def _vit(config: dict[str, Any]) -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**config), add_pooling_layer=False)


def _dinov2(config: dict[str, Any]) -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**config))


def _bart(config: dict[str, Any]) -> nn.Module:
    from transformers.models.bart.modeling_bart import BartEncoder

    return BartEncoder(transformers.BartConfig(**config))


def _wav2vec2(config: dict[str, Any]) -> nn.Module:
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**config))


BERT_BASE = Model("bert-base", "text", _bert, _TEXT, _TINY)
BERT_LARGE = Model(
    "bert-large",
    "text",
    _bert,
    {**_TEXT, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    _TINY,
)
MINILM = Model(
    "MiniLM-L6",
    "text",
    _bert,
    {**_TEXT, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    _TINY,
)
VIT_BASE = Model("ViT-B/16", "image", _vit, {}, _TINY_IMAGE)
DISTILBERT = Model("distilbert", "text", _distilbert, _TEXT, {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 96})
ROBERTA = Model("roberta-base", "text", _roberta, {**_TEXT, "max_position_embeddings": 514, "type_vocab_size": 1}, _TINY)
CLIP_VISION = Model(
    "CLIP ViT-L/14",
    "image",
    _clip_vision,
    {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14},
    _TINY_IMAGE,
)
BART_BASE = Model(
    "bart-base encoder",
    "text",
    _bart,
    {**_TEXT, "d_model": 768, "encoder_layers": 6, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072},
    {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96},
)
WAV2VEC2_BASE = Model(
    "wav2vec2-base",
    "audio",
    _wav2vec2,
    {},
    {**_TINY, "conv_dim": (16, 16), "conv_kernel": (10, 5), "conv_stride": (5, 4), "num_conv_pos_embeddings": 4,
     "num_conv_pos_embedding_groups": 2},
)  # fmt: skip
DINOV2_BASE = Model("dinov2-base", "image", _dinov2, {}, {**_TINY_IMAGE, "mlp_ratio": 2})

PARITY = (
    BERT_BASE,
    BERT_LARGE,
    ROBERTA,
    DISTILBERT,
    MINILM,
    VIT_BASE,
    CLIP_VISION,
    WAV2VEC2_BASE,
    BART_BASE,
    DINOV2_BASE,
)


def ragged(model: nn.Module, kind: str, quick: bool, device: torch.device) -> tuple[Inputs, torch.Tensor | None]:
    """Inputs with padding of every shape the kind knows, and which positions `[B, S]` are real (None: all)."""
    generator = torch.Generator().manual_seed(3)
    if kind == "image":
        size, batch = model.config.image_size, 2 if quick else 4
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator).to(device)}, None
    if kind == "audio":
        lengths = torch.tensor([700, 400, 900] if quick else [16000, 9000, 25000, 4000])
        mask = (torch.arange(int(lengths.max()) + 200)[None] < lengths[:, None]).long().to(device)
        values = torch.randn(mask.shape, generator=generator).to(device)
        frames = int(model._get_feat_extract_output_lengths(torch.tensor(mask.shape[1])))
        real = model._get_feature_vector_attention_mask(frames, mask).bool()
        return {"input_values": values, "attention_mask": mask}, real
    seqlen = 20 if quick else 128
    mask = torch.ones(6, seqlen, dtype=torch.long)
    mask[0, seqlen * 3 // 4 :] = 0
    mask[1, : seqlen // 3] = 0  # on the left
    mask[2, torch.randperm(seqlen, generator=generator)[: seqlen // 4]] = 0  # holes
    mask[3] = 0  # nothing but padding
    mask[4, 1:] = 0
    mask[5, -1:] = 0
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, mask.bool().to(device)


def alone(inputs: Inputs) -> Inputs:
    """A batch of one without a mask, cut from the first row."""
    return {name: x[:1] for name, x in unpadded(inputs).items()}


def text_batch(lengths: list[int], seed: int, device: torch.device, seqlen: int | None = None) -> Inputs:
    """Random tokens, right-padded to `seqlen` or the longest; the same lengths in another order for another seed."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.tensor(lengths)[torch.randperm(len(lengths), generator=generator)]
    mask = (torch.arange(seqlen or max(lengths))[None] < shuffled[:, None]).long()
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def lengths_of(batch: int, longest: int, padding: float) -> list[int]:
    """Lengths of a batch in which this share of the positions is padding."""
    return [longest] * batch if padding == 0 else ragged_lengths(batch, longest, padding)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating inputs in the model's dtype."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def hidden(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The last hidden state `[B, S, D]`."""
    return model(**inputs).last_hidden_state


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that `to_fast` would convert.

    Raises:
        RuntimeError: it would convert none, or not all.
    """
    report = explain(model)
    if not report.eligible:
        raise RuntimeError(f"{type(model).__name__} is not eligible: {report.reasons('refused', 'left alone')}")
    return [model.get_submodule(row.name) for row in report if row.status == "eligible"]


def unpadded(inputs: Inputs) -> Inputs:
    """The same without a mask: every position is a token."""
    return {name: x for name, x in inputs.items() if name != "attention_mask"}


_BRANCH = 0.8  # at 0.5 all tokens of a row come out the same, at 1 twelve layers turn 1e-7 into 1e-2


def fit(model: nn.Module, inputs: Inputs) -> None:
    """Fit the layers' norms and linears to what they meet on these inputs (see `calibrate`), then weaken every branch.

    A deep random model is either chaotic, and then rounding hides every mistake, or it makes all tokens alike, and then
    attention does not matter. In between, stock in float32 is about 2e-6 from float64, and tokens differ by a quarter.
    """
    with torch.inference_mode(False), torch.no_grad():
        layers = encoder_layers(model)
        calibrate(layers, lambda: hidden(model, inputs))
        for layer in layers:
            entry = registry.by_class(type(layer))
            linears = Binding(layer, type(layer), entry.adapter).linears
            for linear in (linears["out"], linears["down"]):
                linear.weight.mul_(_BRANCH)
                if linear.bias is not None:
                    linear.bias.mul_(_BRANCH)
