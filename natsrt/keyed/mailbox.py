"""One message at a time for one agent, in order, without deadlock along a call chain.

Each handler of a keyed agent has an id. What the handler calls carries the ids of all handlers that wait for that call,
its chain: see `natsrt.agents.chain`. A message whose chain names a handler that is inside the mailbox now may enter at
once, because the handler inside waits for it.
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
        """Handlers that run, but do not keep others out."""
        self._waiting: dict[str, asyncio.Future[None]] | None = None

    @property
    def inside(self) -> tuple[str, ...]:
        """The handlers that keep others out."""
        return tuple(self._inside)

    def holds(self, chain: Collection[str]) -> bool:
        """Whether a handler of this chain is here, so that a message of the chain may enter."""
        if any(handler_id in chain for handler_id in self._inside):
            return True
        return self._beside is not None and not self._beside.isdisjoint(chain)

    def enter(self, handler_id: str, chain: Collection[str] = ()) -> bool:
        """Let ``handler_id`` in where it need not `wait`; ``chain`` is the chain of its message. `exit` must follow."""
        if (self._inside or self._waiting) and not self.holds(chain):
            return False
        self._inside.append(handler_id)
        return True

    async def wait(self, handler_id: str) -> None:
        """Wait until ``handler_id`` may enter. `exit` must follow. Raises what `refuse` says."""
        if self._waiting is None:
            self._waiting = {}
        turn = self._waiting[handler_id] = asyncio.get_running_loop().create_future()
        try:
            await turn
        except BaseException:
            if handler_id in self._inside:  # let in at the moment it gave up
                self._remove(handler_id)
            else:
                self._waiting.pop(handler_id, None)
            raise

    def refuse(self, handler_id: str, error: Exception) -> None:
        """``handler_id`` waits no longer, but fails. Nothing happens where it does not wait."""
        turn = None if self._waiting is None else self._waiting.pop(handler_id, None)
        if turn is not None and not turn.done():
            turn.set_exception(error)

    def count(self, handlers: Collection[str]) -> int:
        """How many of ``handlers`` go on here."""
        if not handlers:
            return 0
        beside = self._beside or ()
        return sum(handler_id in self._inside or handler_id in beside for handler_id in handlers)

    def step_aside(self, handler_id: str) -> None:
        """``handler_id`` goes on, and others may enter meanwhile."""
        if self._beside is None:
            self._beside = set()
        self._beside.add(handler_id)
        self._remove(handler_id)

    def exit(self, handler_id: str) -> None:
        """``handler_id`` has ended."""
        if self._beside and handler_id in self._beside:
            self._beside.remove(handler_id)
        else:
            self._remove(handler_id)

    def _remove(self, handler_id: str) -> None:
        self._inside.remove(handler_id)
        if self._waiting and not self._inside:
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            handler_id = next(iter(self._waiting))
            turn = self._waiting.pop(handler_id)
            if not turn.done():
                self._inside.append(handler_id)
                turn.set_result(None)
                return
