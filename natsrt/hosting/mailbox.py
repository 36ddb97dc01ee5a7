"""One message at a time for one agent, in order, without deadlock along a call chain.

A handler's *visit* of an agent has an id. What the handler calls carries the ids of all visits that wait for that call,
its *chain*. A message whose chain contains a visit that is inside the mailbox now is part of that visit: it may enter,
because the handler inside waits for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection
from contextvars import ContextVar

chain: ContextVar[tuple[str, ...]] = ContextVar("natsrt_chain", default=())
"""The visits that wait for what the present code does, the outermost first."""


class Mailbox:
    """The messages of one agent, from their arrival to the end of their handlers."""

    __slots__ = ("_inside", "_waiting")

    def __init__(self) -> None:
        self._inside: set[str] = set()
        self._waiting: deque[asyncio.Future[None]] | None = None

    @property
    def busy(self) -> bool:
        """Whether a message is inside or waits."""
        return bool(self._inside or self._waiting)

    def holds(self, along: Collection[str]) -> bool:
        """Whether a visit of the chain ``along`` is inside, so that a message of that chain is part of it."""
        return bool(self._inside) and not self._inside.isdisjoint(along)

    async def enter(self, visit: str, along: Collection[str] = ()) -> None:
        """Wait until ``visit`` may enter; ``along`` is the chain of its message. `leave` must follow."""
        if self.holds(along):
            self._inside.add(visit)
            return
        if not self._inside and not self._waiting:
            self._inside.add(visit)
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._waiting is None:
            self._waiting = deque()
        self._waiting.append(place)
        try:
            await place
        except BaseException:
            if place.done() and not place.cancelled():  # let in at the moment it gave up
                self._inside.discard("")
                self._let_in()
            elif place in self._waiting:
                self._waiting.remove(place)
            raise
        self._inside.discard("")
        self._inside.add(visit)

    def leave(self, visit: str) -> None:
        """``visit`` has ended."""
        self._inside.discard(visit)
        if not self._inside:
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                self._inside.add("")  # its place, until it wakes up
                place.set_result(None)
                return
