"""Publishing to JetStream at a third of the cost of nats-py's ``JetStreamContext.publish``, which bounds every save."""

from __future__ import annotations

import asyncio

import nats.js.errors
import orjson
from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.errors import CannotDecode
from natsrt.transport.connection import Connection, Interest

_WRONG_REVISION = (10071, 10164)


class WrongRevision(Exception):
    """The server refused a message: its subject is not at the revision that it was to follow."""


class Acks:
    """Messages to streams, and their acknowledgements on an inbox of its own below ``inbox_prefix``."""

    def __init__(self, connection: Connection, inbox_prefix: str) -> None:
        self._connection = connection
        self._inbox = f"{inbox_prefix}.{NUID().next().decode()}."
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._number = 0
        self._interest: Interest | None = None

    @property
    def open(self) -> bool:
        return self._interest is not None and self._connection.holds(self._interest)

    async def subscribe(self) -> None:
        """Needed before the first message, and after the connection was closed."""
        self._interest = await self._connection.subscribe(f"{self._inbox}*", self._on_ack)

    def _on_ack(self, message: Msg) -> None:
        waiter = self._waiting.get(message.subject[len(self._inbox) :])
        if waiter is not None and not waiter.done():
            waiter.set_result(message)

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> int:
        """Send, wait for the acknowledgement however long it takes, and give the message's sequence.

        The caller bounds the time, has checked the size, and vouches for the headers: there is no line end in them.
        Raises `WrongRevision`, and what nats-py raises.
        """
        self._number += 1
        token = f"{self._number:x}"
        waiter: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._waiting[token] = waiter
        try:
            client, reply = self._connection.client, self._inbox + token
            if not client.post(subject, payload, reply, headers):
                await client.publish(subject, payload, reply, headers)
            message = await waiter
        finally:
            del self._waiting[token]
        if message.headers:
            raise nats.js.errors.NoStreamResponseError  # the server's "no responders"
        try:
            answer = orjson.loads(message.data)
            if "error" not in answer:  # beside an error there is a sequence too: 0
                return int(answer["seq"])
            error = answer["error"]
        except (orjson.JSONDecodeError, TypeError, KeyError) as unreadable:
            raise CannotDecode("an acknowledgement", str(unreadable), message.data) from None
        if error.get("err_code") in _WRONG_REVISION:
            raise WrongRevision
        raise nats.js.errors.APIError.from_error(error)
