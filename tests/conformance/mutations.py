"""Dropping one term of a stock layer at a time: what a wrong fast layer might do, done on purpose.

Each mutation has a name and a function that changes a model in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from . import weights

Mutation = tuple[str, Callable[[nn.Module], None]]
# softmax is blind to a bias of the keys: q.(k + b) = q.k + a constant of the query
_KEY = ("key", "k_proj", "k_lin", "k", "key_proj", "pos_key_proj")
_KEY_NORM = ("k_norm",)  # whose bias is one of the keys
_SCALE = ("scaling", "scale")
_POSITIONS = ("relative_position_bias_table", "rel_pos_h", "rel_pos_w", "logit_scale")
_CALLED = "continuous_position_bias_mlp"  # the fast layer calls it whole
_ROTARY = ("RotaryEmbedding", "RoFormerSinusoidalPositionalEmbedding")
_FLAGS = ("global_attention", "window")  # whether a layer attends inside the image or inside windows of it


def mutations(model: nn.Module, layers: list[nn.Module]) -> Iterator[Mutation]:
    """Every single-term mutation of each of ``layers``, which are modules of ``model``."""
    for name, layer in _named(model, layers):
        yield from _of_layer(name, layer)
    for name, module in model.named_modules():
        if type(module).__name__.endswith(_ROTARY) and not name.startswith("embedder."):  # a tower before the layers
            for table, _ in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)):
                if table in ("weight", "inv_freq") or table.endswith("attention_inv_freq") and "original" not in table:
                    yield f"{name}.{table}", _fill(name, table, 0.0)


def key_bias_mutations(model: nn.Module, layers: list[nn.Module]) -> Iterator[Mutation]:
    """Dropping a key bias, which must change nothing."""
    for name, layer in _named(model, layers):
        for inner, module in layer.named_modules():
            if isinstance(module, nn.Linear) and module.bias is not None and inner.split(".")[-1] in _KEY:
                yield f"{name}.{inner}.bias", _fill(f"{name}.{inner}", "bias", 0.0)


def _named(model: nn.Module, layers: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    wanted = {id(layer) for layer in layers}
    return ((name, module) for name, module in model.named_modules() if id(module) in wanted)


def _of_layer(name: str, layer: nn.Module) -> Iterator[Mutation]:
    for inner, module in layer.named_modules():
        path = f"{name}.{inner}" if inner else name
        if _CALLED in inner:
            continue
        if isinstance(module, nn.Linear) and module.bias is not None and inner.split(".")[-1] not in _KEY:
            yield f"{path}.bias", _fill(path, "bias", 0.0)
        if weights.is_norm(module):
            yield f"{path}.eps", _eps(path)
            if module.weight is not None:
                yield f"{path}.weight", _fill(path, "weight", 1.0)
            if getattr(module, "bias", None) is not None and inner.split(".")[-1] not in _KEY_NORM:
                yield f"{path}.bias", _fill(path, "bias", 0.0)
        for attribute in _SCALE:
            # Where torch's function takes its own scale: timm's attention, and some of SAM's.
            unread = getattr(module, "fused_attn", False) or type(module).__name__.endswith("SdpaAttention")
            if isinstance(getattr(module, attribute, None), float) and not unread:
                yield f"{path}.{attribute}", _attribute(path, attribute, 0.25 if getattr(module, attribute) == 1.0 else 1.0)
        if isinstance(module, nn.Embedding):  # a table of biases by distance
            yield f"{path}.weight", _fill(path, "weight", 0.0)
        for parameter, _ in module.named_parameters(recurse=False):
            if any(part in parameter for part in weights.LAYER_SCALES):
                nothing = 20.0 if "gate" in parameter else 0.0 if hasattr(module, "unit_offset") else 1.0  # tanh(20) = 1
                yield f"{path}.{parameter}", _fill(path, parameter, nothing)
            if parameter in _POSITIONS:
                yield f"{path}.{parameter}", _fill(path, parameter, 0.0)
        if getattr(module, "attn_logit_softcapping", None) is not None:
            yield f"{path}.attn_logit_softcapping", _attribute(path, "attn_logit_softcapping", None)
        for attribute in _FLAGS:
            if hasattr(module, attribute):
                yield f"{path}.{attribute}", _attribute(path, attribute, not getattr(module, attribute))


def _fill(path: str, parameter: str, value: float) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        with torch.no_grad():
            getattr(model.get_submodule(path), parameter).fill_(value)

    return apply


def _eps(path: str) -> Callable[[nn.Module], None]:
    return lambda model: weights.set_eps(model.get_submodule(path), 1e-12)


def _attribute(path: str, attribute: str, value: float | bool | None) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.get_submodule(path), attribute, value)
