"""sentence-transformers' `unpad_inputs=True` for a converted model: texts reach the fast layers without any padding.

sentence-transformers can give a model all tokens of a batch in one row `[1, T]` with the cumulative lengths (`cu_seq_lens_q`),
and pools what comes out by those lengths. By itself it does so where the attention is flash attention. Fast layers understand
the lengths on every device, so a converted model may be asked for it too. Nothing of sentence-transformers is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from . import registry
from .layers import Delegated, FastLayer
from .layers.guards import refuse_mode

_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
# Of these the whole forward was tested on packed tokens: embeddings read `position_ids`, and the lengths reach every layer.
_FAMILIES = (
    "albert.modeling_albert.Albert",
    "bert.modeling_bert.Bert",
    "camembert.modeling_camembert.Camembert",
    "distilbert.modeling_distilbert.DistilBert",
    "electra.modeling_electra.Electra",
    "ernie.modeling_ernie.Ernie",
    "jina_embeddings_v3.modeling_jina_embeddings_v3.JinaEmbeddingsV3",
    "nomic_bert.modeling_nomic_bert.NomicBert",
    "roberta.modeling_roberta.Roberta",
    "xlm_roberta.modeling_xlm_roberta.XLMRoberta",
    "xlm_roberta_xl.modeling_xlm_roberta_xl.XLMRobertaXL",
)
TAKE_PACKED_TOKENS = frozenset(
    f"transformers.models.{name}{head}" for name in _FAMILIES for head in ("Model", "ForMaskedLM")
)
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def install(model: nn.Module) -> None:
    """Lets every Transformer module of sentence-transformers in a converted model be asked for unpadding."""
    for module in _transformers(model):
        layers = [layer for layer in module.model.modules() if isinstance(layer, FastLayer)]
        if registry.qualified_name(type(module.model)) in TAKE_PACKED_TOKENS and len(layers) == _layers(module.model):
            module._can_flatten_inputs = CanFlatten(module)
            if module.unpad_inputs:
                module.unpad_inputs = True


def remove(model: nn.Module) -> None:
    """Undoes `install`."""
    for module in _transformers(model):
        asked = vars(module).pop("_can_flatten_inputs", None)
        if isinstance(asked, CanFlatten):
            asked.forget()
            module.can_flatten_inputs = module.unpad_inputs is not False and module._can_flatten_inputs()


def _transformers(model: nn.Module) -> Iterable[Any]:
    """Those of a release that can unpad."""
    for module in model.modules():
        if registry.qualified_name(type(module)) == _TRANSFORMER and hasattr(module, "can_flatten_inputs"):
            yield module


def _layers(model: nn.Module) -> int:
    """How many layer modules there are: ALBERT's share their weights."""
    config: Any = model.config
    return (
        config.num_hidden_groups * config.inner_group_num
        if hasattr(config, "inner_group_num")
        else config.num_hidden_layers
    )


class CanFlatten:
    """Stands for the method `_can_flatten_inputs` of one Transformer module, which is asked whenever `unpad_inputs` is set."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.kept: dict[str, Any] | None = None

    def __call__(self) -> bool:
        module = self.module
        self.forget()
        if type(module)._can_flatten_inputs(module):  # flash attention
            return True
        if module.unpad_inputs is not True:
            return False
        names = ("data_collator", "model_forward_params", "_flatten_position_offset")
        self.kept = {name: vars(module)[name] for name in names if name in vars(module)}
        module.data_collator = PackTexts(module, module._infer_flatten_position_offset())
        module._flatten_position_offset = 0  # the positions are right already
        if module.model_forward_params is not None:
            module.model_forward_params = module.model_forward_params.union(_LENGTHS)
        return True

    def forget(self) -> None:
        """Gives the module back what it had."""
        if self.kept is not None:
            for name in ("data_collator", "_flatten_position_offset"):
                vars(self.module).pop(name, None)
            vars(self.module).update(self.kept)
            self.kept = None


class PackTexts:
    """Makes a batch of tokenised texts: one row without padding, or padded rows while the original layers would have to run.

    Args:
        module: the Transformer module.
        first: the position of the first token of a text.
    """

    def __init__(self, module: Any, first: int) -> None:
        self.module = module
        self.first = first

    def __call__(self, texts: list[dict[str, list[int]]]) -> dict[str, Any]:
        """`input_ids`, `position_ids`, `seq_idx` (and `token_type_ids`, where there are any) `[1, T]`, int64 and int32, and the
        lengths as flash attention takes them; or what the tokenizer's `pad` returns."""
        if not self._layers_are_fast():
            return dict(self.module.tokenizer.pad(texts, padding=True, return_attention_mask=True, return_tensors="pt"))
        lengths = [len(text["input_ids"]) for text in texts]
        batch: dict[str, Any] = {
            name: torch.tensor([[value for text in texts for value in text[name]]])
            for name in ("input_ids", "token_type_ids")
            if name in texts[0]
        }
        batch["position_ids"] = torch.cat([torch.arange(self.first, self.first + length) for length in lengths])[None]
        counts = torch.tensor(lengths)
        batch["seq_idx"] = torch.arange(len(texts), dtype=torch.int32).repeat_interleave(counts)[None]
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = offsets
        batch["max_length_q"] = batch["max_length_k"] = max(lengths)
        return batch

    def _layers_are_fast(self) -> bool:
        layers = [layer for layer in self.module.model.modules() if isinstance(layer, FastLayer)]
        if len(layers) < _layers(self.module.model):
            return False
        try:
            for layer in layers:
                refuse_mode(layer, next(layer.parameters()))
                layer._fastencoder.ready(layer)
        except Delegated:
            return False
        return True
