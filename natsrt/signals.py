"""Signals that ask a process to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from natsrt.forks import Inherited, drop_in_children, keep_in_children

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""A process manager, Ctrl-C, and a terminal that was closed."""

_ONE_REQUEST = 0.5
"""Seconds within which several signals are one request. Terminals and process managers such as ``uv run`` both pass
Ctrl-C on, so it arrives twice."""


class StopSignals(Inherited):
    """Handles signals that ask this process to stop, as long as its ``with`` block runs in an event loop.

    The first signal sets ``received`` and calls ``first``. Each later one calls ``again``, unless it comes within half
    a second of one that counted.

    Children that the process forks get the former handlers; SIGINT ends them, without KeyboardInterrupt. A signal that
    the process ignores stays ignored, such as SIGHUP under ``nohup``. Blocks may be nested: the innermost one receives
    the signals.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = STOP_SIGNALS,
        *,
        first: Callable[[], object] = lambda: None,
        again: Callable[[], object] = lambda: None,
    ) -> None:
        self.received: asyncio.Event = asyncio.Event()
        self._first = first
        self._again = again
        self._wanted = signals
        self._former: dict[signal.Signals, Any] = {}
        self._counted = float("-inf")
        """When the last signal that counted came, by the event loop's clock."""

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        for number in self._wanted:
            outer = _handling(number)
            former = outer._former[number] if outer is not None else _former(number)
            if former is not signal.SIG_IGN:
                self._former[number] = former
                self._loop.add_signal_handler(number, _received, number)
        _active.append(self)
        drop_in_children(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep_in_children(self)
        _active.remove(self)
        for number in self._former:
            if _handling(number) is None:
                self._loop.remove_signal_handler(number)
        self._former.clear()

    def receive(self) -> None:
        """Act as if one of the signals had come."""
        now = self._loop.time()
        if now - self._counted < _ONE_REQUEST:
            return
        self._counted = now
        if not self.received.is_set():
            self.received.set()
            self._first()
        else:
            self._again()

    @property
    def signals(self) -> Iterable[signal.Signals]:
        return self._former

    def drop_in_child(self) -> None:
        with contextlib.suppress(ValueError, OSError):
            signal.set_wakeup_fd(-1)
        for number, former in self._former.items():
            # KeyboardInterrupt, raised while Python still prepares the child, would be ignored.
            handler = signal.SIG_DFL if former is signal.default_int_handler else former
            with contextlib.suppress(ValueError, OSError, TypeError):
                signal.signal(number, handler)


def _former(number: signal.Signals) -> Any:
    """The handler of a signal, or Python's own in place of that of `asyncio.Runner`, which cancels a task."""
    handler = signal.getsignal(number)
    function = getattr(handler, "func", handler)
    return signal.default_int_handler if isinstance(getattr(function, "__self__", None), asyncio.Runner) else handler


_active: list[StopSignals] = []
"""The blocks that run now, the innermost last."""


def _handling(number: signal.Signals) -> StopSignals | None:
    """The innermost block that handles a signal; None if none does."""
    return next((block for block in reversed(_active) if number in block._former), None)


def _received(number: signal.Signals) -> None:
    """Tell the innermost block that handles the signal.

    It may have begun after the signal came: the event loop calls the handler of a signal some steps later.
    """
    if (block := _handling(number)) is not None:
        block.receive()
