"""The queue in which sends wait for their turn when an intervention or a missing connection delays them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any


class Turn:
    """The turn of one send. Until it ends, no later send of the queue continues."""

    __slots__ = ("_future", "_intervening", "_queue")

    def __init__(self, queue: SendQueue, future: asyncio.Future[None]) -> None:
        self._queue = queue
        self._future = future
        self._intervening = False

    @property
    def intervening(self) -> bool:
        """True while an intervention runs in this turn."""
        return self._intervening

    def end(self) -> None:
        """End the turn before its block ends. Has no effect if the turn has ended."""
        self._queue.leave(self._future)

    async def intervene(self, intervention: Awaitable[Any]) -> Any:
        """Run an intervention in this turn, and return what it returns."""
        self._intervening = True
        previous = _intervening_turn.set(self)
        try:
            return await intervention
        finally:
            self._intervening = False
            _intervening_turn.reset(previous)


_intervening_turn: ContextVar[Turn | None] = ContextVar("natsrt_intervening_turn", default=None)
"""The turn whose intervention runs the current code or started the current task; None outside interventions."""


def in_intervention() -> bool:
    """True if an intervention runs the current code, or has started the current task and still runs."""
    turn = _intervening_turn.get()
    return turn is not None and turn.intervening


class SendQueue:
    """A first-in, first-out queue of sends. A send that is cancelled leaves the queue at once."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        """A future for each send in the queue, done when the turn of the send comes. The first one has the turn."""

    @asynccontextmanager
    async def turn(self, link: Callable[[asyncio.Future[None]], None] | None) -> AsyncIterator[Turn]:
        """Wait for a turn. The turn ends with the block, or earlier with `Turn.end`.

        ``link`` is called with the awaited future, so that a cancellation token can cancel it. None means that no token
        can. A send from inside an intervention does not wait, because it would wait for the turn in which it runs. It
        ends that turn instead, because the handler that answers it may also have to send.
        """
        outer = _intervening_turn.get()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turn = Turn(self, future)
        if outer is not None and outer.intervening:
            outer.end()
            yield turn
            return
        self.waiting[future] = None
        self._give_turn()
        if link is not None:
            link(future)
        try:
            await future
            yield turn
        finally:
            turn.end()

    def leave(self, future: asyncio.Future[None]) -> None:
        """Remove a send from the queue, and give the next one its turn. Has no effect if it is not in the queue."""
        if future in self.waiting:
            del self.waiting[future]
            self._give_turn()

    def _give_turn(self) -> None:
        first = next(iter(self.waiting), None)
        if first is not None and not first.done():
            first.set_result(None)
