"""The log of one session: the messages on one subject of a stream, in the order in which the stream stored them.

A reader is in step once it has read what the stream's leader has. The server tells each message as it is stored, with
the sequence of the one before it on the same subject, so a reader notices a gap at the next message. What it is told is
never needed: `state`, `next` and `page` find everything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import nats.js.errors
from nats.aio.msg import Msg
from nats.js import api
from nats.nuid import NUID

from natsrt.errors import CannotDecode
from natsrt.jetstream.acks import Acks
from natsrt.jetstream.buckets import created_at
from natsrt.jetstream.kept_stream import NO_MESSAGE, KeptStream
from natsrt.jetstream.requests import READ, WRITE
from natsrt.jetstream.stream_reader import PAGE, StreamReader
from natsrt.options import Options
from natsrt.transport.connection import Connection, Interest

_PAGE_BYTES: Final = 4 * 1024 * 1024
"""Bytes of a page; a larger message is a page of its own."""
_ROLLUP: Final = "Nats-Rollup"
_SEQUENCE: Final = "Nats-Sequence"
_PREVIOUS: Final = "Nats-Last-Sequence"


class LogMessage(NamedTuple):
    """A message of a log. ``previous`` is the sequence of the one before it; 0: there was none; None: not known."""

    sequence: int
    body: bytes
    previous: int | None = None


class LogState(NamedTuple):
    """What a stream says of itself, and of one log in it."""

    created: str
    """When the stream was made. A stream that was made again has another time, and none of the former messages."""
    last: int
    """The last sequence in the stream, of any log."""
    messages: int
    """Number of messages in the log."""


class LogReader(Protocol):
    """Hears of a log. Both methods are called in the client's read loop: they may neither raise nor block."""

    def told(self, message: LogMessage) -> None:
        """A message was stored. Messages may be missed."""

    def reconnected(self) -> None:
        """The connection was lost and made again, so messages may have been missed."""


class SessionLog(KeptStream):
    """One log. All methods raise `StreamUnavailable`, `PermissionDenied`, `ServerUnreachable`, `JetStreamRequired` and
    `ServerTooOld`. Reading waits ``offline_timeout`` seconds for a lost server, writing ``publish_timeout``.

    A stream that was deleted is made again, empty.
    """

    def __init__(
        self,
        connection: Connection,
        options: Options,
        acks: Acks,
        reader: StreamReader,
        *,
        config: api.StreamConfig,
        subject: str,
        told: str,
    ) -> None:
        super().__init__(
            connection, options, acks, config, feature="memories in JetStream", entries=subject, subscribed=(told,)
        )
        self._reader = reader
        self._subject = subject
        self._told = told
        self._interest: Interest | None = None
        self._readers: list[LogReader] = []
        self._closed = False
        connection.add_listener(self)

    # -- opening and closing -----------------------------------------------------------------------------------------

    async def open(self, reader: LogReader) -> None:
        """Make the stream if it is missing, and tell ``reader`` of new messages from now on."""
        await self._open()
        self._readers.append(reader)
        self._interest = await self._connection.subscribe(self._told, self._take)
        await self._connection.barrier()
        self._interest.check()
        self._acks.check()

    async def close(self) -> None:
        """Tell nobody any more, and forget the connection. Has no effect if closed."""
        if self._closed:
            return
        self._closed = True
        self._readers.clear()
        self._connection.remove_listener(self)
        self._forget()
        interest, self._interest = self._interest, None
        if interest is not None:
            await self._connection.unsubscribe(interest)

    # -- what the server tells ---------------------------------------------------------------------------------------

    def _take(self, message: Msg) -> None:
        headers = message.headers or {}
        try:
            told = LogMessage(int(headers[_SEQUENCE]), message.data, int(headers[_PREVIOUS]))
        except (KeyError, ValueError):
            raise CannotDecode("what a stream tells of a message", "its sequence is missing", message.data) from None
        for reader in self._readers:
            reader.told(told)

    def connection_lost(self) -> None:
        pass

    def connection_made(self) -> None:
        for reader in self._readers:
            reader.reconnected()

    # -- reading and writing -----------------------------------------------------------------------------------------

    async def append(self, body: bytes, *, alone: bool = False) -> int:
        """Store a message, once, and return its sequence. ``alone``: the stream removes all messages before it.

        Raises `MessageTooLarge` and `JetStreamFull` too. Nothing is stored then. After another error, it may be.
        """
        headers = {
            api.Header.MSG_ID.value: NUID().next().decode(),  # an attempt whose confirmation is lost is repeated
            api.Header.EXPECTED_STREAM.value: self.stream,
        }
        if alone:
            headers[_ROLLUP] = "sub"
        self._check_size(self._subject, body, headers, alone=alone)

        async def attempt() -> int:
            return await self._acks.store(self.stream, self._subject, body, headers)

        return await self._writes.run(WRITE, attempt, subject=self._subject, within=self._write_within)

    async def state(self) -> LogState:
        """What the stream's leader says now."""

        async def attempt() -> LogState:
            info = await self._connection.jetstream.stream_info(self.stream, subjects_filter=self._subject)
            messages = (info.state.subjects or {}).get(self._subject, 0)
            return LogState(created_at(info), info.state.last_seq, messages)

        return await self._reads.run(READ, attempt, subject=self._domain.api(f"STREAM.INFO.{self.stream}"))

    async def next(self, after: int) -> LogMessage | None:
        """The first message of the log after a sequence, as the stream's leader says; None if there is none."""

        async def attempt() -> LogMessage | None:
            js = self._connection.jetstream
            try:
                found = await js.get_msg(self.stream, seq=after + 1, subject=self._subject, next=True)
            except nats.js.errors.NotFoundError as error:
                if error.err_code == NO_MESSAGE:
                    return None
                raise
            return LogMessage(found.seq or 0, found.data or b"")

        return await self._reads.run(READ, attempt, subject=self._domain.api(f"STREAM.MSG.GET.{self.stream}"))

    async def page(self, after: int) -> tuple[list[LogMessage], bool]:
        """Some messages of the log after a sequence, in their order, and whether there are more.

        Any server with a copy of the stream answers: `next` knows whether there is more.
        """
        wanted: dict[str, Any] = {"batch": PAGE, "max_bytes": _PAGE_BYTES}
        wanted |= {"seq": after + 1, "next_by_subj": self._subject}
        attempt: Callable[[], Any] = partial(self._reader.batch, self.stream, wanted)
        found, more = await self._reads.run(READ, attempt, subject=self._domain.api(f"DIRECT.GET.{self.stream}"))
        return [LogMessage(message.sequence, message.data) for message in found], more
