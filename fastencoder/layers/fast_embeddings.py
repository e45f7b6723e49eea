"""Fast embeddings: the embeddings of a text model and their norm in one launch on a CUDA device, and in one pass of the C++
extension on the CPU.

They take and return what the model's own embeddings do, padding included. Without the extension, and for anything unusual,
the original forward runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import kernels
from ..eligibility import touched
from ..families.embeddings import EmbeddingAdapter
from ..kernels import native
from ..kernels._dispatch import on_gpu
from .arguments import read_arguments
from .guards import Delegated, refuse_mode
from .traffic import Traffic

_REMEMBERED = 8  # shapes of batches whose default positions and types are kept


class EmbeddingState:
    """What fast embeddings know beside their parameters: `module._fastencoder_embeddings`, outside of the state_dict.

    Attributes:
        fast_calls: how many calls ran in one launch, or pass.
    """

    def __init__(self, adapter: EmbeddingAdapter, traffic: Traffic | None = None) -> None:
        self.adapter = adapter
        self.traffic = traffic or Traffic()
        self._forget()

    def _forget(self) -> None:
        self.fast_calls = 0
        self.defaults: dict[tuple, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"adapter": self.adapter, "traffic": self.traffic}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class FastEmbeddings(nn.Module):
    """Mixed in before the embeddings' own class (see `classes.fast_class`)."""

    original_class: type[nn.Module]
    _fastencoder_embeddings: EmbeddingState

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        state = getattr(self, "_fastencoder_embeddings", None)
        if state is None:  # `reverse` ran since this method was looked up
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(*args, **kwargs)
        with state.traffic.forward():
            if vars(self).get("_fastencoder_embeddings") is state:
                try:
                    return self._forward_fast(args, kwargs)
                except Delegated:
                    return super().forward(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def _forward_fast(self, args: tuple, kwargs: dict) -> torch.Tensor:
        state, parts = self._fastencoder_embeddings, self._modules  # not by attribute: nn.Module's look-up takes long
        typed = state.adapter.has_types
        table = _weight(parts["word_embeddings"])
        if not on_gpu(table.device) and (table.device.type != "cpu" or native.current == 0):
            raise Delegated("PyTorch's own operations would run, too")
        given = read_arguments(type(self).original_class, args, kwargs)
        ids, positions, types = (given.pop(name, None) for name in ("input_ids", "position_ids", "token_type_ids"))
        if any(isinstance(value, torch.Tensor) or value for value in given.values()):
            raise Delegated("other arguments are given")
        for given_ids in (ids, positions, types):
            if given_ids is not None and not _are_ids(given_ids, table):
                raise Delegated("the ids are not integers [B, S] on the device of the tables")
        if ids is None or positions is not None and positions.shape[1] != ids.shape[1]:
            raise Delegated("no token ids, or positions of other tokens")
        refuse_mode(self, table)
        norm = parts["LayerNorm"]
        _check_parts(parts, typed)
        positions, types = self._positions_and_types(ids, positions, types)
        hidden = kernels.embed_norm(
            ids.reshape(-1),
            table,
            _weight(norm),
            norm._parameters["bias"],
            norm.eps,
            position_ids=positions,
            position_table=_weight(parts["position_embeddings"]),
            type_ids=types,
            type_table=_weight(parts["token_type_embeddings"]) if typed else None,
        )
        state.fast_calls += 1
        return hidden.view(*ids.shape, table.shape[1])

    def _positions_and_types(
        self, ids: torch.Tensor, positions: torch.Tensor | None, types: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Position and type ids `[B * S]`: those that were given, or those that the class takes instead."""
        adapter = self._fastencoder_embeddings.adapter
        if positions is None and types is None and adapter.counts_padding:
            return self._defaults(ids)
        if positions is None and adapter.counts_padding:
            positions = self.position_ids[:, : ids.shape[1]]
        elif positions is None:
            positions = self.create_position_ids_from_input_ids(ids, self.padding_idx)
        if types is None and adapter.has_types:
            types = self.token_type_ids.expand(positions.shape[0], -1).gather(1, positions)
        return _flat(positions, ids), _flat(types, ids) if adapter.has_types else None

    def _defaults(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The default positions and types of a batch of this shape, made once."""
        typed = self._fastencoder_embeddings.adapter.has_types
        buffers = (self.position_ids, *((self.token_type_ids,) if typed else ()))
        watched = not any(buffer.is_inference() for buffer in buffers)  # those made in inference mode have no version
        key = (*ids.shape, *((buffer.data_ptr(), buffer._version) for buffer in buffers)) if watched else None
        known = self._fastencoder_embeddings.defaults
        if key in known:
            return known[key]
        with torch.inference_mode(False):
            positions = self.position_ids[:, : ids.shape[1]]
            types = self.token_type_ids.gather(1, positions) if typed else None
            made = _flat(positions, ids), None if types is None else _flat(types, ids)
        if watched:
            if len(known) >= _REMEMBERED:
                known.clear()
            known[key] = made
        return made


def _weight(part: nn.Module | None) -> torch.Tensor:
    """That of a part that is one of torch's own modules."""
    weight = None if part is None else part._parameters.get("weight")
    if weight is None:
        raise Delegated("a part has no weight of its own")
    return weight


def _check_parts(parts: dict[str, nn.Module | None], typed: bool) -> None:
    """They must be those of the class, unhooked: an adapter in place of a table would be left out."""
    norm, dropout = parts["LayerNorm"], parts["dropout"]
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")[: 3 if typed else 2]
    weight = _weight(norm)
    for name in names:
        table = parts[name]
        if type(table) is not nn.Embedding or touched(table) or table.max_norm is not None:
            raise Delegated("a table is not a plain nn.Embedding")
        own = _weight(table)
        if own.dtype != weight.dtype or own.device != weight.device:
            raise Delegated("the tables have another dtype or device than the norm")
    if type(norm) is not nn.LayerNorm or touched(norm):
        raise Delegated("the norm is not a plain nn.LayerNorm")
    if type(dropout) is not nn.Dropout or touched(dropout) or dropout.training:
        raise Delegated("the dropout is hooked, or in training mode")
    if len(parts) != len(names) + 2:
        raise Delegated("a part was added")


def _are_ids(ids: Any, table: torch.Tensor) -> bool:
    return (
        type(ids) is torch.Tensor
        and ids.dim() == 2
        and ids.dtype in (torch.int32, torch.int64)
        and ids.device == table.device
    )


def _flat(some: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`[B or 1, S]` -> `[B * S]`."""
    return some.expand(ids.shape).reshape(-1)
