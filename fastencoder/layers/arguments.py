"""The arguments of a call, by the names that the original forward gives them."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from .guards import Delegated


@cache
def parameter_names(original_class: type) -> tuple[str, ...]:
    """The parameters of a class's forward that can be given by position, without self."""
    parameters = list(inspect.signature(original_class.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def first_parameter(original_class: type) -> str:
    """What a class's forward calls its input."""
    return parameter_names(original_class)[0]


def read_arguments(original_class: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Everything that was given, by name."""
    names = parameter_names(original_class)
    if len(args) > len(names):
        raise Delegated("the layer is called with more arguments than it takes")
    given = dict(zip(names, args, strict=False))
    given.update(kwargs)
    return given
