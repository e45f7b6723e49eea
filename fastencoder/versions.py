"""The versions of other packages that this one is tested with, in one place."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from functools import cache

# The oldest and the newest, by their first two numbers: every test runs with both.
TESTED = {
    "torch": ((2, 11), (2, 13)),
    "transformers": ((5, 17), (5, 23)),
    "triton": ((3, 6), (3, 9)),
}


@cache
def untested() -> tuple[str, ...]:
    """One line for each installed package whose version was never tested; empty as a rule."""
    found = []
    for package, (oldest, newest) in TESTED.items():
        version = installed(package)
        if version is None or oldest <= numbers(version) <= newest:
            continue
        side = "newer" if numbers(version) > newest else "older"
        found.append(f"{package} {version} is {side} than the tested versions {dotted(oldest)} to {dotted(newest)}")
    return tuple(found)


def installed(package: str) -> str | None:
    """The version that is installed; None if the package is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version; what is no number counts as 0."""
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def dotted(pair: tuple[int, int]) -> str:
    """`(2, 11)` as "2.11"."""
    return f"{pair[0]}.{pair[1]}"


_warned = False


def warn_once() -> None:
    """Says once in a process which versions were never tested, and how to find out whether that matters."""
    global _warned
    if _warned or not untested():
        return
    _warned = True
    warnings.warn(
        f"fastencoder: {'; '.join(untested())}. Layers whose source has changed have to agree with their own forward before "
        "they run fast; 'fastencoder verify MODEL' compares the rest with the original.",
        UserWarning,
        stacklevel=3,
    )
