"""Detects afterwards that the process stood still: stopped by a signal, frozen with its machine, held by a handler."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from time import monotonic

_BEAT = 0.25
"""Seconds between two looks. A stall is measured to within this time, which is short against limits of seconds."""


class StallWatch:
    """Calls ``stalled`` when the event loop did not run for more than ``limit`` seconds.

    That happens before anything is read that arrived during the stall: a timer that is due runs in the first turn of
    the loop, and the data of the socket is parsed in the second. Callbacks that were ready before the stall run even
    earlier; they can call `look`.
    """

    def __init__(self, limit: float, stalled: Callable[[], None]) -> None:
        self._limit = limit
        self._stalled = stalled
        self._loop = asyncio.get_running_loop()
        self._looked_at = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch. Harmless when started."""
        if self._timer is None:
            self._looked_at = monotonic()
            self._timer = self._loop.call_later(_BEAT, self._beat)

    def stop(self) -> None:
        """Stop watching. Harmless when stopped."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._looked_at = math.inf

    def look(self) -> None:
        """Look now instead of at the next beat. Cheap, and harmless when stopped."""
        now = monotonic()  # the clock of an event loop may stand still while its callbacks run, as uvloop's does
        if now - self._looked_at > self._limit:
            self._looked_at = now
            self._stalled()

    def _beat(self) -> None:
        self.look()
        self._looked_at = monotonic()
        self._timer = self._loop.call_later(_BEAT, self._beat)
