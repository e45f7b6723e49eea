"""Whether the code that runs is the code that was read.

A class may have been patched since it was made, and a file may have been edited since it was imported. So what the source
compiles to is compared with what the live classes and functions hold.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import types
from typing import Any

from .normalised import Closure
from .source import SourceFile

# Whose wrappers may stand around a function: they are decorators that the source shows, or those of its base classes.
_WRAPPERS = ("transformers.", "torch.", "contextlib", "functools")


def runs(closure: Closure) -> bool:
    """Whether every function of a closure is in its live module, unpatched."""
    return all(_is_live(file, name) for file, name in closure.parts)


def _is_live(file: SourceFile, name: str) -> bool:
    module = sys.modules.get(file.name)
    statements = file.definitions[name]
    if module is None or not all(isinstance(each, (ast.ClassDef, ast.FunctionDef)) for each in statements):
        return module is not None  # constants, and what is defined under conditions, are as the source says
    compiled = _compiled(file, statements[-1])
    live = vars(module).get(name)
    if isinstance(statements[-1], ast.ClassDef):
        return isinstance(live, type) and live.__module__ == file.name and _is_live_class(live, compiled)
    return _code(live) == compiled.get(name)


def _is_live_class(live: type, compiled: dict[str, types.CodeType]) -> bool:
    methods = {name: code for name, code in compiled.items() if name.count(".") == 1}
    functions = {}
    for name, value in vars(live).items():
        function = _function(value)
        if function is not None and not _is_inherited(live, name, function):
            functions[f"{live.__qualname__}.{name}"] = _code(function)
    return functions == methods


def _is_inherited(live: type, name: str, function: Any) -> bool:
    """Some base classes wrap what a subclass inherits from them, and leave it in the subclass."""
    code = _code(function)
    return code is not None and code is _code(getattr(super(live, live), name, None))


def _function(value: Any) -> Any:
    """The function behind a class attribute; None if it is data."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, functools.cached_property):
        return value.func
    return value if inspect.isfunction(value) else None


def _code(function: Any) -> types.CodeType | None:
    """The code of a function, behind the wrappers of libraries."""
    while True:
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            return getattr(function, "__code__", None)
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith(_WRAPPERS):
            return None
        function = inner


def _compiled(file: SourceFile, statement: ast.stmt) -> dict[str, types.CodeType]:
    """Qualified name -> code of the functions that a statement of a file defines."""
    tree = ast.Module(body=[*file.import_statements, statement], type_ignores=[])
    code = compile(tree, str(file.path), "exec", dont_inherit=True)
    found: dict[str, types.CodeType] = {}
    stack = [code]
    while stack:
        for constant in stack.pop().co_consts:
            if isinstance(constant, types.CodeType):
                found.setdefault(constant.co_qualname, constant)
                stack.append(constant)
    return found
