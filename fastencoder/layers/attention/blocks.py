"""Images in one row under a block-diagonal mask, as Pixtral has them (https://arxiv.org/abs/2410.07073): each is a sequence."""

from __future__ import annotations

from itertools import accumulate

import torch

from ...packing import NotAPaddingMask, PackedBatch
from .vision_rope import VisionRope


class BlockDiagonalRope(VisionRope):
    """`VisionRope` for tokens `[1, T, D]` and a mask `[1, 1, T, T]` that lets each token see its own image only."""

    def geometry(self, hidden: torch.Tensor, mask: torch.Tensor | None, marks: str) -> PackedBatch:
        if mask is None or mask.dim() != 4 or hidden.shape[0] != 1:
            return super().geometry(hidden, mask, marks)
        tokens = hidden.shape[1]
        lengths = block_lengths(mask, tokens)
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=hidden.device)
        nothing = hidden.new_empty(0, hidden.shape[2])
        return PackedBatch(nothing, offsets, max(lengths), None, 1, tokens, lengths)


def block_lengths(mask: torch.Tensor, tokens: int) -> tuple[int, ...]:
    """The lengths of the blocks of a block-diagonal mask `[1, 1, T, T]`: boolean (True: attend), or additive with 0 inside the
    blocks and its dtype's lowest value or -inf outside.

    Raises:
        NotAPaddingMask: it is anything else.
    """
    if mask.shape != (1, 1, tokens, tokens) or not tokens:
        raise NotAPaddingMask(f"a mask {tuple(mask.shape)} for one row of {tokens} tokens")
    square = mask[0, 0]
    if mask.dtype == torch.bool:
        inside, readable = square, torch.ones((), dtype=torch.bool, device=mask.device)
    elif mask.is_floating_point():
        inside = square == 0
        readable = (inside | (square <= torch.finfo(mask.dtype).min)).all()
    else:
        raise NotAPaddingMask(f"a mask of {mask.dtype}")
    starts = torch.ones(tokens, dtype=torch.bool, device=mask.device)
    starts[1:] = ~inside.diagonal(-1)  # a token that does not see the one before it begins a block
    block = starts.cumsum(0)
    whole = (inside == (block[:, None] == block[None, :])).all() & readable
    answer = torch.cat((whole[None], starts)).tolist()  # the host waits once
    if not answer[0]:
        raise NotAPaddingMask("an attention mask that is not block-diagonal")
    bounds = [token for token, start in enumerate(answer[1:]) if start] + [tokens]
    return tuple(end - start for start, end in zip(bounds, bounds[1:], strict=False))
