"""The window of one forward: what its masks say about padding is read once, by the first attention that gets them.

A mask is known by its identity, and only while the forward that made it runs: a tensor of another forward may have the same
address, and one that was made in inference mode can be written to without a trace. Hooks on the model that owns the attention
modules open and close the window. It belongs to one thread, and to one frame: that which calls the model.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn

from ..layers.guards import Delegated
from ..layers.traffic import Traffic, is_executing
from ..packing import NotAPaddingMask, PackedBatch


@dataclass
class Reading:
    """What a mask says.

    Args:
        mask: the mask itself: as long as it is kept here, no other tensor has its identity.
        version: the mask's version counter, which tensors of inference mode do not have.
        batch: where the real tokens are, without values; None if the mask is not key padding.
        reason: why it is not.
        padding_at_end: whether all rows have their padding behind their tokens; None as long as nobody has asked.
    """

    mask: torch.Tensor
    version: int | None
    batch: PackedBatch | None
    reason: str = ""
    padding_at_end: bool | None = None

    def holds(self, mask: torch.Tensor, version: int | None, rows: torch.Tensor) -> bool:
        """Whether this is what `mask` says about `rows` `[B, S, any]` now."""
        if self.mask is not mask or self.version != version:
            return False
        return self.batch is None or (self.batch.batch, self.batch.seqlen) == rows.shape[:2]


class _Local(threading.local):
    """This thread's open windows, the innermost last: readings by the identity of their mask."""

    def __init__(self) -> None:
        self.windows: list[dict[int, Reading]] = []
        self.frames: list[FrameType] = []  # one for each window


_local = _Local()


def read_geometry(rows: torch.Tensor, mask: torch.Tensor, padding_at_end: bool = False) -> PackedBatch:
    """Where the real tokens of `rows` `[B, S, any]` are, by an attention mask `[B or 1, 1, 1 or S, S]`.

    Args:
        padding_at_end: take no other padding than behind the tokens of a row.

    Raises:
        Delegated: the mask is not key padding, or padding is elsewhere.
    """
    _drop_ended()
    window = _local.windows[-1] if _local.windows else {}
    version = None if mask.is_inference() else mask._version
    reading = window.get(id(mask))
    if reading is None or not reading.holds(mask, version, rows):
        reading = window[id(mask)] = _read(rows, mask, version)
    if reading.batch is None:
        raise Delegated(reading.reason)
    if padding_at_end:
        if reading.padding_at_end is None:
            reading.padding_at_end = _is_at_end(reading.batch)
        if not reading.padding_at_end:
            raise Delegated("there is a bias for each pair of positions, and padding is not at the end of the rows")
    return reading.batch


def _read(rows: torch.Tensor, mask: torch.Tensor, version: int | None) -> Reading:
    try:
        return Reading(mask, version, PackedBatch.geometry(rows, mask))
    except NotAPaddingMask as error:
        return Reading(mask, version, None, f"only key padding is left out, and this is {error}")


def _is_at_end(batch: PackedBatch) -> bool:
    if batch.indices is None or batch.lengths is None:
        return batch.indices is None
    # Positions ascend, so a row of n tokens has them first exactly if the last of them is its n-th position.
    rows = [row for row, length in enumerate(batch.lengths) if length]
    expected = [row * batch.seqlen + batch.lengths[row] - 1 for row in rows]
    last = batch.offsets[[row + 1 for row in rows]].long() - 1
    return batch.indices[last].tolist() == expected


def abandon_windows() -> None:
    """Forgets this thread's windows: something went wrong in the middle of a forward."""
    _local.windows.clear()
    _local.frames.clear()


def _drop_ended() -> None:
    """Forgets windows that no hook has closed (KeyboardInterrupt between two layers)."""
    while _local.frames and not is_executing(_local.frames[-1]):
        _local.frames.pop()
        _local.windows.pop()


class Window:
    """The hooks on a model that owns attention modules."""

    @staticmethod
    def install(owner: nn.Module, traffic: Traffic) -> None:
        """Hooks the owner. `remove` undoes it without trace."""
        owner.register_forward_pre_hook(_Open(traffic))
        owner.register_forward_hook(_Close(traffic), always_call=True)

    @staticmethod
    def remove(owner: nn.Module) -> None:
        """Takes the hooks off the owner, also off a copy of a hooked owner."""
        for hooks, companions in (
            (owner._forward_pre_hooks, (owner._forward_pre_hooks_with_kwargs,)),
            (owner._forward_hooks, (owner._forward_hooks_with_kwargs, owner._forward_hooks_always_called)),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Open | _Close)]:
                del hooks[key]
                for companion in companions:
                    companion.pop(key, None)


class _Open:
    """Forward pre-hook of the owner."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def __call__(self, owner: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        frame = sys._getframe(1)
        self.traffic.enter(frame)
        if not any(hook is self for hook in owner._forward_pre_hooks.values()):  # `reverse` ran while this thread waited
            self.traffic.leave(frame)
            return
        _drop_ended()
        _local.windows.append({})
        _local.frames.append(frame)


class _Close:
    """Forward hook of the owner, called after an exception too."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def __call__(self, owner: nn.Module, args: tuple, output: object) -> None:
        if not torch.compiler.is_compiling() and _local.windows:
            _local.windows.pop()
            self.traffic.leave(_local.frames.pop())
