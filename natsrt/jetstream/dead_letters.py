"""Dead letters: events of durable topics that an agent type could not handle, kept in a stream of their own.

A dead letter is the event's data, unchanged, with the event's headers and those below. So any NATS client can read it,
and publish it again. There is one for each event and agent type: its subject has the agent type, the stream and the
event's sequence, and the server accepts only the first message on it, however often it is sent.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import nats.errors
import orjson
from nats.aio.msg import Msg

from natsrt.durable_types import MONTH
from natsrt.errors import MessageTooLarge, NatsrtError, StreamUnavailable
from natsrt.jetstream.acks import WrongRevision
from natsrt.jetstream.blobs import Blobs
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.durable import DurableStreams
from natsrt.jetstream.stored_once import SILENT, WRITE_WITHIN, WritesOnce
from natsrt.jetstream.streams import DEAD
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import MESSAGE_ID_HEADER
from natsrt.wire.exception_parts import carried
from natsrt.wire.failures import CUTS, ErrorTypes, Limits, describe
from natsrt.wire.subjects import Subjects, encode_text
from natsrt.wire.times import rfc3339, utc

logger: logging.Logger = logging.getLogger("natsrt.hosting")

SUBJECT_HEADER: Final = "Natsrt-Subject"
"""Header with the subject on which the event was published."""
AGENT_TYPE_HEADER: Final = "Natsrt-Dead-Agent-Type"
"""Header with the agent type that could not handle the event, encoded as in a subject, but of any length."""
REASON_HEADER: Final = "Natsrt-Dead-Reason"
"""Header with the reason why the event is not tried again, in one line."""
ERROR_HEADER: Final = "Natsrt-Dead-Error"
"""Header with the last error: the data of a ``natsrt.error``, as JSON in one line of ASCII."""
ATTEMPTS_HEADER: Final = "Natsrt-Dead-Attempts"
"""Header with the number of attempts."""
STREAM_HEADER: Final = "Natsrt-Dead-Stream"
"""Header with the event's stream."""
SEQUENCE_HEADER: Final = "Natsrt-Dead-Sequence"
"""Header with the event's sequence in its stream."""
STORED_HEADER: Final = "Natsrt-Dead-Stored"
"""Header with the time at which the event was stored (RFC 3339)."""
FAILED_HEADER: Final = "Natsrt-Dead-Failed"
"""Header with the time at which the last attempt failed (RFC 3339)."""
STORED_AT_HEADER: Final = "Natsrt-Retry-Stored"
"""Header of an event that is stored once more for a later attempt: when it was stored first, in microseconds since the
epoch."""
OMITTED_HEADER: Final = "Natsrt-Dead-Omitted"
"""Header of a dead letter without the event's data, because both do not fit into one message: its size in bytes."""

