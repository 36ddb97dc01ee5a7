"""Publishing to JetStream at a third of the cost of nats-py's ``JetStreamContext.publish``.

That cost limits how often the states of keyed agents can be saved.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple, Protocol

import nats.js.errors
import orjson
from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.errors import CannotDecode
from natsrt.transport.connection import Connection, Interest
from natsrt.transport.headers import header_block
from natsrt.transport.inbox import is_nobody

WRONG_REVISION = (10071, 10164)
"""JetStream's error codes for a message whose expected last sequence is wrong."""

_ERROR_FIELDS = ("code", "err_code", "description")
"""What is read of an error of JetStream. A newer server may add other fields."""


class WrongRevision(Exception):
    """The server refused a message: its subject is not at the revision that the message was to follow."""


class Ack(NamedTuple):
    """What a stream says of a message that it has stored."""

    stream: str
    """The stream's name; empty if the acknowledgement does not say it."""
    sequence: int
    duplicate: bool
    """True if the stream had stored a message with this id before; `sequence` is the sequence of that one."""


class Receiver(Protocol):
    """Waits for what arrives on a reply subject."""

    def receive(self, message: Msg) -> None:
        """Called in the read loop with each message there. It must not block, and may raise only `CannotDecode`."""


class _First:
    """Waits for the first message."""

    __slots__ = ("waiter",)

    def __init__(self) -> None:
        self.waiter: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

    def receive(self, message: Msg) -> None:
        """Part of `Receiver`."""
        if not self.waiter.done():
            self.waiter.set_result(message)


class _FromStream(_First):
    """Waits for the answer of a stream. Any subscriber of a subject can answer what is published there."""

    __slots__ = ("stream",)

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream: str = stream

    def receive(self, message: Msg) -> None:
        """Part of `Receiver`."""
        try:
            if not is_nobody(message) and read_ack(message).stream != self.stream:
                return
        except CannotDecode:
            return
        except (WrongRevision, nats.js.errors.APIError):
            pass  # an error does not say whose it is
        super().receive(message)


class Acks:
    """Publishes messages to streams, and receives the acknowledgements on its own inbox below ``inbox_prefix``."""

    def __init__(self, connection: Connection, inbox_prefix: str) -> None:
        self._connection = connection
        self.inbox: str = f"{inbox_prefix}.{NUID().next().decode()}."
        """The start of the reply subjects, with the last dot."""
        self._receivers: dict[str, Receiver] = {}
        """Who waits, by reply subject."""
        self._number = 0
        self._interest: Interest | None = None

    @property
    def open(self) -> bool:
        """Whether acknowledgements arrive."""
        return self._interest is not None and self._connection.holds(self._interest)

    async def subscribe(self) -> None:
        """Let acknowledgements arrive. Needed before the first message, and again after the connection was closed."""
        self._interest = await self._connection.subscribe(f"{self.inbox}*", self._on_ack)

    async def close(self) -> None:
        """Let no acknowledgements arrive any more. Has no effect if none arrive."""
        interest, self._interest = self._interest, None
        if interest is not None:
            await self._connection.unsubscribe(interest)

    def _on_ack(self, message: Msg) -> None:
        receiver = self._receivers.get(message.subject)
        if receiver is not None:
            receiver.receive(message)

    def expect(self, receiver: Receiver) -> str:
        """A new reply subject. ``receiver`` gets what arrives there, until `forget`."""
        self._number += 1
        reply = f"{self.inbox}{self._number:x}"
        self._receivers[reply] = receiver
        return reply

    def forget(self, reply: str) -> None:
        """End what `expect` began."""
        self._receivers.pop(reply, None)

    def check(self) -> None:
        """Raise the error of the server if it refuses the subscription to the acknowledgements."""
        if self._interest is not None:
            self._interest.check()

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> int:
        """Send a message, and wait for its acknowledgement without a time limit. Returns the message's sequence.

        The caller limits the time, has checked the size, and guarantees that the headers contain no line ends. Raises
        `WrongRevision`, `CannotDecode`, and what nats-py raises.
        """
        return await self._store(_First(), subject, payload, headers)

    async def store(self, stream: str, subject: str, payload: bytes, headers: dict[str, str]) -> int:
        """The same for a subject to which others may subscribe: only what ``stream`` says counts."""
        return await self._store(_FromStream(stream), subject, payload, headers)

    async def _store(self, first: _First, subject: str, payload: bytes, headers: dict[str, str] | None) -> int:
        reply = self.expect(first)
        try:
            client = self._connection.client
            if not client.post(subject, payload, reply, header_block(headers) if headers else b""):
                await client.publish(subject, payload, reply, headers)
            message = await first.waiter
        finally:
            self.forget(reply)
        return read_ack(message).sequence


def read_ack(message: Msg) -> Ack:
    """Return an acknowledgement.

    Raises `WrongRevision`, `CannotDecode`, and nats-py's ``APIError`` for another error of JetStream.
    """
    if is_nobody(message):
        raise nats.js.errors.NoStreamResponseError
    try:
        answer = orjson.loads(message.data)
        if "error" not in answer:  # an answer with an error has a sequence too: 0
            stream = answer.get("stream", "")
            return Ack(str(stream), int(answer["seq"]), answer.get("duplicate") is True)
        error = {name: answer["error"].get(name) for name in _ERROR_FIELDS}
    except (AttributeError, TypeError, KeyError, ValueError, OverflowError) as unreadable:
        raise CannotDecode("an acknowledgement", str(unreadable), message.data) from None
    if error["err_code"] in WRONG_REVISION:
        raise WrongRevision
    raise nats.js.errors.APIError.from_error(error)
