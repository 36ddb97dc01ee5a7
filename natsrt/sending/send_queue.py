"""The queue in which sends wait for their turn, where an intervention or a missing connection delays them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any


class Turn:
    """The turn of one send: until it ends, no later send of the queue goes on."""

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
        """End the turn before its block ends. Ending it twice does no harm."""
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
"""The turn whose intervention runs the present code, or started the present task; None outside interventions."""


class SendQueue:
    """First come, first served. A send that is cancelled leaves the queue at once."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        """A future for each send in the queue, done when its turn comes. The first one has the turn."""

    @asynccontextmanager
    async def turn(self, link: Callable[[asyncio.Future[None]], None] | None) -> AsyncIterator[Turn]:
        """Wait for a turn. It ends with the block, or earlier by `Turn.end`.

        ``link`` is called with the future that is waited for, so that a cancellation token can cancel it; None: nothing
        can. A send from inside an intervention does not wait: it would wait for the turn in which it runs. Instead it
        ends that turn, because a handler that has to answer it may have to send, too.
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
        """Take a send out of the queue, and give the next one its turn. Harmless if it is not in the queue."""
        if future in self.waiting:
            del self.waiting[future]
            self._give_turn()

    def _give_turn(self) -> None:
        first = next(iter(self.waiting), None)
        if first is not None and not first.done():
            first.set_result(None)
