"""Attention with a bias for every pair of positions that depends on boxes on a page, or on a grid of patches."""

from __future__ import annotations

from typing import Any

import torch

from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind, with_biases
from .position_bias import bias_features


class LayoutBias(AttentionKind):
    """The LayoutLM line: a bias by distance in reading order and one by the tokens' boxes, `[B, H, S, S]` each.

    Args:
        program: how the two are added to the scores: "v2" as they are; "v3" their sum, divided by the root of the head size;
            "boxes" (reading order of PP-DocLayout) that of the boxes as it is, or else the other one divided.
    """

    reads = frozenset({"rel_pos", "rel_2d_pos"})

    def __init__(self, program: str) -> None:
        self.program = program

    def queries_keys_values(
        self, call: LayerCall, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().queries_keys_values(call, x)
        return with_biases(call, q, k, v) if "qkv" in call.binding.linears else (q, k, v)

    def features(self, call: LayerCall) -> dict[str, Any]:
        attention = call.binding.attention
        order, boxes = call.arguments.get("rel_pos"), call.arguments.get("rel_2d_pos")
        root = call.spec.head_dim**0.5
        if self.program == "boxes":
            if boxes is not None:
                order = None
            elif not attention.has_relative_attention_bias:
                return {}
        else:
            boxes = boxes if attention.has_spatial_attention_bias else None
            order = order if attention.has_relative_attention_bias else None
            if self.program == "v3" and order is None:
                return {}
        parts = [part for part in (order, boxes) if part is not None]
        if not parts:
            return {}
        if not all(isinstance(part, torch.Tensor) and part.dim() == 4 for part in parts):
            raise Delegated("the biases on the scores are not tensors [B, H, S, S]")
        divided = self.program == "v3" or (self.program == "boxes" and boxes is None)

        def make() -> torch.Tensor:
            total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            return total / root if divided else total

        key = ("layout", self.program, *(id(part) for part in parts))
        return bias_features(call.batch, call.batch.remembered(key, parts[-1], make), call.spec.num_heads)


class GridBias(AttentionKind):
    """BEiT (https://arxiv.org/abs/2106.08254): a bias by the distance of two patches in the image, `[1, H, S, S]`.

    Each layer makes its own, with its own module, or all are given the same: as an argument, or in place of a mask.

    Args:
        owner: path from the layer of the module that has the layer's `relative_position_bias`; "" for the layer.
        shared: the argument with the bias of all layers; "" if it takes the place of the mask.
    """

    def __init__(self, owner: str, shared: str) -> None:
        self.owner = owner
        self.shared = shared or "score_bias"
        self.reads = frozenset({"interpolate_pos_encoding", "resolution", self.shared})

    def mask(self, mask: Any, arguments: dict[str, Any]) -> Any:
        if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[1] > 1 and mask.is_floating_point():
            arguments["score_bias"] = mask  # a bias by head, maybe with a mask added to it: it is added to the scores as it is
            return None
        return mask

    def features(self, call: LayerCall) -> dict[str, Any]:
        shared, own = call.arguments.get(self.shared), self._own(call)
        if shared is None and own is None:
            return {}
        bias = own if shared is None else shared if own is None else own + shared
        return bias_features(call.batch, bias, call.spec.num_heads)

    def _own(self, call: LayerCall) -> torch.Tensor | None:
        owner = call.layer.get_submodule(self.owner) if call.layer is not None else None
        module = getattr(owner, "relative_position_bias", None)
        if module is None:
            return None
        resolution, batch = call.arguments.get("resolution"), call.batch
        if not isinstance(resolution, tuple | list | torch.Size) or batch.indices is not None or not batch.seqlen:
            raise Delegated("a bias over the grid of patches, without the image's resolution or with padding")
        patch_size = getattr(owner, "patch_size", None) or owner.config.patch_size
        window = tuple(side // patch_size for side in resolution)
        interpolated = call.arguments.get("interpolate_pos_encoding") or False
        bias: torch.Tensor = module(window, interpolated, dim_size=batch.seqlen)
        return bias
