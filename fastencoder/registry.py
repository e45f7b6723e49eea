"""Which layer classes are understood: layer class -> adapter, asked by class or by model type.

The key is the exact qualified name of the class (`transformers.models.bert.modeling_bert.BertLayer`), so a class of
another module with the same name, or a subclass, is never mistaken for it. Nothing is imported to fill the registry.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from torch import nn

from .families import builtin_adapters
from .spec import Adapter


@dataclass(frozen=True)
class Entry:
    """One layer class of the registry. `model_types` are the `config.model_type`s known to use it."""

    layer_class: str
    adapter: Adapter
    model_types: tuple[str, ...] = ()

    def load(self) -> type[nn.Module]:
        """The class itself; `fastencoder.layers.fast_class` of it is its fast layer.

        Raises:
            ImportError: the installed version of its package does not have it.
        """
        module, _, name = self.layer_class.rpartition(".")
        try:
            loaded: type[nn.Module] = getattr(importlib.import_module(module), name)
        except AttributeError:
            raise ImportError(f"{module} has no {name}") from None
        return loaded


_entries: dict[str, Entry] = {name: Entry(name, adapter, types) for name, adapter, types in builtin_adapters()}


def qualified_name(cls: type) -> str:
    """`package.module.Class`, the registry's key."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register(layer_class: str, adapter: Adapter, model_types: tuple[str, ...] = ()) -> None:
    """Adds a layer class, so that `to_fast` understands models that contain it.

    Args:
        layer_class: the exact qualified name, `"package.module.MyLayer"`; the class need not be imported yet.
        adapter: where the class keeps its parts and which family it computes (`fastencoder.spec.Adapter`).
        model_types: the model types that use it, for look-ups by type.

    Raises:
        TypeError: `layer_class` is not a dotted name or `adapter` is not an `Adapter`.
        ValueError: the class is registered already, with another adapter.
    """
    if not isinstance(layer_class, str) or "." not in layer_class:
        raise TypeError(f"register() takes a qualified name such as 'package.module.MyLayer', not {layer_class!r}.")
    if not isinstance(adapter, Adapter):
        raise TypeError(f"register() takes a fastencoder.spec.Adapter, not {type(adapter).__name__}.")
    known = _entries.get(layer_class)
    if known is not None and known.adapter != adapter:
        raise ValueError(f"{layer_class} is registered already with another adapter; unregister() it first.")
    _entries[layer_class] = Entry(layer_class, adapter, tuple(model_types))


def unregister(layer_class: str) -> None:
    """Removes a layer class. Raises KeyError if it is not registered."""
    del _entries[layer_class]


def entries() -> list[Entry]:
    """Every registered layer class."""
    return list(_entries.values())


def by_class(layer_class: type | str) -> Entry | None:
    """The entry of exactly this class (or qualified name), or None. Subclasses do not count."""
    name = layer_class if isinstance(layer_class, str) else qualified_name(layer_class)
    return _entries.get(name)


def by_model_type(model_type: str) -> list[Entry]:
    """The entries whose layer classes occur in models of this `config.model_type`; empty if there are none."""
    return [entry for entry in _entries.values() if model_type in entry.model_types]
