"""Attention inside the windows of an image, with the rotation by row and column of SAM 3 (https://arxiv.org/abs/2511.16719)."""

from __future__ import annotations

from typing import Any

import torch

from ..guards import Delegated
from .call import LayerCall
from .grid import Windows
from .windows import DecomposedWindows


class TurnedWindows(DecomposedWindows):
    """The layer has its own tables: `rotary_emb` makes them of `position_ids` `[N, 2]`, for the places of one window."""

    def scores(
        self, call: LayerCall, cut: Windows, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, float, dict[str, Any]]:
        layer: Any = call.layer
        tables = layer.rotary_emb(q, layer.position_ids)  # twice [1, N, d], each angle twice side by side
        if any(table.shape != (1, cut.size, q.shape[-1]) for table in tables):
            raise Delegated("the image is not of the size that the layer has positions for")
        cos, sin = (table[0, :, ::2].repeat(q.shape[0] // cut.size, 1) for table in tables)
        return q, k, call.binding.scale, {"rope": (cos, sin, True)}
