"""Counts deliveries of events: those that workers gave back without an attempt, because they stopped, for example.

JetStream counts all deliveries of a message to a consumer. The attempts are those that are left without the ones
counted here. The count of an event and an agent type is a message counter in a stream: each message adds one to it.

For a keyed type, which gives nothing back, it is the count of the deliveries that a feeder has begun after a take-over,
and that did not come to their end: one is added before the delivery, and taken away after it.
"""

from __future__ import annotations

import logging

import nats.errors
import orjson

from natsrt.background import BackgroundTasks
from natsrt.errors import ServerUnreachable
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.streams import RETURNED
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_ONE_MORE = {"Nats-Incr": "+1"}
_ONE_LESS = {"Nats-Incr": "-1"}
_ONE_REQUEST = 2.0
"""Seconds within which the server tells a count, beside the round trip."""


class Returned:
    """The counts of one namespace."""

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._subjects = subjects
        self._domain = Domain(options.jetstream_domain)
        self._stream = subjects.bucket(RETURNED)
        self._tasks = BackgroundTasks(logger, "counting an event that was given back failed")

    def add(self, agent_type: str, delivery: Delivery) -> None:
        """Count a delivery that is given back. Call it before that. If this gets lost, the delivery is an attempt."""
        self._post(self._subject(agent_type, delivery.stream, delivery.sequence), _ONE_MORE)

    def _subject(self, agent_type: str, stream: str, sequence: int) -> str:
        return self._domain.publish(self._subjects.returned(agent_type, stream, sequence))

    def _post(self, subject: str, change: dict[str, str]) -> None:
        try:
            if self._connection.client.post(subject, b"", "", change):
                return
        except ServerUnreachable:  # a new client is being connected
            pass
        self._tasks.spawn(self._publish(subject, change))

    async def _publish(self, subject: str, change: dict[str, str]) -> None:
        await self._connection.publish(subject, b"", headers=change)

    async def begin(self, agent_type: str, stream: str, sequence: int) -> int:
        """Count a delivery that is about to begin. Returns the count before it. 0 if the server does not tell."""
        subject = self._subject(agent_type, stream, sequence)
        timeout = _ONE_REQUEST + self._connection.rtt.allowance
        try:
            message = await self._connection.client.request(subject, b"", timeout=timeout, headers=_ONE_MORE)
            return max(0, int(orjson.loads(message.data)["val"]) - 1)
        except (nats.errors.Error, OSError, TimeoutError, ValueError, TypeError, KeyError) as error:
            logger.debug("the delivery of %d of %s could not be counted: %s", sequence, stream, error)
            return 0

    def ended(self, agent_type: str, stream: str, sequence: int) -> None:
        """A delivery that was counted by `begin` has come to its end."""
        self._post(self._subject(agent_type, stream, sequence), _ONE_LESS)

    async def count(self, agent_type: str, delivery: Delivery) -> int:
        """Return how often an event was given back. 0 if the server does not tell."""
        subject = self._subjects.returned(agent_type, delivery.stream, delivery.sequence)
        request = self._domain.api(f"DIRECT.GET.{self._stream}.{subject}")
        try:
            timeout = _ONE_REQUEST + self._connection.rtt.allowance
            message = await self._connection.client.request(request, b"", timeout=timeout)
            return int(orjson.loads(message.data)["val"]) if message.data else 0
        except (nats.errors.Error, OSError, TimeoutError, ValueError, TypeError, KeyError) as error:
            logger.debug("how often %r was given back is not known: %s", delivery, error)
            return 0
