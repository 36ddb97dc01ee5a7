"""One message at a time for one agent, in order, without deadlock along a call chain.

A handler's *visit* of an agent has an id. What the handler calls carries the ids of all visits that wait for that call,
its *chain*. A message whose chain contains a visit that is inside the mailbox now is part of that visit: it may enter,
because the handler inside waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection


class Mailbox:
    """The messages of one agent, from their arrival to the end of their handlers."""

    __slots__ = ("_beside", "_inside", "_waiting")

    def __init__(self) -> None:
        self._inside: list[str] = []
        self._beside: set[str] | None = None
        """Visits that go on, but do not keep others out."""
        self._waiting: dict[str, asyncio.Future[None]] | None = None

    @property
    def inside(self) -> tuple[str, ...]:
        """The visits that keep others out."""
        return tuple(self._inside)

    def holds(self, along: Collection[str]) -> bool:
        """Whether a visit of the chain ``along`` goes on here, so that a message of that chain is part of it."""
        if any(visit in along for visit in self._inside):
            return True
        return self._beside is not None and not self._beside.isdisjoint(along)

    def enters(self, visit: str, along: Collection[str] = ()) -> bool:
        """Let ``visit`` in where it need not `wait`; ``along`` is the chain of its message. `leave` must follow."""
        if (self._inside or self._waiting) and not self.holds(along):
            return False
        self._inside.append(visit)
        return True

    async def wait(self, visit: str) -> None:
        """Wait until ``visit`` may enter. `leave` must follow. Raises what `refuse` says."""
        if self._waiting is None:
            self._waiting = {}
        place = self._waiting[visit] = asyncio.get_running_loop().create_future()
        try:
            await place
        except BaseException:
            if visit in self._inside:  # let in at the moment it gave up
                self._remove(visit)
            else:
                self._waiting.pop(visit, None)
            raise

    def refuse(self, visit: str, error: Exception) -> None:
        """``visit`` waits no longer, but fails. Nothing happens where it does not wait."""
        place = None if self._waiting is None else self._waiting.pop(visit, None)
        if place is not None and not place.done():
            place.set_exception(error)

    def count(self, visits: Collection[str]) -> int:
        """How many of ``visits`` go on here."""
        if not visits:
            return 0
        return sum(visit in self._inside or (self._beside is not None and visit in self._beside) for visit in visits)

    def step_aside(self, visit: str) -> None:
        """``visit`` goes on, and others may enter meanwhile."""
        if self._beside is None:
            self._beside = set()
        self._beside.add(visit)
        self._remove(visit)

    def leave(self, visit: str) -> None:
        """``visit`` has ended."""
        if self._beside and visit in self._beside:
            self._beside.remove(visit)
        else:
            self._remove(visit)

    def _remove(self, visit: str) -> None:
        self._inside.remove(visit)
        if self._waiting and not self._inside:
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            visit = next(iter(self._waiting))
            place = self._waiting.pop(visit)
            if not place.done():
                self._inside.append(visit)
                place.set_result(None)
                return
