"""Fast classes: for each layer class a subclass that can be found again by name, as pickle and deepcopy need.

`FastBertLayer` is `getattr(fastencoder.layers.classes, "transformers/models/bert/modeling_bert:BertLayer")`: the subclass of
the class of that name, made when it is first asked for. (A dot would make pickle look for attributes of attributes.)
"""

from __future__ import annotations

import importlib
from functools import reduce

from torch import nn

from .fast_layer import FastLayer

_made: dict[type[nn.Module], type[FastLayer]] = {}


def fast_class(layer_class: type[nn.Module]) -> type[FastLayer]:
    """The fast subclass of a layer class; always the same object for the same class."""
    if layer_class in _made:
        return _made[layer_class]
    fast = type(f"Fast{layer_class.__name__}", (FastLayer, layer_class), {"original_class": layer_class})
    fast.__module__ = __name__
    fast.__qualname__ = f"{layer_class.__module__}:{layer_class.__qualname__}".replace(".", "/")
    fast.__doc__ = f"`{layer_class.__qualname__}` on packed tokens, through fused kernels."
    return _made.setdefault(layer_class, fast)


def __getattr__(name: str) -> type[FastLayer]:
    module_name, colon, qualified = name.partition(":")
    try:
        if not colon:
            raise AttributeError("it is not of the form package/module:Class")
        module = importlib.import_module(module_name.replace("/", "."))
        return fast_class(reduce(getattr, qualified.split("/"), module))
    except (ImportError, AttributeError) as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: {error}") from error
