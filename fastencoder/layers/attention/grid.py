"""How the tokens of images lie in square windows: a permutation, so that attention inside windows is varlen attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class Windows:
    """`B` grids of `height x width` tokens, each cut into `n` windows of `size` tokens.

    Args:
        offsets: int32 `[B * n + 1]`, the windows as sequences.
        size: tokens of a window, with what it was filled up with.
        count: n.
        gather: int64 `[B * n * size]`, the token at each place of the windows; `B * height * width` at a place behind the
            edge of the image. None if the windows hold the tokens in their own order.
        back: int64 `[B * height * width]`, the place of each token; None with `gather`.
        filled: whether some places are behind the edge.
        apart: boolean `[n, size, size]`: pairs of tokens that only the shift has brought into one window; None without a shift.
    """

    offsets: torch.Tensor
    size: int
    count: int
    gather: torch.Tensor | None = None
    back: torch.Tensor | None = None
    filled: bool = False
    apart: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, ...]` -> `[B * n * size, ...]`; with places behind the edge, `x` has one more row for them."""
        return x if self.gather is None else x.index_select(0, self.gather)

    def give_back(self, x: torch.Tensor) -> torch.Tensor:
        """`[B * n * size, ...]` -> `[T, ...]`."""
        return x if self.back is None else x.index_select(0, self.back)


@lru_cache(maxsize=64)
def windows(batch: int, height: int, width: int, side: int, shift: int, device: torch.device) -> Windows:
    """The windows of `side x side` tokens of grids that are filled up at the right and the bottom and then rolled by `shift` to
    the left and upwards; `side` 0 for one window that is all of the grid."""
    with torch.inference_mode(False):
        return _cut(batch, height, width, side, shift, device)


def _cut(batch: int, height: int, width: int, side: int, shift: int, device: torch.device) -> Windows:
    tokens = height * width
    if not side or (side == height == width and not shift):
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
        return Windows(offsets, tokens, 1)
    right, bottom = -width % side, -height % side
    grid = F.pad(torch.arange(tokens).view(height, width), (0, right, 0, bottom), value=-1)
    places = _partition(grid.roll((-shift, -shift), (0, 1)), side)  # [n, size]
    count, size = places.shape
    firsts = torch.arange(batch)[:, None, None] * tokens
    gather = torch.where(places < 0, batch * tokens, places + firsts).flatten()
    back = torch.empty(batch * tokens + 1, dtype=torch.long)
    back[gather] = torch.arange(gather.shape[0])
    apart = None
    if shift:
        regions = _partition(_regions(grid.shape[0], side, shift)[:, None] * 3 + _regions(grid.shape[1], side, shift), side)
        apart = (regions[:, None] != regions[:, :, None]).to(device)
    return Windows(
        offsets=torch.arange(batch * count + 1, dtype=torch.int32, device=device) * size,
        size=size,
        count=count,
        gather=gather.to(device),
        back=back[:-1].to(device),
        filled=bool(right or bottom),
        apart=apart,
    )


def _partition(grid: torch.Tensor, side: int) -> torch.Tensor:
    """`[n * side, m * side]` -> `[n * m, side * side]`."""
    rows, columns = grid.shape[0] // side, grid.shape[1] // side
    return grid.view(rows, side, columns, side).transpose(1, 2).reshape(rows * columns, side * side)


def _regions(length: int, side: int, shift: int) -> torch.Tensor:
    """Along one axis of a rolled grid: 0 before its last window, 1 in that window's first part, 2 in what came around."""
    position = torch.arange(length)
    return (position >= length - side).long() + (position >= length - shift).long()
