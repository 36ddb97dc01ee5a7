"""Notices afterwards that the process stood still: stopped by a signal, frozen by its machine, blocked by a handler."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from time import monotonic

_BEAT = 0.25


class Pulse:
    """Calls ``stood_still`` when the event loop did not turn for more than ``limit`` seconds.

    That happens before anything is read that came in meanwhile: a timer that is due runs in the first turn, what a
    socket has is parsed in the second. What was ready to run before runs even earlier: it can `look` itself.
    """

    def __init__(self, limit: float, stood_still: Callable[[], None]) -> None:
        self._limit = limit
        self._stood_still = stood_still
        self._loop = asyncio.get_running_loop()
        self._at = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Harmless when started."""
        if self._timer is None:
            self._at = monotonic()
            self._timer = self._loop.call_later(_BEAT, self._beat)

    def stop(self) -> None:
        """Harmless when stopped."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._at = math.inf

    def look(self) -> None:
        """Do at once what the next beat would do. Cheap, and harmless when stopped."""
        now = monotonic()  # an event loop's clock may stand still while its callbacks run, as uvloop's does
        if now - self._at > self._limit:
            self._at = now
            self._stood_still()

    def _beat(self) -> None:
        self.look()
        self._at = monotonic()
        self._timer = self._loop.call_later(_BEAT, self._beat)
