"""Packed batches: real tokens only, and where they belong.

`values [T, D]` and `offsets [B + 1]` are the two halves of a jagged nested tensor; `offsets` is what flash attention calls
`cu_seqlens`. Padding may be anywhere (right, left, holes, a whole row): it is dropped once and comes back as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .kernels import pack, unpack

# Additive masks mark padding with finfo.min, -inf or -10000 (-9984 once it is rounded to bfloat16). A less negative value
# would be a bias, not a mask.
_MASKED_BELOW = -9000.0


class NotAPaddingMask(ValueError):
    """The attention mask is not the same for every query, or is a bias: padding removal cannot express it."""


@dataclass(frozen=True)
class PackedBatch:
    """A batch without padding.

    Args:
        values: `[T, D]`, the tokens of all sequences one after the other.
        offsets: int32 `[B + 1]`; sequence `b` is `values[offsets[b]:offsets[b + 1]]`.
        max_seqlen: at least the length of the longest sequence, in tokens.
        indices: int64 `[T]`, the flat position `b * S + s` of each token in the padded batch; None where there is no padding
            to put back (`T = B * S`) or no padded form.
        batch, seqlen: B and S of the padded form; `seqlen` is 0 where there is none.
    """

    values: torch.Tensor
    offsets: torch.Tensor
    max_seqlen: int
    indices: torch.Tensor | None
    batch: int
    seqlen: int

    @classmethod
    def from_padded(cls, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> PackedBatch:
        """Packs `hidden` `[B, S, D]`; `mask` `[B, S]` is nonzero at real tokens, None if all of them are real."""
        geometry = cls.geometry(hidden, mask)
        return geometry.with_values(geometry.take(hidden))

    @classmethod
    def geometry(cls, hidden: torch.Tensor, mask: torch.Tensor | None) -> PackedBatch:
        """The packed batch that `hidden` and `mask` make, with an empty `values`."""
        batch, seqlen = hidden.shape[:2]
        nothing = hidden.new_empty(0, hidden.shape[2])
        if mask is None:
            return cls(nothing, _uniform_offsets(batch, seqlen, hidden.device), seqlen, None, batch, seqlen)
        mask = mask.to(torch.bool)
        # The one host synchronisation of a forward pass: how many tokens, and how long the longest sequence is.
        lengths = mask.sum(dim=1)
        on_host = lengths.tolist()
        if min(on_host, default=seqlen) == seqlen:
            return cls(nothing, _uniform_offsets(batch, seqlen, hidden.device), seqlen, None, batch, seqlen)
        offsets = torch.zeros(batch + 1, dtype=torch.int32, device=hidden.device)
        offsets[1:] = lengths.cumsum(0)
        indices = _positions(mask.flatten(), sum(on_host))
        return cls(nothing, offsets, max(on_host), indices, batch, seqlen)

    @classmethod
    def from_offsets(cls, values: torch.Tensor, offsets: torch.Tensor, max_seqlen: int | None = None) -> PackedBatch:
        """A batch that is packed already: `values` `[T, D]`, `offsets` `[B + 1]`.

        Raises:
            ValueError: the offsets do not cover the tokens.
        """
        offsets = offsets.to(device=values.device, dtype=torch.int32)
        if max_seqlen is None or values.device.type == "cpu":
            bounds = offsets.tolist()
            lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
            if not lengths or bounds[0] != 0 or bounds[-1] != values.shape[0] or min(lengths) < 0:
                raise ValueError(
                    f"cumulative sequence lengths {bounds[:4]}...{bounds[-1:]} must rise from 0 to the number of tokens, "
                    f"{values.shape[0]}"
                )
            max_seqlen = max(lengths)
        return cls(values, offsets, int(max_seqlen), None, offsets.shape[0] - 1, 0)

    @classmethod
    def from_nested(cls, nested: torch.Tensor) -> PackedBatch:
        """The halves of a jagged nested tensor `[B, *, D]`, without a copy."""
        return cls.from_offsets(nested.values(), nested.offsets())  # type: ignore[attr-defined]

    def to_nested(self) -> torch.Tensor:
        """A jagged nested tensor `[B, *, D]` over the same memory (the offsets become int64)."""
        return _jagged(self.values, self.offsets.long(), self.max_seqlen)

    def nested_like(self, nested: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`values` `[T, D]` as a nested tensor with the very offsets of `nested`, so that the two can be added."""
        return _jagged(values, nested.offsets(), self.max_seqlen)  # type: ignore[attr-defined]

    def with_values(self, values: torch.Tensor) -> PackedBatch:
        """The same batch with other contents `[T, D]`."""
        return replace(self, values=values)

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """The real tokens `[T, D]` of a padded `[B, S, D]` with this batch's geometry."""
        if self.indices is None:
            return hidden.flatten(0, 1)
        return pack(hidden, self.indices)

    def to_padded(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, S, D]` with zeros at padding, from `values` `[T, D]` (default: this batch's own)."""
        values = self.values if values is None else values
        if not self.seqlen and self.batch:
            raise ValueError("this batch was packed by its owner: it has no padded form")
        if self.indices is None:
            return values.view(self.batch, self.seqlen, values.shape[-1])
        return unpack(values, self.indices, self.batch, self.seqlen)


def _positions(flat: torch.Tensor, count: int) -> torch.Tensor:
    """The positions of the `count` True entries of `flat`, without asking the device how many there are."""
    slot = torch.where(flat, flat.cumsum(0) - 1, count)  # everything else is written to one slot more, and dropped
    positions = torch.empty(count + 1, dtype=torch.int64, device=flat.device)
    return positions.scatter_(0, slot, torch.arange(flat.numel(), device=flat.device))[:count]


def _jagged(values: torch.Tensor, offsets: torch.Tensor, longest: int) -> torch.Tensor:
    # Without the extreme lengths to_padded_tensor would pad to the number of tokens.
    shortest = int(offsets.diff().min())
    return torch.nested.nested_tensor_from_jagged(values, offsets=offsets, min_seqlen=shortest, max_seqlen=longest)


@lru_cache(maxsize=64)
def _uniform_offsets(batch: int, seqlen: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen


def key_padding_mask(mask: torch.Tensor | None, batch: int, seqlen: int, marks: str = "tokens") -> torch.Tensor | None:
    """The `[B, S]` mask (True at real tokens) behind whatever mask reached a layer.

    Args:
        mask: None; `[B, S]` boolean or integer; or `[B or 1, 1, 1 or S, S]`, boolean (True: attend) or additive
            (0: attend; -10000, finfo.min or -inf: do not).
        marks: what a nonzero `[B, S]` entry stands for: "tokens" or "padding".

    Raises:
        NotAPaddingMask: the mask differs between queries, or holds other values, or has another shape.
    """
    if mask is None:
        return None
    if mask.dim() == 2 and mask.shape == (batch, seqlen) and not mask.is_floating_point():
        return mask.bool() if marks == "tokens" else mask == 0
    if (
        mask.dim() != 4
        or mask.shape[1] != 1
        or mask.shape[3] != seqlen
        or mask.shape[0] not in (1, batch)
        or (mask.shape[2] not in (1, seqlen))
    ):
        raise NotAPaddingMask(f"an attention mask of shape {tuple(mask.shape)}")
    if mask.shape[2] != 1 and mask.stride(2) != 0 and not torch.equal(mask, mask[:, :, :1].expand_as(mask)):
        raise NotAPaddingMask("an attention mask that differs between queries")
    row = mask[:, 0, 0].expand(batch, seqlen)
    if row.dtype == torch.bool:
        return row
    if not row.is_floating_point():
        raise NotAPaddingMask(f"an attention mask of dtype {row.dtype}")
    tokens = row == 0
    if not torch.all(tokens | (row <= _MASKED_BELOW)):
        raise NotAPaddingMask("an additive attention bias")
    return tokens
