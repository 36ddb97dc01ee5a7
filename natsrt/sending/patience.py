"""The time limit of an event on a durable topic until it can be sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final

from natsrt.transport.connection import Connection

_AGAIN: Final = 0.5
"""Seconds between two looks once the limit is reached."""


class Patience:
    """The time limit of a wait for something to be sent. Use it with ``async with``. It raises TimeoutError.

    ``until()`` is when the wait ends if the connection is lost then, by the event loop's clock; None: it has no end.
    While there is a connection it goes on: what is before it in the queue takes long then.
    """

    def __init__(self, until: Callable[[], float] | None, connection: Connection) -> None:
        self._until = until
        self._connection = connection
        self._limit = asyncio.timeout(None)
        self._handle: asyncio.TimerHandle | None = None

    @property
    def expired(self) -> bool:
        """True if the limit was reached."""
        return self._limit.expired()

    async def __aenter__(self) -> Patience:
        await self._limit.__aenter__()
        if self._until is not None:
            self._handle = asyncio.get_running_loop().call_at(self._until(), self._look, self._until)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
        await self._limit.__aexit__(exc_type, exc, traceback)

    def end(self) -> None:
        """Set no limit any more: the wait is over."""
        if self._handle is not None:
            self._handle.cancel()

    def _look(self, until: Callable[[], float]) -> None:
        loop = asyncio.get_running_loop()
        now, at = loop.time(), until()
        if at <= now and not self._connection.connected:
            self._limit.reschedule(now)
        else:
            self._handle = loop.call_at(max(at, now + _AGAIN), self._look, until)
