"""Detects that the process did not run for some time.

Causes are a stop signal, a frozen machine, or a handler that blocks the event loop. A stall is detected after it ends.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from time import monotonic

_BEAT = 0.25
"""Seconds between two checks. The length of a stall is measured with this precision, which is enough for limits of
seconds."""


class StallWatch:
    """Calls ``stalled`` after the event loop did not run for more than ``limit`` seconds.

    It is called before any data that arrived during the stall is read: a timer that is due runs in the first turn of
    the loop, and the data of the socket is parsed in the second. Callbacks that were ready before the stall run even
    earlier. They can call `look`.
    """

    def __init__(self, limit: float, stalled: Callable[[], None]) -> None:
        self._limit = limit
        self._stalled = stalled
        self._loop = asyncio.get_running_loop()
        self._looked_at = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self.seconds: float = 0.0
        """Length of the last stall, in seconds; 0 before the first."""

    def start(self) -> None:
        """Start watching. Has no effect if started."""
        if self._timer is None:
            self._looked_at = monotonic()
            self._timer = self._loop.call_later(_BEAT, self._beat)

    def stop(self) -> None:
        """Stop watching. Has no effect if stopped."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._looked_at = math.inf

    def look(self) -> None:
        """Check now instead of at the next beat. Cheap. Has no effect if stopped."""
        now = monotonic()  # the clock of an event loop may not advance while callbacks run; uvloop's does not
        if now - self._looked_at > self._limit:
            self.seconds = now - self._looked_at
            self._looked_at = now
            self._stalled()

    def _beat(self) -> None:
        self.look()
        self._looked_at = monotonic()
        self._timer = self._loop.call_later(_BEAT, self._beat)
