"""What a forked child must not share with this process: signal handlers and connections.

A handler may fork: with ``multiprocessing``, a ``ProcessPoolExecutor`` or a library that uses them. The child inherits
all open files and all signal handlers. With them, a signal for the child would reach the event loop of this process,
and the server would see a connection as open until the last child has ended, although this process was killed.

`Inherited` objects drop their part in the child, before anything else runs there. The signals that this process handles
are blocked while it forks, so that a signal which comes at once finds the child without the handlers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable


class Inherited(ABC):
    """Something that a forked child inherits and must drop."""

    @property
    def signals(self) -> Iterable[signal.Signals]:
        """The signals to block while this process forks."""
        return ()

    @abstractmethod
    def drop_in_child(self) -> None:
        """Drop what the child has inherited. Called in the child, in its only thread. It must not raise or block."""


_inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()
_forking = threading.local()


def drop_in_children(inherited: Inherited) -> None:
    """From now on, every child that this process forks drops ``inherited``, as long as it exists here."""
    _inherited.add(inherited)


def keep_in_children(inherited: Inherited) -> None:
    """Undo `drop_in_children`. Has no effect if that was not called."""
    _inherited.discard(inherited)


def share_nothing(descriptor: int) -> None:
    """Let a descriptor of a child refer to the null device, instead of what it shares with the parent.

    The number stays in use, so that an object which closes it later does not close another file.
    """
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(null, descriptor)
    finally:
        os.close(null)


def _before() -> None:
    signals = {number for inherited in list(_inherited) for number in inherited.signals}
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals) if signals else None


def _in_parent() -> None:
    mask = getattr(_forking, "mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _in_child() -> None:
    for inherited in list(_inherited):
        with contextlib.suppress(Exception):  # the others are dropped all the same
            inherited.drop_in_child()
    _in_parent()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
