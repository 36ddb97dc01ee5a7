"""Events of a stream, from a moment on: those that are stored, then each one that is stored later.

Both are read from the stream by sequence, so there is no gap and no double between them. What core NATS delivers only
tells that there may be something new, because it does not have the sequence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from natsrt.errors import ServerUnreachable, StreamUnavailable
from natsrt.jetstream.stream_reader import StoredMessage, StreamReader

from .output import note

_SOON = 0.05
"""Seconds between two looks while something new is expected."""
_EXPECTED_FOR = 1.0
"""Seconds for which something new is expected after core NATS has delivered an event: a stream may store it later."""
_LATEST = 5.0
"""Seconds after which it is looked again in any case."""


class StoredEvents:
    """The events on ``subject``, which may have wildcards, in one stream, from the time ``since`` on."""

    def __init__(self, reader: StreamReader, stream: str, subject: str, since: float) -> None:
        self._reader = reader
        self._stream = stream
        self._subject = subject
        self._since = since
        self._next = 0
        """The sequence from which to go on; 0 if there was no event yet."""
        self._new = asyncio.Event()
        self._expected_until = 0.0

    def expect(self) -> None:
        """Look for new events: one may be stored at this moment."""
        self._expected_until = asyncio.get_running_loop().time() + _EXPECTED_FOR
        self._new.set()

    async def follow(self, show: Callable[[StoredMessage], None]) -> None:
        """Call ``show`` with each event, in the order of the stream, until cancelled.

        Goes on after the server was restarted, or did not answer. Raises `PermissionDenied`, and what else does not
        pass by itself.
        """
        trouble = ""
        while True:
            try:
                await self._read(show)
                trouble = ""
            except (StreamUnavailable, ServerUnreachable) as error:
                if str(error) != trouble:
                    trouble = str(error)
                    note(f"natsrt: {trouble}; trying again", "warning")
            await self._wait()

    async def _read(self, show: Callable[[StoredMessage], None]) -> None:
        since = self._since if not self._next else None
        async for message in self._reader.read(self._stream, self._subject, first=self._next, since=since):
            self._next = message.sequence + 1
            show(message)

    async def _wait(self) -> None:
        if asyncio.get_running_loop().time() < self._expected_until:
            await asyncio.sleep(_SOON)
            return
        self._new.clear()
        try:
            async with asyncio.timeout(_LATEST):
                await self._new.wait()
        except TimeoutError:
            pass
