"""A stack: the layers that one forward of their owner (an encoder module) runs one after the other.

While the owner's forward runs, its fast layers may hand packed tokens to one another, so that padding is dropped before the
first and put back after the last. Hooks on the owner open and close that window; outside it, every layer takes and returns
padded hidden states. A window belongs to one thread, and to one frame: that which calls the owner.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from operator import is_
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..eligibility import CAPTURE_MODULE
from ..namespaces import namespace_of
from ..packing import PackedBatch
from ..runtime.graphs import GraphRunner
from .traffic import Traffic, is_executing

if TYPE_CHECKING:
    from .snapshot import Snapshot


@dataclass
class StackCall:
    """One forward of a stack's owner, in one thread.

    Args:
        schedule: the layers in the order in which the owner calls them.
        position: how many of them have run.
        wants_hidden_states: the owner was asked, as an argument, to return every layer's output.
        wants_attentions: the owner was asked, as an argument, to return the attention weights of the layers.
        batch: the geometry of the padded batch, once a layer has read its mask.
        read: the geometries of this call, by the very mask objects that they were read from.
        carried: the packed tensor that the last layer returned, while the tokens are packed.
        may_carry: whether tokens may travel packed in this call; None until the first layer has looked.
        packed: the batches that the owner packed itself, by the very offsets that it gave the layers.
        whole_input, whole_output: padded hidden states before the first and after the last layer, where all layers have run
            at once.
        accepted: then, the class and the arguments of a layer that was called and checked.
        snapshot: what the layers are, where that was known when the first of them was called.
        frame: that which calls the owner; None while a graph is made.
    """

    schedule: list[nn.Module]
    wants_hidden_states: bool = False
    wants_attentions: bool = False
    position: int = 0
    batch: PackedBatch | None = None
    read: list[tuple[torch.Tensor | None, PackedBatch]] = field(default_factory=list)
    carried: torch.Tensor | None = None
    may_carry: bool | None = None
    packed: list[tuple[torch.Tensor, PackedBatch]] = field(default_factory=list)
    whole_input: torch.Tensor | None = None
    whole_output: torch.Tensor | None = None
    accepted: tuple[type, tuple, dict[str, Any]] | None = None
    snapshot: Snapshot | None = None
    frame: FrameType | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the owner's forward is over, although no hook said so (KeyboardInterrupt between two layers)."""
        return self.frame is not None and not is_executing(self.frame)

    def repeats(self, layer_class: type, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether all layers have run, and this one is called with what the one before returned and otherwise with what was
        accepted."""
        if self.accepted is None or not args or args[0] is not self.carried or self.carried is None:
            return False
        known_class, known, named = self.accepted
        return (
            layer_class is known_class
            and len(args) == len(known)
            and all(map(is_, args[1:], known[1:]))
            and [*kwargs] == [*named]
            and all(map(is_, kwargs.values(), named.values()))
            and not self.has_ended
        )

    def known_batch(self, mask: torch.Tensor | None, batch: int, seqlen: int) -> PackedBatch | None:
        """The geometry that was read from this very mask for `[batch, seqlen]` tokens; None if none was."""
        for known, found in self.read:
            if known is mask and (found.batch, found.seqlen) == (batch, seqlen):
                return found
        return None

    def keep_batch(self, mask: torch.Tensor | None, batch: PackedBatch) -> None:
        """Makes `batch`, which was read from `mask`, the geometry of this call."""
        self.batch = batch
        if not any(found is batch for _, found in self.read):
            self.read.append((mask, batch))

    def packed_batch(self, values: torch.Tensor, offsets: torch.Tensor, longest: int | None = None) -> PackedBatch:
        """The batch of `values` `[T, D]` that the owner packed: read once for all layers that are given the same offsets."""
        for known, batch in self.packed:
            if known is offsets and batch.values.shape[0] == values.shape[0]:
                return batch
        batch = PackedBatch.from_offsets(values, offsets, longest)
        self.packed.append((offsets, batch))
        return batch

    def advance(self, layer: nn.Module) -> bool:
        """Counts `layer` as run. False, and nothing counted, if it is another one's turn."""
        if self.next_layer() is not layer:
            return False
        self.position += 1
        return True

    def next_layer(self) -> nn.Module | None:
        """The layer whose turn it is."""
        return self.schedule[self.position] if self.position < len(self.schedule) else None


class Stack:
    """The layers in one container of an owner module, and how the owner calls them.

    Args:
        owner_class: qualified name of the owner's class, for messages.
        path: where the layers are, as a dotted path from the owner.
        schedule: "list" or "albert" (`spec.Adapter`).
        may_carry: False if the loop around the layers is not transformers' own or keeps every layer's output: then each
            layer returns padded hidden states.
        graphs: where small batches run as CUDA graphs, if the user asked for it.
        reader: path from the converted model of the one module that reads what the loop keeps (`spec.Adapter.kept_for`); None
            if the owner's own argument says whether somebody reads it.
        traffic: which forwards of the converted model run.

    Attributes:
        snapshot: what its layers were when they last ran at once on the CPU.
    """

    def __init__(
        self,
        owner_class: str,
        path: str,
        schedule: str,
        may_carry: bool,
        graphs: GraphRunner | None = None,
        reader: str | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.owner_class = owner_class
        self.path = path
        self.schedule = schedule
        self.may_carry = may_carry
        self.graphs = graphs
        self.reader = reader
        self.traffic = traffic or Traffic()
        self.snapshot: Snapshot | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"snapshot": None}  # a copy has layers of its own

    def layers_of(self, owner: nn.Module) -> list[nn.Module]:
        """The layers in call order, as they are now."""
        container = owner.get_submodule(self.path)
        if self.schedule == "list":
            return list(container)
        # ALBERT shares layers: the group of call i is i // (calls / groups), and each group runs all of its layers.
        config = owner.config
        per_group = config.num_hidden_layers / config.num_hidden_groups
        groups = [container[int(call / per_group)] for call in range(config.num_hidden_layers)]
        return [layer for group in groups for layer in group.albert_layers]

    def install(self, owner: nn.Module, model: nn.Module) -> None:
        """Hooks the owner, and the reader of what it keeps. `remove` undoes it without trace."""
        owner.register_forward_pre_hook(_OpenStack(self), with_kwargs=True)
        owner.register_forward_hook(_CloseStack(self), always_call=True)
        if self.reader is not None:
            reader = model.get_submodule(self.reader)
            reader.register_forward_pre_hook(_OpenReader(self), with_kwargs=True)
            reader.register_forward_hook(_CloseReader(self), always_call=True)

    @staticmethod
    def installed(owner: nn.Module) -> list[Stack]:
        """The stacks that hook this module."""
        return [hook.stack for hook in owner._forward_pre_hooks.values() if isinstance(hook, _OpenStack)]

    @staticmethod
    def remove(owner: nn.Module) -> None:
        """Takes every stack's hooks off an owner or a reader, also off a copy of a hooked one."""
        for hooks, companions in (
            (owner._forward_pre_hooks, (owner._forward_pre_hooks_with_kwargs,)),
            (owner._forward_hooks, (owner._forward_hooks_with_kwargs, owner._forward_hooks_always_called)),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _HOOKS)]:
                stack = hooks.pop(key).stack
                abandon_call(stack)  # one that no hook has closed
                _local.read.pop(id(stack), None)
                for companion in companions:
                    companion.pop(key, None)


