"""Attention inside the windows of an image: Swin's, which are shifted in every other layer, and those of ViTDet and SAM."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels import varlen_attention
from ...parts import lookup
from ..guards import Delegated
from .call import LayerCall
from .grid import Windows, windows
from .kind import AttentionKind

_APART = -100.0  # what Swin adds to the scores of tokens that are no neighbours: less than infinity, and not always enough
_LARGEST_LOGIT_SCALE = math.log(100.0)  # SwinV2's


class GridWindows(AttentionKind):
    """Attention inside each window of a grid of tokens. A place behind the edge holds a zero, projected like a token."""

    def cut(self, call: LayerCall) -> Windows:
        """The windows of this layer for this call. May raise Delegated."""
        raise NotImplementedError

    def scores(
        self, call: LayerCall, cut: Windows, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, float, dict[str, Any]]:
        """Queries and keys `[places, H, d]` as they are multiplied, the factor on their products, and what is added."""
        raise NotImplementedError

    def attend(self, call: LayerCall, x: torch.Tensor) -> torch.Tensor:
        cut = self.cut(call)
        if cut.filled:
            padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
            q, k, v = (cut.take(part) for part in self.queries_keys_values(call, padded))
        else:
            q, k, v = self.queries_keys_values(call, cut.take(x))
        q, k, scale, features = self.scores(call, cut, q, k)
        mixed = varlen_attention(q, k, v, cut.offsets, cut.size, scale, **features)
        return cut.give_back(mixed.flatten(1))


class ShiftedWindows(GridWindows):
    """Swin (https://arxiv.org/abs/2103.14030): `input_dimensions` is the grid, `(height, width)`.

    `options["bias"]` is the path of the module with `relative_position_bias_table` and `relative_position_index`.
    """

    reads = frozenset({"input_dimensions", "always_partition"})
    times_apart = 1  # how often the layer's code adds its mask

    def cut(self, call: LayerCall) -> Windows:
        layer, batch = call.layer, call.batch
        dimensions = call.arguments.get("input_dimensions")
        try:
            height, width = (int(side) for side in dimensions)
        except (TypeError, ValueError):
            raise Delegated("input_dimensions is not a pair of numbers") from None
        if batch.indices is not None or height * width != batch.seqlen:
            raise Delegated("the tokens are not a full grid")
        if not call.arguments.get("always_partition") and hasattr(layer, "set_shift_and_window_size"):
            layer.set_shift_and_window_size((height, width))  # the layer remembers this, for later calls too
        side, shift = int(layer.window_size), int(layer.shift_size)
        if self.index(call).numel() != side**4:
            raise Delegated("the window is not the one that the layer has relative positions for")
        return windows(batch.batch, height, width, side, max(shift, 0), batch.offsets.device)

    def index(self, call: LayerCall) -> torch.Tensor:
        return lookup(call.layer, f"{call.spec.adapter.options['bias']}.relative_position_index")

    def table(self, call: LayerCall) -> torch.Tensor:
        """A bias for every distance between two places, `[(2 * side - 1) ** 2, H]`."""
        return lookup(call.layer, f"{call.spec.adapter.options['bias']}.relative_position_bias_table")

    def scores(
        self, call: LayerCall, cut: Windows, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, float, dict[str, Any]]:
        table = self.table(call).float() if q.dtype != torch.float64 else self.table(call)
        bias = table[self.index(call).flatten()].view(cut.size, cut.size, -1).permute(2, 0, 1)[None]  # [1, H, size, size]
        if cut.apart is not None:
            apart = torch.zeros(cut.apart.shape, dtype=bias.dtype, device=bias.device)
            apart.masked_fill_(cut.apart, self.times_apart * _APART)
            bias = (bias + apart[:, None]).repeat(call.batch.batch, 1, 1, 1)
        return q, k, call.binding.scale, {"bias": bias.contiguous()}


class CosineWindows(ShiftedWindows):
    """SwinV2 (https://arxiv.org/abs/2111.09883): scores are cosines with a learned factor, a small network makes the bias."""

    times_apart = 2

    def table(self, call: LayerCall) -> torch.Tensor:
        attention = lookup(call.layer, call.spec.adapter.options["bias"])
        made = attention.continuous_position_bias_mlp(attention.relative_coords_table)
        return 16 * torch.sigmoid(made.view(-1, call.spec.num_heads))

    def scores(
        self, call: LayerCall, cut: Windows, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, float, dict[str, Any]]:
        attention = lookup(call.layer, call.spec.adapter.options["bias"])
        factor = attention.logit_scale.clamp(max=_LARGEST_LOGIT_SCALE).exp().view(-1, 1).to(q.dtype)
        _, _, _, features = super().scores(call, cut, q, k)
        return F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), 1.0, features


class DecomposedWindows(GridWindows):
    """ViTDet (https://arxiv.org/abs/2203.16527) and SAM: every window, or the whole grid where `window_size` is 0, with a
    bias that is a product of each query with a vector for the row and one for the column of the key.

    The fast layer adds the argument `grid`, `(height, width)`.
    """

    def cut(self, call: LayerCall) -> Windows:
        batch, (height, width) = call.batch, call.arguments["grid"]
        side = int(getattr(call.layer, "window_size", 0) or 0)
        return windows(batch.batch, height, width, side, 0, batch.offsets.device)

    def scores(
        self, call: LayerCall, cut: Windows, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, float, dict[str, Any]]:
        attention = call.binding.attention
        if getattr(attention, "rel_pos_h", None) is None:
            return q, k, call.binding.scale, {}
        side = int(getattr(call.layer, "window_size", 0) or 0)
        height, width = (side, side) if side else call.arguments["grid"]
        grid = q.view(-1, height, width, *q.shape[1:])  # [windows, height, width, H, d]
        rows = torch.einsum("nyxhd,ykd->nyxhk", grid, _by_distance(attention.rel_pos_h, height).to(q.dtype))
        columns = torch.einsum("nyxhd,xkd->nyxhk", grid, _by_distance(attention.rel_pos_w, width).to(q.dtype))
        decomposed = rows.flatten(0, 2).contiguous(), columns.flatten(0, 2).contiguous()
        return q, k, call.binding.scale, {"decomposed": decomposed}


def _by_distance(table: torch.Tensor, size: int) -> torch.Tensor:
    """Vectors `[2 * L - 1, d]` for the distances along an axis -> `[size, size, d]`, query by key; other sizes are
    interpolated."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    position = torch.arange(size, device=table.device)
    return table[position[:, None] - position + size - 1]
