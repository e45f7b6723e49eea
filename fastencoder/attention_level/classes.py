"""Varlen classes: for each attention class a subclass that can be found again by name, as pickle and deepcopy need.

As in `fastencoder.layers.classes`: `transformers/models/dia/modeling_dia:DiaSelfAttention` is an attribute of this module,
made when it is first asked for, also by a process that unpickles a converted model.
"""

from __future__ import annotations

import importlib
from functools import reduce

from torch import nn

from .interface import register_functions
from .varlen import VarlenAttention

_made: dict[type[nn.Module], type[VarlenAttention]] = {}


def varlen_class(original_class: type[nn.Module]) -> type[VarlenAttention]:
    """The varlen subclass of an attention class; always the same object for the same class."""
    if original_class in _made:
        return _made[original_class]
    register_functions()
    bases = (VarlenAttention, original_class)
    varlen = type(f"Varlen{original_class.__name__}", bases, {"original_class": original_class})
    varlen.__module__ = __name__
    varlen.__qualname__ = f"{original_class.__module__}:{original_class.__qualname__}".replace(".", "/")
    varlen.__doc__ = f"`{original_class.__qualname__}`, whose attention skips padding."
    return _made.setdefault(original_class, varlen)


def __getattr__(name: str) -> type[VarlenAttention]:
    module_name, colon, qualified = name.partition(":")
    try:
        if not colon:
            raise AttributeError("it is not of the form package/module:Class")
        module = importlib.import_module(module_name.replace("/", "."))
        return varlen_class(reduce(getattr, qualified.split("/"), module))
    except (ImportError, AttributeError) as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: {error}") from error
