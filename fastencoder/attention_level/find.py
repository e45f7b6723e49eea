"""Which attention modules of a model can skip padding although their layer's class is not known."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..instance_forward import change_class, is_patched
from ..layers import FastLayer
from ..namespaces import is_current
from .classes import varlen_class
from .interface import KNOWN_FUNCTIONS, call_site
from .padding import ancestors, what_reads_padding
from .varlen import AttentionState, VarlenAttention


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention module of an encoder.

    Args:
        name: dotted path from the model.
        module: the live module, converted or not.
        owner: path of the nearest model of transformers around it.
        padding_is_read: see `AttentionState`.
    """

    name: str
    module: nn.Module
    owner: str
    padding_is_read: str | None

    def convert(self) -> None:
        """Changes the class of the module."""
        varlen = varlen_class(type(self.module))
        object.__setattr__(self.module, "_fastencoder_attention", AttentionState(self.padding_is_read))
        change_class(self.module, varlen)


def find_sites(model: nn.Module, layers: Container[str]) -> list[AttentionSite]:
    """The encoder self-attention of a model that is in none of its understood `layers` and calls transformers' interface."""
    modules = dict(model.named_modules())
    known = tuple(f"{name}." for name, each in modules.items() if name and (name in layers or isinstance(each, FastLayer)))
    found = []
    for name, module in modules.items():
        if name.startswith(known) or not _is_encoder_self_attention(name, module):
            continue
        owner = _owner(name, modules)
        if owner is not None and _is_encoder_code(name, owner, modules):
            found.append(AttentionSite(name, module, owner, what_reads_padding(name, modules)))
    return found


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of an attention module, converted or not."""
    return module.original_class if isinstance(module, VarlenAttention) else type(module)


def _is_encoder_self_attention(name: str, module: nn.Module) -> bool:
    if isinstance(module, VarlenAttention):
        return True
    cls = type(module)
    if call_site(cls) is None or not is_current(cls):  # of a transformers that was imported before: ours would not be found
        return False
    if is_patched(module):
        return False
    config = vars(module).get("config")
    if getattr(config, "_attn_implementation", None) not in KNOWN_FUNCTIONS:
        return False
    words = f"{name}.{cls.__name__}".lower()
    if "decoder" in words or "cross" in words or getattr(module, "is_decoder", False):
        return False
    return getattr(module, "is_causal", True) is False


def _is_encoder_code(name: str, owner: str, modules: dict[str, nn.Module]) -> bool:
    """Whether everything between an attention module and its owner is transformers' own, and no decoder's layer."""
    for path in ancestors(name):
        if path == owner:
            return True
        cls = type(modules[path])
        if path.rpartition(".")[2].isdigit() and "Decoder" in cls.__name__:
            return False
        if not cls.__module__.startswith(("transformers.models.", "torch.nn.modules.")):
            return False
    return True


def _owner(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The nearest model around a module, or the outermost module; None if that model's attention cannot be chosen."""
    for path in ancestors(name):
        module: Any = modules.get(path)
        if hasattr(module, "_supports_attention_backend") and hasattr(module, "_supports_sdpa"):
            return path if module._supports_attention_backend or module._supports_sdpa else None
    return ""

