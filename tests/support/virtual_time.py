"""An event loop whose clock jumps to the next timer, so that a schedule of a minute runs in milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_BEGIN = 1_000.0
"""The time in seconds at which the clock starts: not 0, as that of a real loop is not."""


class _Selector(selectors.SelectSelector):
    now = _BEGIN

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("every task waits, and no timer is left that could wake one")
            self.now += max(timeout, 0.0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Runs callbacks as any event loop, but never sleeps. For code without sockets and threads."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def block(self, seconds: float) -> None:
        """Let time pass as code does that blocks the event loop."""
        self._virtual.now += seconds


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, run in a virtual-time loop of its own."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)
