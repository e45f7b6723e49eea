"""What is known about a class, from its name and from its source."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from .. import registry
from ..namespaces import is_current
from ..spec import Adapter
from . import live, source
from .normalised import Closure, closure
from .record import recorded
from .source import Unreadable


@dataclass(frozen=True)
class Known:
    """A class that is understood.

    Args:
        adapter: what it computes.
        like: the qualified name of the registered class whose source it has; None if it is registered itself.
        unproven: its source is not one of those that were tested, so it has to agree with its own forward first.
    """

    adapter: Adapter
    like: str | None = None
    unproven: bool = False


def find(cls: type, by_source: bool = True) -> Known | None:
    """What is known about a layer class; None if nothing is.

    Args:
        by_source: whether to read the source of a class that is not registered.
    """
    entry = registry.by_class(cls)
    if entry is None:
        return _of_same_source(cls) if by_source else None
    tested = recorded().fingerprints(entry.layer_class)
    if not tested or entry.adapter.decoder:  # another package registered it, or nothing will be made of it
        return Known(entry.adapter)
    found = fingerprint(cls)
    if found in tested or (found is not None and _adapter_of(found) == entry.adapter):
        return Known(entry.adapter)
    return Known(entry.adapter, unproven=True)


def find_all(model: nn.Module) -> dict[str, Known]:
    """What is known about the layers of a model, by their paths.

    Sources are read where layers sit: in an `nn.ModuleList`, with weights of their own.
    """
    in_lists = {id(each) for parent in model.modules() if isinstance(parent, nn.ModuleList) for each in parent}
    asked: dict[tuple[type, bool], Known | None] = {}
    found = {}
    for name, module in model.named_modules():
        cls = getattr(module, "original_class", type(module))  # of a module that is fast already
        by_source = id(module) in in_lists and any(parameter.dim() == 2 for parameter in module.parameters())
        if (cls, by_source) not in asked:
            asked[cls, by_source] = find(cls, by_source)
        known = asked[cls, by_source]
        if known is not None:
            found[name] = known
    return found


def _of_same_source(cls: type) -> Known | None:
    found = fingerprint(cls)
    adapter = None if found is None else _adapter_of(found)
    if found is None or adapter is None or adapter.decoder:
        return None
    return Known(adapter, like=_entries(found)[0].layer_class)


def _entries(found: str) -> list[registry.Entry]:
    """The registered classes with a fingerprint, as they were registered: the best known first."""
    alike = set(recorded().alike(found))
    return [entry for entry in registry.entries() if entry.layer_class in alike]


def _adapter_of(found: str) -> Adapter | None:
    """The adapter of all registered classes with a fingerprint; None if there is none, or if they do not agree."""
    entries = _entries(found)
    if not entries or any(entry.adapter != entries[0].adapter for entry in entries):
        return None
    return entries[0].adapter


_closures: WeakKeyDictionary[type, Closure | None] = WeakKeyDictionary()


def fingerprint(cls: type) -> str | None:
    """The fingerprint of a class's normalised source; None if there is no source, or other code runs than it says.

    The source is read once a class. Whether it is what runs is looked up every time: classes may be patched.
    """
    if cls not in _closures:
        _closures[cls] = _read(cls)
    found = _closures[cls]
    return found.fingerprint if found is not None and is_current(cls) and live.runs(found) else None


def _read(cls: type) -> Closure | None:
    if "." in cls.__qualname__ or cls.__module__ == "builtins" or cls.__module__.startswith("torch."):
        return None
    try:
        return closure(cls.__module__, cls.__qualname__)
    except (Unreadable, RecursionError):
        return None


def has_known_loop(owner: type, known: Known) -> bool:
    """Whether the loop around layers of a class of the same source is also one of the registered class's own file."""
    if known.like is None:
        return True
    module, _, layer = known.like.rpartition(".")
    found = fingerprint(owner)
    if found is None:
        return False
    try:
        file = source.read(module)
        loops = [name for name in file.definitions if _mentions(file.definitions[name], layer)]
        return any(closure(module, name).fingerprint == found for name in loops)
    except Unreadable:
        return False


def _mentions(statements: list[ast.stmt], name: str) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id == name
        for statement in statements
        if isinstance(statement, ast.ClassDef)
        for node in ast.walk(statement)
    )
