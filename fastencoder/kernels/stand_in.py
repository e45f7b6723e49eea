"""Triton on a machine without a GPU: a driver that names a target, so that Triton's own launcher compiles for it.

A :class:`~fastencoder.kernels._triton.Launch` goes through ``JITFunction.warmup`` up to the point where a GPU would be needed.
Specialisation, options and cache keys are therefore made by the very code that makes them in a server, whatever the release
of Triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import CacheManager

from fastencoder.kernels._triton import Launch


class StandInDriver:
    """What Triton asks a driver for before it launches anything."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        """The target to compile for."""
        return self._target

    def get_current_device(self) -> str:
        """A name that no real device has: Triton keeps its compiled kernels and their target by it."""
        return f"stand-in sm_{self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        """The default stream; nothing is launched on it."""
        return 0


@contextlib.contextmanager
def standing_in(capability: tuple[int, int]) -> Iterator[None]:
    """Inside the block Triton takes this process for one on a GPU of that compute capability. For one thread at a time."""
    previous = driver._active
    driver.set_active(StandInDriver(capability))
    try:
        yield
    finally:
        driver._active = previous  # not reset_active(), which demands a GPU where there was none


def warm_up(launch: Launch) -> Any:
    """The compiled kernel of one launch for the current target, from Triton's cache where it is there."""
    return launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constants, **launch.options)


def cache_key(launch: Launch) -> str:
    """The name under which Triton's cache keeps what ``launch`` needs on the current target. Compiles nothing."""
    with _replaced(triton.knobs.cache, "manager_class", _KeyReader):
        # A kernel that this process has compiled already would not be looked up again.
        launch.kernel.device_caches.pop(driver.active.get_current_device(), None)
        try:
            warm_up(launch)
        except _Key as found:
            return found.key
    raise RuntimeError(f"Triton has compiled {launch.kernel.__name__} without looking into its cache")


class _Key(BaseException):
    """Ends a compilation before it begins. Not an Exception, which Triton might handle."""

    def __init__(self, key: str) -> None:
        self.key = key


class _KeyReader(CacheManager):
    """A cache that tells what it was asked for."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._key = key

    def get_group(self, filename: str) -> dict[str, str]:
        raise _Key(self._key)

    def get_file(self, filename: str) -> str:
        raise _Key(self._key)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        raise _Key(self._key)

    def put_group(self, filename: str, group: dict[str, str]) -> None:
        raise _Key(self._key)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """One of Triton's settings inside the block; afterwards whatever it was, also where that was the environment's."""
    before = vars(owner).get(name, _replaced)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _replaced:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
