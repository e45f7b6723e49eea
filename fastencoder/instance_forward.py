"""The `forward` that an instance has in place of its class's: accelerate's hooks, and other people's patches.

accelerate puts a function on the instance that calls the hook's `pre_forward`, then `_old_forward`, the method that was there
before, then the hook's `post_forward`. So its hooks run around a fast layer as around any other, if `_old_forward` is the fast
forward: `change_class` sees to that.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

_HOOKS = "accelerate.hooks"


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes `module` an instance of `cls`, and so the methods that accelerate keeps on it."""
    old = type(module)
    module.__class__ = cls
    for name in ("forward", "_old_forward"):
        if _is_method(module, vars(module).get(name), old):
            vars(module)[name] = MethodType(cls.forward, module)


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a call ends in the forward of the module's class, whatever hooks of accelerate are around it."""
    forward = vars(module).get("forward")
    if "_hf_hook" not in vars(module):  # accelerate leaves the method there when its hook is removed
        return forward is None or _is_method(module, forward, type(module))
    around = isinstance(forward, partial) and forward.func.__module__ == _HOOKS and forward.args[0] is module
    return around and _is_method(module, vars(module).get("_old_forward"), type(module))


def is_patched(module: nn.Module) -> bool:
    """Whether a call does more than the forward of the module's class. Moving the inputs to where the module is does not
    count."""
    return not runs_own_forward(module) or not all(_only_places(hook) for hook in _hooks(module))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's weights elsewhere, and brings them for each call."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def in_one_place(modules: Iterable[nn.Module]) -> bool:
    """Whether nobody sees what these modules are given, nor moves it from one device to another."""
    devices = set()
    for module in modules:
        if "_hf_hook" in vars(module) or "forward" in vars(module):
            if is_patched(module):
                return False
            devices.update(
                torch.device(hook.execution_device) for hook in _hooks(module) if hook.execution_device is not None
            )
    return len(devices) <= 1


def _is_method(module: nn.Module, found: Any, cls: type) -> bool:
    return isinstance(found, MethodType) and found.__self__ is module and found.__func__ is cls.forward


def _hooks(module: nn.Module) -> list[Any]:
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return []
    return list(hook.hooks) if _kind(hook) == "SequentialHook" else [hook]


def _only_places(hook: Any) -> bool:
    # If it brings the weights too, they are not there: what asks finds that out by them.
    return _kind(hook) == "AlignDevicesHook"


def _kind(hook: Any) -> str | None:
    cls = type(hook)
    return cls.__name__ if cls.__module__ == _HOOKS else None
