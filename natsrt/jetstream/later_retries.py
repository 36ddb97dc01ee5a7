"""Events that wait for a later attempt in a schedule of their stream, and hold no place in a consumer meanwhile.

Rules:

1. The event is stored as a schedule, on a subject for the agent type, the event's sequence and the number of attempts
   that it had. When it is due, the server publishes it on a second subject of that kind, which only the consumer of the
   agent type delivers. Then the former delivery is acknowledged.
2. Whoever gets an event that was delivered before looks whether it is on one of these subjects. If it is, the worker
   that put it there has ended before it could acknowledge, and the delivery is acknowledged now. So the event is handed
   over once. Both subjects are looked at in one request, so that a schedule which fires meanwhile is not missed.
3. Headers say when the event was stored first, and under which message id. Its sequence and the number of its attempts
   are in the subject. So handlers see the event that they know.
4. The copy is discarded when the event would have been. If the event itself was deleted meanwhile, its copy is not
   handled.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from natsrt.errors import NatsrtError
from natsrt.jetstream.acks import WrongRevision
from natsrt.jetstream.consumers import Consumers
from natsrt.jetstream.dead_letters import NOT_KEPT, STORED_AT_HEADER, SUBJECT_HEADER
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.stored_once import WritesOnce
from natsrt.jetstream.stream_reader import StreamReader
from natsrt.jetstream.streams import NEEDED_VERSION
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.envelope import MESSAGE_ID_HEADER
from natsrt.wire.retry_subjects import number, retried, retries_of, retry_of, waiting_retries
from natsrt.wire.schedules import once
from natsrt.wire.subjects import Subjects
from natsrt.wire.times import LAST, known_delay

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_PUBLISHED_TTL: Final = "Nats-Schedule-TTL"
"""Header with the seconds for which a stream keeps what a schedule publishes."""
_MICROSECONDS: Final = 1e6


def retry_headers(
    delivery: Delivery, subject: str, message_id: str, published_on: str, due: datetime, kept_for: float | None
) -> dict[str, str]:
    """The headers of an event that waits for a later attempt, and is published on ``published_on`` when it is ``due``.

    ``delivery`` is that of the attempt that has failed, of an event that was published on ``subject`` and whose
    handlers were given the ``message_id``. ``kept_for``: seconds for which the copy is kept then; None: no limit.
    """
    kept = {
        name: value for name, value in (delivery.message.headers or {}).items() if not name.lower().startswith(NOT_KEPT)
    }
    headers = kept | {
        SUBJECT_HEADER: subject,
        MESSAGE_ID_HEADER: message_id,
        STORED_AT_HEADER: str(round(delivery.stored_at * _MICROSECONDS)),
        **once(due).headers(published_on),
    }
    return headers if kept_for is None else headers | {_PUBLISHED_TTL: f"{max(1, math.ceil(kept_for))}s"}


def recognise(subjects: Subjects, delivery: Delivery) -> None:
    """Give a delivery what is known of the event's earlier attempts, if it comes from a schedule."""
    found = retry_of(subjects, delivery.stream, delivery.message.subject)
    if found is None:
        return
    delivery.first_sequence, delivery.before = found
    stored = number((delivery.message.headers or {}).get(STORED_AT_HEADER, ""))
    if stored is not None and stored / _MICROSECONDS <= delivery.stored_at:  # that of the copy
        delivery.stored_at = stored / _MICROSECONDS


class LaterRetries:
    """The events of one namespace that wait for a later attempt, as one worker puts them there and finds them."""

    def __init__(
        self,
        connection: Connection,
        subjects: Subjects,
        options: Options,
        registry: Registry,
        reader: StreamReader,
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._registry = registry
        self._reader = reader
        self._domain = Domain(options.jetstream_domain)
        self._writer = WritesOnce(connection, options)
        self.measured: int | None = None
        """How many events of this worker's types waited when `measure` last ran; None: it did not run."""

    async def stop(self) -> None:
        """Put nothing there any more. Has no effect if stopped."""
        await self._writer.stop()

    def are_possible(self, stream: str) -> bool:
        """True if the stream can publish messages later, as far as that is known."""
        entry = self._registry.view.durable.get(stream)
        version = self._connection.client.connected_server_version
        return entry is not None and entry.topics.schedules and (version.major, version.minor) >= NEEDED_VERSION

    def left(self, delivery: Delivery) -> float | None:
        """Seconds until the stream discards an event because of its age; None: it does not, as far as that is known."""
        entry = self._registry.view.durable.get(delivery.stream)
        if entry is None or entry.max_age is None:
            return None
        return delivery.stored_at + entry.max_age - datetime.now(UTC).timestamp()

    def recognise(self, delivery: Delivery) -> None:
        """Give a delivery what is known of the event's earlier attempts, if it comes from a schedule."""
        recognise(self._subjects, delivery)

    async def put(
        self, agent_type: str, delivery: Delivery, *, subject: str, message_id: str, attempts: int, after: float
    ) -> None:
        """Have an event delivered again ``after`` seconds, after so many ``attempts``; or at the last time that servers
        know. Acknowledge the delivery then.

        ``subject`` is the one on which it was published, and ``message_id`` the one that its handlers were given. Has
        no effect if it waits there already. Raises `MessageTooLarge`, and as `WritesOnce.write`.
        """
        stream, data = delivery.stream, delivery.message.data
        waits_on, published_on = retried(self._subjects, stream, agent_type, delivery.first_sequence, attempts)
        after, left = known_delay(after), self.left(delivery)
        due = datetime.now(UTC) + timedelta(seconds=after)
        kept_for = None if left is None else min(left - after, (LAST - due).total_seconds())
        headers = retry_headers(delivery, subject, message_id, published_on, due, kept_for)
        self._writer.check_size(stream, data, headers)
        try:
            await self._writer.write(stream, waits_on, data, headers)
        except WrongRevision:
            logger.debug("%r waits for a later attempt already", delivery)

    async def has(self, agent_type: str, delivery: Delivery) -> bool:
        """True if an event waits for a later attempt than this one, or waited. Raises as `Consumers.next_message`."""
        wanted = retries_of(self._subjects, delivery.stream, agent_type, delivery.first_sequence)
        consumers = Consumers(self._connection, self._domain, delivery.stream)
        return await consumers.next_message(wanted, delivery.sequence + 1) is not None

    async def is_discarded(self, delivery: Delivery) -> bool:
        """True if the event of which this is a copy is not in its stream any more. Raises as `Consumers.message`."""
        consumers = Consumers(self._connection, self._domain, delivery.stream)
        return await consumers.message(delivery.first_sequence) is None

    async def count(self, stream: str, agent_type: str | None = None) -> dict[str, int]:
        """How many events of a stream wait for a later attempt, by the token of the agent type. Raises as
        `StreamReader.info`."""
        info = await self._reader.info(stream, waiting_retries(self._subjects, stream, agent_type))
        found: dict[str, int] = {}
        for subject in (info.state.subjects if info is not None else None) or {}:
            token = subject.split(".")[-3]
            found[token] = found.get(token, 0) + 1
        return found

    async def measure(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Count the events of these streams and agent types for `measured`. Does not fail."""
        try:
            counts = await asyncio.gather(*(self.count(stream, agent_type) for stream, agent_type in wanted))
        except NatsrtError as error:
            logger.debug("how many events wait for a later attempt is not known: %s", error)
            self.measured = None
        else:
            self.measured = sum(sum(count.values()) for count in counts)