class _Local(threading.local):
    """This thread's open calls, by stack (a list, because a forward may run inside another of the same stack)."""

    def __init__(self) -> None:
        self.calls: dict[int, list[StackCall]] = {}
        # By stack: whether what its loop keeps is read, and in which frame.
        self.read: dict[int, tuple[bool, FrameType | None]] = {}


_local = _Local()


def current_call(stack: Stack | None) -> StackCall | None:
    """The innermost open call of this stack in this thread."""
    if stack is None:
        return None
    calls = _local.calls.get(id(stack))
    return calls[-1] if calls else None


def abandon_call(stack: Stack | None) -> None:
    """Forgets this stack's open calls: something went wrong in the middle of one."""
    for call in _local.calls.pop(id(stack), ()):
        if stack is not None and call.frame is not None:
            stack.traffic.leave(call.frame)


class _OpenStack:
    """Forward pre-hook of the owner."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def __call__(self, owner: nn.Module, args: tuple, kwargs: dict) -> None:
        wanted = (_argument(owner, args, kwargs, f"output_{what}") for what in ("hidden_states", "attentions"))
        call = StackCall(self.stack.layers_of(owner), *wanted)
        if self.stack.reader is not None:
            looked_at = any(not isinstance(hook, _CloseStack) for hook in owner._forward_hooks.values())
            call.wants_hidden_states = looked_at or _is_read(self.stack)
        if not torch.compiler.is_compiling():
            call.frame = sys._getframe(1)
            if not _enter(self, owner, call.frame):
                return
            calls = _local.calls.get(id(self.stack))
            if calls:
                calls[:] = [each for each in calls if not each.has_ended]
        _local.calls.setdefault(id(self.stack), []).append(call)


class _CloseStack:
    """Forward hook of the owner, called after an exception too."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def __call__(self, owner: nn.Module, args: tuple, output: object) -> None:
        calls = _local.calls.get(id(self.stack))
        if not calls:
            return
        call = calls.pop()
        if call.frame is not None:
            self.stack.traffic.leave(call.frame)
        if not calls:
            abandon_call(self.stack)
        if call.carried is not None and output is not None:
            raise RuntimeError(
                f"{self.stack.owner_class} stopped after {call.position} of {len(call.schedule)} layers, while their tokens "
                "were packed. Its loop does not run all of its layers: reverse(model), shorten the list of layers to those "
                "that run, and convert again."
            )


