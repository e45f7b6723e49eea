"""The names of the file that a class was made in, as its own code sees them.

`sys.modules` says nothing of a class whose file was imported anew since: transformers' `clear_import_cache` drops all of its
modules while models of the dropped classes live on.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any


def namespace_of(cls: type) -> dict[str, Any]:
    """Name -> value, at the top level of the file of `cls`; empty for a class whose file is gone and that has no function."""
    module = sys.modules.get(cls.__module__)
    if module is not None and is_current(cls):
        return vars(module)
    for value in vars(cls).values():
        function = inspect.unwrap(value) if inspect.isfunction(value) else None
        if function is not None and function.__globals__.get("__name__") == cls.__module__:
            return function.__globals__
    return {} if module is None else vars(module)


def is_current(cls: type) -> bool:
    """Whether the imported module of a class has this very class, not one of the same name, or none."""
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls
