"""Fast classes: for each class of layers, embeddings or owners a subclass that is found again by name, as pickle needs it.

`FastBertLayer` is `getattr(fastencoder.layers.classes, "transformers/models/bert/modeling_bert:BertLayer")`: the subclass of
the class of that name, made when it is first asked for. (A dot would make pickle look for attributes of attributes.)
"""

from __future__ import annotations

import importlib
from functools import reduce

from torch import nn

from ..families.embeddings import EMBEDDINGS
from ..registry import qualified_name
from .fast_embeddings import FastEmbeddings
from .fast_layer import FastLayer
from .owners import OWNERS, FastOwner

Mixin = type[FastLayer] | type[FastEmbeddings] | type[FastOwner]

_made: dict[type[nn.Module], Mixin] = {}


def fast_class(original_class: type[nn.Module]) -> Mixin:
    """The fast subclass of a class of layers, embeddings or owners; always the same object for the same class."""
    if original_class in _made:
        return _made[original_class]
    name = qualified_name(original_class)
    mixin: Mixin = FastEmbeddings if name in EMBEDDINGS else OWNERS.get(name, FastLayer)
    fast = type(f"Fast{original_class.__name__}", (mixin, original_class), {"original_class": original_class})
    fast.__module__ = __name__
    fast.__qualname__ = f"{original_class.__module__}:{original_class.__qualname__}".replace(".", "/")
    fast.__doc__ = f"`{original_class.__qualname__}` through fused kernels."
    return _made.setdefault(original_class, fast)


def __getattr__(name: str) -> type[nn.Module]:
    module_name, colon, qualified = name.partition(":")
    try:
        if not colon:
            raise AttributeError("it is not of the form package/module:Class")
        module = importlib.import_module(module_name.replace("/", "."))
        return fast_class(reduce(getattr, qualified.split("/"), module))
    except (ImportError, AttributeError) as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: {error}") from error
