"""Layers that are given different masks in one forward: some see everything, some a window around each token.

transformers passes sdpa and eager attention the window inside of the mask, `[B, 1, S, S]`: it is the mask alone that says what
a layer sees. So the mask is read, and compared with what was read: key padding alone, or key padding and a band of distances.
"""

from __future__ import annotations

from typing import Any

import torch

from ...eligibility import attention_implementation
from ...kernels.padding import MASKED_BELOW, unreadable
from ...packing import PackedBatch
from ...parts import lookup
from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind


class Windowed(AttentionKind):
    """Other kinds of attention, together, inside the window that the mask shows.

    `Adapter.options["window"]` names the attribute of the layer that flash attention is given: None, or one more than the
    distance that a token sees to each side.
    """

    def __init__(self, *inner: AttentionKind) -> None:
        self.inner = inner
        self.reads = frozenset().union(*(kind.reads for kind in inner))

    def geometry(self, hidden: torch.Tensor, mask: torch.Tensor | None, marks: str) -> PackedBatch:
        if mask is None or not _differs_by_query(mask):
            batch = PackedBatch.geometry(hidden, mask, marks)
            if mask is not None:
                batch.remembered(("window", id(mask)), mask, dict)  # it is key padding and no more
            return batch
        # Every token sees itself, so the diagonal is the padding; `features` compares the rest.
        return PackedBatch.geometry(hidden, mask[:, 0].diagonal(dim1=1, dim2=2)[:, None, None], marks)

    def features(self, call: LayerCall) -> dict[str, Any]:
        features = self._window(call)
        for kind in self.inner:
            features = {**features, **kind.features(call)}
        return features

    def _window(self, call: LayerCall) -> dict[str, Any]:
        batch, mask = call.batch, call.mask
        if mask is None and batch.indices is not None:
            raise Delegated("this layer is given no mask, and those before it one with padding")
        if mask is not None and (type(mask) is not torch.Tensor or unreadable(mask, batch.batch, batch.seqlen)):
            raise Delegated("the mask is not one of these sequences")
        flash = "flash" in (attention_implementation(call.layer, call.spec.names) or "")
        if batch.seqlen == 0 or flash and (mask is None or mask.dim() == 2):
            reach = lookup(call.layer, str(call.spec.adapter.options["window"]))
            shown = {} if reach is None else {"window": (reach - 1, reach - 1)}
        else:
            shown = {}
        if mask is None:
            return shown
        whole = mask if mask.dim() == 4 else mask[:, None, None]
        return {**shown, **batch.remembered(("window", id(mask)), mask, lambda: _read(whole, batch))}


def _differs_by_query(mask: torch.Tensor) -> bool:
    """Whether a mask has memory for each query: one that is expanded over the queries cannot hold a window."""
    return mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == mask.shape[3] > 1 and mask.stride(2) != 0


def _read(mask: torch.Tensor, batch: PackedBatch) -> dict[str, Any]:
    """What a mask `[B or 1, 1, 1 or S, S]` adds to the padding of the batch, as features of `kernels.varlen_attention`.

    Raises:
        Delegated: it is anything but that padding and a band of distances between key and query.
    """
    size = batch.seqlen
    if not batch.batch * size:
        return {}
    tokens = _tokens(batch, mask.device)
    visible = mask[:, 0] == 0 if mask.is_floating_point() else mask[:, 0] != 0  # [B or 1, 1 or S, S]
    position = torch.arange(size, device=mask.device)
    distance = position - position[:, None]  # of key and query
    somewhere = visible.any(0).expand(size, size)
    left = torch.where(somewhere, -distance, 0).amax()
    right = torch.where(somewhere, distance, 0).amax()
    band = (distance >= -left) & (distance <= right)
    fits = (visible == (band & tokens[:, None])).all()
    if mask.is_floating_point():  # and not a bias
        fits &= (visible | (mask[:, 0] <= MASKED_BELOW)).all()
    first = torch.where(tokens, position, size).amin(1)
    last = torch.where(tokens, position, -1).amax(1)
    span = (last - first).amax()  # the longest distance between two tokens
    holes = ((last - first + 1 != tokens.sum(1)) & (last >= 0)).any()
    answer = torch.stack(
        (fits, left, right, span, holes)
    ).tolist()  # the host waits for the device once for such a mask
    if not answer[0]:
        raise Delegated("only key padding and windows around each token are fused, and this mask is another one")
    left, right, span = answer[1:4]
    if left >= span and right >= span:
        return {}
    return {"bias": _bias(batch, left, right)} if answer[4] else {"window": (left, right)}


def _tokens(batch: PackedBatch, device: torch.device) -> torch.Tensor:
    """bool `[B, S]`, True at the tokens of the batch."""
    shape = batch.batch, batch.seqlen
    if batch.indices is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    tokens = torch.zeros(shape, dtype=torch.bool, device=device)
    return tokens.view(-1).index_fill_(0, batch.indices.long(), True).view(shape)


def _bias(batch: PackedBatch, left: int, right: int) -> torch.Tensor:
    """The window `[B, 1, L, L]` of sequences with holes, where tokens are farther apart than it looks when they are packed."""
    position = batch.positions()
    distance = position[:, None] - position[:, :, None]
    hidden = (distance < -left) | (distance > right)
    bias = torch.zeros(hidden.shape, device=position.device).masked_fill_(hidden, float("-inf"))
    return bias[:, None]
