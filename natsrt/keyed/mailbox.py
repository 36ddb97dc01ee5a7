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

    __slots__ = ("_concurrent", "_inside", "_waiting")

    def __init__(self) -> None:
        self._inside: list[str] = []
        self._concurrent: set[str] | None = None
        """Handlers that run, but do not keep others out. None until there is one."""
        self._waiting: dict[str, asyncio.Future[None]] | None = None
        """Handlers that wait to enter, in the order of their messages. None until there is one."""

    @property
    def inside(self) -> tuple[str, ...]:
        """The handlers that keep others out."""
        return tuple(self._inside)

    def runs_any(self, chain: Collection[str]) -> bool:
        """Whether a handler of this chain runs here, so that a message with the chain may enter."""
        if any(handler_id in chain for handler_id in self._inside):
            return True
        return self._concurrent is not None and not self._concurrent.isdisjoint(chain)

    def try_enter(self, handler_id: str, chain: Collection[str] = ()) -> bool:
        """Enter if that is possible without `wait`. Returns whether it was; then `exit` must follow.

        ``chain`` is the chain of the message that the handler is for.
        """
        if (self._inside or self._waiting) and not self.runs_any(chain):
            return False
        self._inside.append(handler_id)
        return True

    async def wait(self, handler_id: str) -> None:
        """Wait until the handler has entered; then `exit` must follow. Raises the error that was given to `refuse`."""
        if self._waiting is None:
            self._waiting = {}
        turn = self._waiting[handler_id] = asyncio.get_running_loop().create_future()
        try:
            await turn
        except BaseException:
            if handler_id in self._inside:  # it had entered before it was cancelled
                self._remove(handler_id)
            else:
                self._waiting.pop(handler_id, None)
            raise

    def refuse(self, handler_id: str, error: Exception) -> None:
        """Let `wait` raise ``error``. Does nothing if the handler does not wait."""
        turn = None if self._waiting is None else self._waiting.pop(handler_id, None)
        if turn is not None and not turn.done():
            turn.set_exception(error)

    def count(self, handlers: Collection[str]) -> int:
        """How many of ``handlers`` run here."""
        if not handlers:
            return 0
        concurrent = self._concurrent or ()
        return sum(handler_id in self._inside or handler_id in concurrent for handler_id in handlers)

    def let_others_in(self, handler_id: str) -> None:
        """The handler goes on, and keeps others out no longer."""
        if self._concurrent is None:
            self._concurrent = set()
        self._concurrent.add(handler_id)
        self._remove(handler_id)

    def exit(self, handler_id: str) -> None:
        """The handler has ended."""
        if self._concurrent and handler_id in self._concurrent:
            self._concurrent.remove(handler_id)
        else:
            self._remove(handler_id)

    def _remove(self, handler_id: str) -> None:
        self._inside.remove(handler_id)
        if self._waiting and not self._inside:
            self._admit_next()

    def _admit_next(self) -> None:
        while self._waiting:
            handler_id = next(iter(self._waiting))
            turn = self._waiting.pop(handler_id)
            if not turn.done():
                self._inside.append(handler_id)
                turn.set_result(None)
                return
