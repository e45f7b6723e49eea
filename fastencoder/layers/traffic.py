"""Which forwards of a converted model run now, in all threads: they run side by side, and changes to the model do not.

A forward is known by the frame that runs it. So one that ended in a way that no hook sees (KeyboardInterrupt between two
layers) is found out by asking its frame, and counts no longer.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import nn
from torch.utils.data import get_worker_info

_CALLS = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}
_POLL = 0.05  # seconds after which a thread that waits looks for forwards that have ended without a word


class BusyError(RuntimeError):
    """The model cannot be changed, because a forward of it runs. The model is as it was."""


class Traffic:
    """The forwards of what one conversion has made fast.

    Attributes:
        announced: whether a warning has said that there is no memory for copies of weights.
    """

    def __init__(self) -> None:
        self.announced = False
        self._running: dict[int, list[FrameType]] = {}  # by thread, the innermost last
        self.renew()
        _known.add(self)

    def __getstate__(self) -> dict[str, object]:
        return {}  # a copy of the model has forwards of its own

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]

    def renew(self) -> None:
        """In a forked child: the other threads are gone, and with them what they held and ran."""
        me = threading.get_ident()
        self._running = {thread: frames for thread, frames in self._running.items() if thread == me}
        self._condition = threading.Condition()
        self._waiting: set[int] = set()  # threads that wait in the middle of their forward until they are alone
        self._alone: int | None = None  # the thread that is

    def enter(self, frame: FrameType) -> None:
        """Begins a forward, which lasts as long as `frame` executes or until `leave`. Waits while a thread is alone."""
        _note_threads()
        me = threading.get_ident()
        with self._condition:
            if me in self._running:
                self._running[me] = [each for each in self._running[me] if is_executing(each)]
            while not self._running.get(me) and (self._waiting or self._alone not in (None, me)):
                self._condition.wait(_POLL)
            self._running.setdefault(me, []).append(frame)

    def leave(self, frame: FrameType) -> None:
        """Ends a forward, and those inside of it."""
        me = threading.get_ident()
        with self._condition:
            frames = self._running.get(me, [])
            if frame in frames:
                del frames[frames.index(frame) :]
            if not frames:
                self._running.pop(me, None)
                if self._waiting:
                    self._condition.notify_all()

    def forward(self) -> Forward:
        """A context: one forward, which lasts as long as the block, or the function that it is in."""
        return Forward(self, sys._getframe(1))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the block no other thread computes: forwards that begin wait, and those that run have ended, or wait to be
        alone as well."""
        me = threading.get_ident()
        if self._alone == me:
            yield
            return
        with self._condition:
            self._waiting.add(me)
            try:
                while self._alone is not None or self._others():
                    self._condition.wait(_POLL)
                self._alone = me
            finally:
                self._waiting.discard(me)
                self._condition.notify_all()
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Inside the block no forward runs, and those that begin wait.

        Raises:
            BusyError: one runs now, in this thread or another.
        """
        me = threading.get_ident()
        with self._condition:
            if self._alone is not None or self._waiting or self._others() or self._executes(me):
                raise BusyError(
                    "a forward of the model runs, in this thread or another, and its layers hand packed tokens to one another: "
                    "nothing was changed. Let the forwards end, and try again."
                )
            self._alone = me
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        with self._condition:
            self._alone = None
            self._condition.notify_all()

    def _others(self) -> bool:
        me = threading.get_ident()
        return any(
            self._executes(thread) for thread in list(self._running) if thread != me and thread not in self._waiting
        )

    def _executes(self, thread: int) -> bool:
        frames = [frame for frame in self._running.get(thread, ()) if is_executing(frame)]
        if not frames:
            self._running.pop(thread, None)
        return bool(frames)


class Forward:
    """See `Traffic.forward`. A frame with itself in a variable would live on after its end, with every tensor of its callers,
    until the garbage collector comes by; this object is gone when the block ends."""

    __slots__ = ("frame", "traffic")

    def __init__(self, traffic: Traffic, frame: FrameType) -> None:
        self.traffic, self.frame = traffic, frame

    def __enter__(self) -> None:
        self.traffic.enter(self.frame)

    def __exit__(self, *_: object) -> None:
        self.traffic.leave(self.frame)


def is_executing(frame: FrameType) -> bool:
    """Whether a frame is on the stack of some thread. What a frame that has ended still holds is let go."""
    try:
        frame.clear()
    except RuntimeError:  # what `clear` raises for a frame that executes, and for no other
        return True
    return False


def others_run(model: nn.Module) -> bool:
    """Whether another thread calls a module of the model now, fast or not. Compiled modules are not seen."""
    modules = {id(module) for module in model.modules()}
    for thread, innermost in sys._current_frames().items():
        frame: FrameType | None = innermost
        while frame is not None and thread != threading.get_ident():
            if frame.f_code in _CALLS and id(frame.f_locals.get("self")) in modules:
                return True
            frame = frame.f_back
    return False


class Lock:
    """A reentrant lock that a forked child finds open, whoever held it in the parent."""

    def __init__(self) -> None:
        self.renew()
        _known.add(self)

    def renew(self) -> None:
        """In a forked child."""
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_known: weakref.WeakSet[Traffic | Lock] = weakref.WeakSet()


class _Local(threading.local):
    threads = 1  # on how many this thread has computed


_local = _Local()
_announce = False  # in a forked child that was set to one thread, until it is said


def _note_threads() -> None:
    """OpenMP's threads belong to the thread that has computed with them, and do not survive a fork."""
    global _announce
    if _announce:
        _announce = False
        if get_worker_info() is None:  # a DataLoader's workers have one thread each, and say so
            warnings.warn(
                "fastencoder: this process was forked from a thread that had computed on several threads, which OpenMP does "
                "not survive: torch was set to one thread here. Start workers with 'spawn', or compute only after the fork.",
                RuntimeWarning,
                stacklevel=3,
            )
    _local.threads = max(_local.threads, torch.get_num_threads())


def _after_fork(things: Collection[Traffic | Lock]) -> None:
    global _announce
    for thing in list(things):
        thing.renew()
    if _local.threads > 1 and torch.get_num_threads() > 1:
        # The first parallel loop of any operator would wait for ever for threads that are not there.
        torch.set_num_threads(1)
        _local.threads, _announce = 1, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _after_fork(_known))