class _OpenReader:
    """Forward pre-hook of a stack's reader."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def __call__(self, reader: nn.Module, args: tuple, kwargs: dict) -> None:
        asked = _value(reader, args, kwargs, "output_hidden_states")
        if asked is None:
            asked = reader.config.output_hidden_states
        repeats_layers = getattr(reader, "z_steps", 0) > 1  # DeBERTa's masked decoder, on the hidden states before the last
        frame = sys._getframe(1) if not torch.compiler.is_compiling() else None
        if frame is None or _enter(self, reader, frame):
            _local.read[id(self.stack)] = bool(asked) or repeats_layers, frame


class _CloseReader:
    """Forward hook of a stack's reader, called after an exception too."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def __call__(self, reader: nn.Module, args: tuple, output: object) -> None:
        _, frame = _local.read.pop(id(self.stack), (True, None))
        if frame is not None:
            self.stack.traffic.leave(frame)


def _is_read(stack: Stack) -> bool:
    """Whether what the loop keeps is read, as far as this thread knows."""
    wanted, frame = _local.read.get(id(stack), (True, None))
    return wanted or (frame is not None and not is_executing(frame))


def _enter(hook: _OpenStack | _OpenReader, module: nn.Module, frame: FrameType) -> bool:
    """Begins a forward of `module`, unless `reverse` took the hook off while this thread waited for it."""
    hook.stack.traffic.enter(frame)
    installed = any(each is hook for each in module._forward_pre_hooks.values())
    if not installed:
        hook.stack.traffic.leave(frame)
    return installed


_HOOKS = (_OpenStack, _CloseStack, _OpenReader, _CloseReader)


def _argument(owner: nn.Module, args: tuple, kwargs: dict, name: str) -> bool:
    """Whether an optional flag of the owner's forward is set, given by name or by position."""
    return bool(_value(owner, args, kwargs, name))


def _value(owner: nn.Module, args: tuple, kwargs: dict, name: str) -> Any:
    """An argument of the owner's forward, given by name or by position; None if it is not given."""
    if name in kwargs:
        return kwargs[name]
    if not args:
        return None
    parameters = _parameters(type(owner))
    return args[parameters.index(name)] if name in parameters and parameters.index(name) < len(args) else None


def constant_in_graphs(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, which would import all of Dynamo together with this package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
@cache
def _parameters(owner_class: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(owner_class.forward).parameters)[1:]


def collected_outputs() -> frozenset[str]:
    """What transformers is recording from inside the layers in this thread: "hidden_states", "attentions", ..."""
    capturing = sys.modules.get(CAPTURE_MODULE)
    if capturing is not None:
        _watch(capturing._active_collector)
    names: set[str] = set()
    for collector in _collectors:
        names.update(collector.get() or ())
    return frozenset(names)


_collectors: list[Any] = []  # of every transformers that was imported in this process: of one, as a rule


def watch_recording(layer_class: type[nn.Module]) -> None:
    """Has `collected_outputs` look at what the transformers of this class records, although another was imported since."""
    decorator = namespace_of(layer_class).get("capture_outputs")
    collector = getattr(decorator, "__globals__", {}).get("_active_collector")
    if collector is not None:
        _watch(collector)


def _watch(collector: Any) -> None:
    if not any(collector is known for known in _collectors):
        _collectors.append(collector)