_SAME: Final = (MESSAGE_ID_HEADER, STORED_HEADER)
"""The headers in which two dead letters on one subject agree if they are of the same event."""
_SEQUENCE: Final = "Nats-Sequence"
"""Header with the sequence of a message that was read from a stream."""
DEAD_HEADERS: Final = "natsrt-dead-"
"""The start, in lower case, of the headers that only dead letters have."""
NOT_KEPT: Final = ("nats-", DEAD_HEADERS, STORED_AT_HEADER.lower())
"""Starts of the headers of an event, in lower case, that it does not keep when it is stored once more: instructions to
JetStream, those of a former dead letter of the event, and the time of a former attempt's event."""
_LONGEST_REASON: Final = 500
"""Characters of a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unhandled:
    """One event that an agent type could not handle.

    ``delivery`` is that of its last attempt, which ended at ``failed_at`` (in seconds since the epoch) with ``error``.
    ``reason`` says why it is not tried again. ``attempts`` is the number of its attempts. ``message_id`` is the one
    that its handlers were given. ``agent`` is the agent that it was for, as text; None if that is not known.
    """

    delivery: Delivery
    subject: str
    agent_type: str
    message_id: str
    reason: str
    error: BaseException
    attempts: int
    failed_at: float
    agent: str | None = None

    @property
    def own_headers(self) -> dict[str, str]:
        """The headers that it has of the event, with its message id. They may have any size."""
        kept = {
            name: value
            for name, value in (self.delivery.message.headers or {}).items()
            if not name.lower().startswith(NOT_KEPT)
        }
        return kept | {MESSAGE_ID_HEADER: self.message_id}

    def headers(self, types: ErrorTypes, limits: Limits, *, with_traceback: bool) -> dict[str, str]:
        """Return its other headers. ``limits`` says what is cut of the error."""
        delivery = self.delivery
        failure = describe(self.error, with_traceback=with_traceback, types=types, limits=limits, agent=self.agent)
        return {
            SUBJECT_HEADER: self.subject,
            AGENT_TYPE_HEADER: encode_text(self.agent_type),
            REASON_HEADER: one_line(self.reason),
            # Only ASCII, because not every client reads other characters in headers.
            ERROR_HEADER: json.dumps(orjson.loads(failure.payload), separators=(",", ":")),
            ATTEMPTS_HEADER: str(self.attempts),
            STREAM_HEADER: delivery.stream,
            SEQUENCE_HEADER: str(delivery.first_sequence),
            STORED_HEADER: rfc3339(utc(delivery.stored_at), "milliseconds"),
            FAILED_HEADER: rfc3339(utc(self.failed_at), "milliseconds"),
        }


class DeadLetters:
    """Writes the dead letters of one runtime."""

    def __init__(
        self,
        connection: Connection,
        subjects: Subjects,
        options: Options,
        error_types: ErrorTypes,
        streams: DurableStreams,
        blobs: Blobs,
    ) -> None:
        self._connection = connection
        self._blobs = blobs
        self._subjects = subjects
        self._error_types = error_types
        self._streams = streams
        self._stream = subjects.bucket(DEAD)
        self._domain = Domain(options.jetstream_domain)
        self._with_tracebacks = options.send_tracebacks
        self._writer = WritesOnce(connection, options, streams.mend_other)

    async def stop(self) -> None:
        """Write no more. Has no effect if stopped."""
        await self._writer.stop()

    async def write(self, letter: Unhandled) -> bool:
        """Store a dead letter. Returns False if it was stored before.

        Raises `StreamUnavailable`, `JetStreamFull`, `PermissionDenied` and `MessageTooLarge`.
        """
        delivery = letter.delivery
        await self._keep_payload(letter)
        subject = self._subjects.dead_letter(letter.agent_type, delivery.stream, delivery.first_sequence)
        data, headers = self._fitting(letter)
        follows = 0
        while True:
            try:
                await self._writer.write(self._stream, subject, data, headers, follows=follows)
                return True
            except WrongRevision:
                pass
            present = await self._present(subject)
            if present.headers is None or all(present.headers.get(name) == headers.get(name) for name in _SAME):
                return False
            # It is that of another event: the stream of events was made anew, and counts its messages from 1 again.
            follows = int(present.headers[_SEQUENCE])

    async def _keep_payload(self, letter: Unhandled) -> None:
        """Have the payload of an event that is sent by reference live as long as the dead letter.

        Does not fail: the payload may be lost, which is why the event becomes a dead letter, or JetStream may be full.
        """
        try:
            if (reference := envelope.reference_of(letter.delivery.message.data)) is not None:
                await self._blobs.keep(reference, MONTH)
        except NatsrtError as error:
            logger.warning(
                "the payload of event %d of %s may expire before its dead letter: %s",
                letter.delivery.first_sequence,
                letter.delivery.stream,
                error,
            )

    async def _present(self, subject: str) -> Msg:
        """The last dead letter on ``subject``."""
        request = self._domain.api(f"DIRECT.GET.{self._stream}.{subject}")
        try:
            return await self._connection.client.request(
                request, b"", timeout=WRITE_WITHIN + self._connection.rtt.allowance
            )
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise StreamUnavailable("read", self._stream, str(error) or SILENT) from error

    def _fitting(self, letter: Unhandled) -> tuple[bytes, dict[str, str]]:
        """The data and the headers of a dead letter, so that its stream accepts them. Raises `MessageTooLarge`."""
        for data, headers in self._forms(letter):
            try:
                self._writer.check_size(self._stream, data, headers)
                return data, headers
            except MessageTooLarge as error:
                too_large = error
        raise too_large

    def _forms(self, letter: Unhandled) -> Iterator[tuple[bytes, dict[str, str]]]:
        """The data and the headers of a dead letter, each time with less: of the error, then without the data, and
        without the event's own headers."""
        data, own = letter.delivery.message.data, letter.own_headers
        headers: dict[str, str] = {}
        for limits in CUTS:
            headers = letter.headers(self._error_types, limits, with_traceback=self._with_tracebacks)
            yield data, own | headers
        omitted = {OMITTED_HEADER: str(len(data))}
        yield b"", own | headers | omitted
        yield data, headers
        yield b"", headers | omitted


def published_on(message: Msg, again: str) -> str:
    """The subject on which an event was published. ``again``: the start of those on which events are stored once
    more."""
    if message.subject.startswith(again) and message.headers is not None:
        return message.headers.get(SUBJECT_HEADER, message.subject)
    return message.subject


def one_line(text: str) -> str:
    """``text`` as a header can have it: one line of limited length."""
    return carried(" ".join(text.split()))[:_LONGEST_REASON]
