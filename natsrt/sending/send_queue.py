"""The one line in which senders stand where something comes between a send and the client's buffer."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar


class Turn:
    """A sender's turn in the line. ``intervening`` while an intervention runs in it."""

    __slots__ = ("_leave", "intervening")

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self.intervening = False

    def leave(self) -> None:
        """End the turn early. Doing so twice is harmless."""
        self._leave()


intervening: ContextVar[Turn | None] = ContextVar("natsrtintervening", default=None)
"""The turn whose intervention the present code runs in."""


class SendQueue:
    """The one line of senders: first come, first served. Whoever gives up leaves it at once."""

    def __init__(self) -> None:
        self._places: OrderedDict[asyncio.Future[None], None] = OrderedDict()  # the first one has the turn

    @property
    def length(self) -> int:
        return len(self._places)

    @asynccontextmanager
    async def turn(self, link: Callable[[asyncio.Future[None]], None]) -> AsyncIterator[Turn]:
        """Wait for the turn; it ends at the latest with the block.

        ``link`` is given the future that is waited for, to cancel it. What an intervention sends itself does not stand
        in the line, and ends the turn that it runs in: whoever has to answer it may have to send, too.
        """
        outer = intervening.get()
        if outer is not None and outer.intervening:
            outer.leave()
            yield Turn(_nothing)
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._places[place] = None
        self._call_next()
        link(place)
        try:
            await place
            yield Turn(lambda: self._leave(place))
        finally:
            self._leave(place)

    def _leave(self, place: asyncio.Future[None]) -> None:
        if place in self._places:
            del self._places[place]
            self._call_next()

    def _call_next(self) -> None:
        first = next(iter(self._places), None)
        if first is not None and not first.done():
            first.set_result(None)


def _nothing() -> None:
    """Ends no turn."""
