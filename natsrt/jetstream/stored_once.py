"""Messages that a stream stores once, although they may have to be sent several times.

Each has a subject of its own, and says which sequence it follows there: 0 for the first message. So the server refuses
the second one, however much later it comes, and whoever sends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import nats.errors
import nats.js.errors
from nats.js import api

from natsrt.errors import JetStreamFull, StreamUnavailable
from natsrt.jetstream.acks import Acks
from natsrt.jetstream.limits import explained, limit_reached
from natsrt.options import Options
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.headers import headers_size

EXPECTED_LAST: Final = api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value
EXPECTED_STREAM: Final = api.Header.EXPECTED_STREAM.value
WRITE_WITHIN: Final = 2.0
"""Seconds within which the stream answers, beside the round trip."""
SILENT: Final = "JetStream does not answer"
_WRITE_FOR: Final = 10.0
"""Seconds for which it is tried to write a message: a cluster elects a leader within that time."""
_PAUSE: Final = 0.2
"""Seconds between two attempts."""
_SERVER_ERRORS: Final = 500
"""The least code of JetStream's errors that may pass."""


class WritesOnce:
    """Writes messages to streams, each once. ``mend(stream)`` is awaited where there is no such stream."""

    def __init__(
        self, connection: Connection, options: Options, mend: Callable[[str], Awaitable[object]] | None = None
    ) -> None:
        self._connection = connection
        self._mend = mend
        self._acks = Acks(connection, options.inbox_prefix)
        self._writing: dict[str, Refusal | None] = {}
        """The subjects on which messages are written at present, and why the server refuses them."""
        connection.on_denied(self._on_denied)

    def _on_denied(self, denied: Refusal) -> bool:
        if denied.subject not in self._writing:
            return False
        self._writing[denied.subject] = denied
        return True

    async def stop(self) -> None:
        """Write no more. Has no effect if stopped."""
        await self._acks.close()

    def check_size(self, stream: str, data: bytes, headers: dict[str, str]) -> None:
        """Raise `MessageTooLarge` if the stream does not accept a message of this size."""
        longest = {EXPECTED_STREAM: stream, EXPECTED_LAST: str(2**64 - 1)}
        self._connection.check_stored(len(data), headers_size(headers | longest))

    async def write(self, stream: str, subject: str, data: bytes, headers: dict[str, str], *, follows: int = 0) -> None:
        """Write a message that follows the one with the sequence ``follows`` on its subject; 0: it is the first one.

        It is sent until the stream answers, for some seconds. Raises `WrongRevision` if another message is there, which
        may be this one, `StreamUnavailable`, `JetStreamFull` and `PermissionDenied`. `check_size` comes before it.
        """
        self._writing[subject] = None
        try:
            await self._write(stream, subject, data, headers | {EXPECTED_STREAM: stream, EXPECTED_LAST: str(follows)})
        finally:
            self._writing.pop(subject, None)

    async def _write(self, stream: str, subject: str, data: bytes, headers: dict[str, str]) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + _WRITE_FOR
        while True:
            try:
                async with asyncio.timeout(WRITE_WITHIN + self._connection.rtt.allowance):
                    await self._write_once(subject, data, headers)
                    return
            except nats.js.errors.APIError as error:
                if (limit := limit_reached(error)) is not None:
                    raise JetStreamFull("write to", stream, limit.name, explained(limit, error)) from None
                problem = error.description or str(error)
                if error.code is not None and error.code < _SERVER_ERRORS:
                    raise StreamUnavailable("write to", stream, problem) from error
            except nats.js.errors.NoStreamResponseError:
                problem = "there is no such stream, or it has no leader now"
                if self._mend is not None:
                    await self._mend(stream)
            except TimeoutError:
                problem = SILENT
            except (nats.errors.Error, OSError) as error:
                problem = str(error) or type(error).__name__
            if (denied := self._writing[subject]) is not None:
                raise denied
            if loop.time() > until:
                raise StreamUnavailable("write to", stream, problem)
            await asyncio.sleep(_PAUSE)

    async def _write_once(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        if not self._acks.open:
            await self._acks.subscribe()
        await self._acks.publish(subject, data, headers)
