"""Small models around layers that are not transformers'."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .absent import Absent


class TorchEncoder(nn.Module):
    """An embedding and `nn.TransformerEncoder`. `mask` is what the padding mask is made into; `pairs` a mask of queries and
    keys that goes with it."""

    def __init__(self, config: types.SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(60, config.layer["d_model"])
        norm = nn.LayerNorm(config.layer["d_model"]) if config.norm else None
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**config.layer), config.layers, norm, enable_nested_tensor=config.nested
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> dict[str, Any]:
        hidden = self.embed(input_ids)
        padding = None if attention_mask is None else attention_mask == 0
        if padding is not None and self.config.mask == "float":
            padding = torch.zeros(padding.shape, dtype=hidden.dtype).masked_fill(padding, float("-inf"))
        batch, size = input_ids.shape
        pairs = None
        if self.config.pairs != "none":
            blocked = torch.ones(size, size).triu(1).bool()
            if self.config.pairs == "by head":
                heads = self.config.layer["nhead"]
                blocked = (torch.arange(batch * heads)[:, None, None] * 7 + torch.arange(size)[:, None] * 5) % 3 == 0
                blocked = blocked & (torch.arange(size) % 2 == 1) & ~torch.eye(size).bool()
            pairs = blocked if self.config.pairs == "by head" else torch.zeros(size, size).masked_fill(blocked, -torch.inf)
            pairs = pairs if pairs.dtype == torch.bool else pairs.to(hidden.dtype)
        batch_first = self.config.layer["batch_first"]
        hidden = hidden if batch_first else hidden.transpose(0, 1)
        hidden = self.encoder(hidden, mask=pairs, src_key_padding_mask=padding)
        return {"last_hidden_state": hidden if batch_first else hidden.transpose(0, 1)}


class TimmEncoder(nn.Module):
    """timm's blocks over embeddings, called with a mask if there is one."""

    def __init__(self, config: types.SimpleNamespace) -> None:
        super().__init__()
        import_timm()
        from timm.layers import mlp
        from timm.models.vision_transformer import Block

        self.config = config
        self.embed = nn.Embedding(60, config.block["dim"])
        more = dict(config.block)
        if "mlp_layer" in more:
            more["mlp_layer"] = getattr(mlp, more["mlp_layer"])
        self.blocks = nn.Sequential(*(Block(**more) for _ in range(2)))
        for block in self.blocks:
            block.attn.fused_attn = config.fused

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> dict[str, Any]:
        hidden = self.embed(input_ids)
        if attention_mask is None:
            hidden = self.blocks(hidden)
        else:
            for block in self.blocks:
                hidden = block(hidden, attn_mask=attention_mask.bool()[:, None, None])
        return {"last_hidden_state": hidden}


class _Stub(type):
    """Classes that have any attribute: its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """timm imports torchvision, of which its transformers use nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _Stub(name, (), {}) if not name.startswith("__") else _missing(name)  # type: ignore
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _missing(name: str) -> Any:
    raise AttributeError(name)


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    finder = _NoTorchvision()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def import_timm() -> None:
    """Imports timm, with or without torchvision. Raises Absent if it is not installed."""
    if "timm" in sys.modules:
        return
    if importlib.util.find_spec("timm") is None:
        raise Absent("timm is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        importlib.import_module("timm.models.vision_transformer")
        return
    with _without_torchvision():
        importlib.import_module("timm.models.vision_transformer")
