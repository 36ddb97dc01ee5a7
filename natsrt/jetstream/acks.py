"""Publishing to JetStream at a third of the cost of nats-py's ``JetStreamContext.publish``.

That cost limits how often the states of keyed agents can be saved.
"""

from __future__ import annotations

import asyncio

import nats.js.errors
import orjson
from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.errors import CannotDecode
from natsrt.transport.connection import Connection, Interest

WRONG_REVISION = (10071, 10164)
"""JetStream's error codes for a message whose expected last sequence is wrong."""


class WrongRevision(Exception):
    """The server refused a message: its subject is not at the revision that the message was to follow."""


class Acks:
    """Publishes messages to streams, and receives the acknowledgements on its own inbox below ``inbox_prefix``."""

    def __init__(self, connection: Connection, inbox_prefix: str) -> None:
        self._connection = connection
        self._inbox = f"{inbox_prefix}.{NUID().next().decode()}."
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._number = 0
        self._interest: Interest | None = None

    @property
    def open(self) -> bool:
        """Whether acknowledgements arrive."""
        return self._interest is not None and self._connection.holds(self._interest)

    async def subscribe(self) -> None:
        """Let acknowledgements arrive. Needed before the first message, and again after the connection was closed."""
        self._interest = await self._connection.subscribe(f"{self._inbox}*", self._on_ack)

    def _on_ack(self, message: Msg) -> None:
        waiter = self._waiting.get(message.subject[len(self._inbox) :])
        if waiter is not None and not waiter.done():
            waiter.set_result(message)

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> int:
        """Send a message, and wait for its acknowledgement without a time limit. Returns the message's sequence.

        The caller limits the time, has checked the size, and guarantees that the headers contain no line ends. Raises
        `WrongRevision`, `CannotDecode`, and what nats-py raises.
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
            raise nats.js.errors.NoStreamResponseError  # the headers are the server's "no responders"
        try:
            answer = orjson.loads(message.data)
            if "error" not in answer:  # an answer with an error has a sequence too: 0
                return int(answer["seq"])
            error = answer["error"]
        except (orjson.JSONDecodeError, TypeError, KeyError) as unreadable:
            raise CannotDecode("an acknowledgement", str(unreadable), message.data) from None
        if error.get("err_code") in WRONG_REVISION:
            raise WrongRevision
        raise nats.js.errors.APIError.from_error(error)
