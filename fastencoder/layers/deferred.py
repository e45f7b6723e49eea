"""An argument that all layers of a stack are given and none of the fast ones reads as it is, made only if one has to.

The tensor that a model makes before its layers (a bias `[B, H, S, S]`, a mask `[B, 1, S, S]`) travels as a `Deferred`, and the
fast layers read what it is made from. A call that is delegated is given the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..eligibility import has_foreign_hooks
from ..instance_forward import in_one_place
from .stack import Stack, StackCall, current_call


class Deferred:
    """Stands for `make()`, which is called when the original code needs it, and then once.

    Args:
        make: makes the argument as the original code would have.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._made: Any = None

    def restore(self) -> Any:
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made


class DistanceBias(Deferred):
    """A bias `[1 or B, H, S, S]` on scores that depends on the distance between key and query alone.

    Args:
        table: `[H, 2R - 1]`, by `j - i + R - 1`, as `kernels.varlen_attention` takes it.
    """

    def __init__(self, make: Callable[[], torch.Tensor], table: torch.Tensor) -> None:
        super().__init__(make)
        self.table = table


class PaddingMask(Deferred):
    """A mask `[B, 1, S, S]` of 0 and 1: what is not 0 for query and key in `tokens` `[B, S]`, a boolean tensor."""

    def __init__(self, make: Callable[[], torch.Tensor], tokens: torch.Tensor) -> None:
        super().__init__(make)
        self.tokens = tokens


def distances(seqlen: int, device: torch.device) -> torch.Tensor:
    """Between two of `seqlen` positions, all that there are: `[2 * seqlen - 1]`, ascending."""
    return torch.arange(1 - seqlen, seqlen, device=device)


def restored(value: Any) -> Any:
    """`value` as the original code would have it."""
    return value.restore() if isinstance(value, Deferred) else value


def may_defer(call: StackCall | None) -> bool:
    """Whether nobody but fast layers sees what the layers of this call are given."""
    if call is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return in_one_place(call.schedule) and all(
        hasattr(layer, "_fastencoder") and not has_foreign_hooks(layer) and layer._compiled_call_impl is None
        for layer in call.schedule
    )


def owner_may_defer(owner: nn.Module) -> bool:
    """The same, for what an owner of layers makes before it calls them."""
    stacks = Stack.installed(owner)
    return len(stacks) == 1 and may_defer(current_call(stacks[0]))
