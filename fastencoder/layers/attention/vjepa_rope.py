"""The rotation of V-JEPA 2 (https://arxiv.org/abs/2506.09985): frame, row and column each turn a third of a head.

Not a rotation in the strict sense: neighbours (2i, 2i + 1) are mixed with two different angles, because the angles of a third
are repeated block by block while its pairs are neighbours. So it is computed here, before the attention.
"""

from __future__ import annotations

from typing import Any

import torch

from ...kernels import varlen_attention
from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind


class VJepaRope(AttentionKind):
    """Positions count through frames, rows and columns, or are given by `position_mask` `[B, S]`."""

    reads = frozenset({"position_mask"})

    def attend(self, call: LayerCall, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.queries_keys_values(call, x)
        batch = call.batch
        cos, sin = self._tables(call)
        q, k = (_mix(part, cos.to(x.dtype), sin.to(x.dtype)) for part in (q, k))
        return varlen_attention(
            q, k, v, batch.offsets, batch.max_seqlen, call.binding.scale, tiles=batch.tiles(call.spec.head_dim, x.dtype)
        ).flatten(1)

    def _tables(self, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[T, 1, r]`, made once for a batch, in the dtype in which the model makes them."""
        batch, attention = call.batch, call.binding.attention
        ids = call.arguments.get("position_mask")
        if not batch.seqlen:
            raise Delegated("positions of a packed batch are not known")
        if ids is not None and (not isinstance(ids, torch.Tensor) or ids.shape != (batch.batch, batch.seqlen)):
            raise Delegated("position_mask is not [B, S]")
        widths = (attention.d_dim, attention.h_dim, attention.w_dim)
        key = ("vjepa", attention.grid_size, widths, call.projections.dtype, None if ids is None else id(ids))

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            given = torch.arange(batch.seqlen, device=batch.offsets.device)[None] if ids is None else ids
            angles = _angles(given, attention.grid_size, widths, call.projections.dtype)
            cos, sin = (batch.per_token(table, _unchanged) for table in (angles.cos(), angles.sin()))
            return cos[:, None], sin[:, None]

        tables: tuple[torch.Tensor, torch.Tensor] = batch.remembered(key, batch.offsets if ids is None else ids, make)
        return tables


def _angles(ids: torch.Tensor, side: int, widths: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Positions `[B or 1, S]` in a grid of `side` by `side` patches a frame -> angles `[B or 1, S, sum(widths)]`."""
    inside = ids % side**2
    parts: list[Any] = []
    for position, width in zip((ids // side**2, inside // side, inside % side), widths, strict=True):
        steps = torch.arange(width // 2, dtype=dtype, device=ids.device) / (width / 2.0)
        parts.append((position[..., None] * (1.0 / 10000**steps)).repeat(1, 1, 2))
    return torch.cat(parts, dim=-1)


def _mix(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`[T, H, d]` with its first `r` dimensions turned by `[T, 1, r]`."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    crossed = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((turned * cos + crossed * sin, rest), dim=-1)


def _unchanged(table: torch.Tensor) -> torch.Tensor:
    return table
