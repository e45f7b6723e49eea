"""Layers that are given something about each token beside the hidden states, and add it after their two blocks."""

from __future__ import annotations

import torch

from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind
from .windowed import Windowed


class PerLayerInput(Windowed):
    """EmbeddingGemma 2: the module `ple_block` mixes `per_layer_input` `[B, S, P]` in, and a number scales what comes out."""

    def __init__(self, *inner: AttentionKind) -> None:
        super().__init__(*inner)
        self.reads = self.reads | {"per_layer_input"}

    def finish(self, call: LayerCall, x: torch.Tensor) -> torch.Tensor:
        given, batch, layer = call.arguments.get("per_layer_input"), call.batch, call.layer
        if not isinstance(given, torch.Tensor) or given.shape[:2] != (batch.batch, batch.seqlen):
            raise Delegated("per_layer_input is not one of these sequences")
        own = x.to(call.projections.dtype)
        mixed: torch.Tensor = layer.ple_block(own.unsqueeze(0), batch.take(given).unsqueeze(0))[0]
        return (mixed * layer.layer_scalar).to(x.dtype)
