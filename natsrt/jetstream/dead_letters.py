"""Dead letters: events of durable topics that an agent type could not handle, kept in a stream of their own.

A dead letter is the event's data, unchanged, with the event's headers and those below. So any NATS client can read it,
and publish it again. There is one for each event and agent type: its subject has the agent type, the stream and the
event's sequence, and the server accepts only the first message on it, however often it is sent.
"""

from __future__ import annotations

import asyncio
import datetime
import json
from dataclasses import dataclass
from typing import Final

import nats.errors
import nats.js.errors
import orjson
from nats.aio.msg import Msg
from nats.js import api

from natsrt.errors import JetStreamFull, MessageTooLarge, StreamUnavailable
from natsrt.jetstream.acks import Acks, WrongRevision
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.durable import DurableStreams
from natsrt.jetstream.limits import explained, limit_reached
from natsrt.jetstream.streams import DEAD
from natsrt.options import Options
from natsrt.transport.connection import Connection, Refusal
from natsrt.wire.envelope import MESSAGE_ID_HEADER
from natsrt.wire.exception_parts import carried
from natsrt.wire.failures import FULL, SHORT, SHORTEST, ErrorTypes, Limits, describe
from natsrt.wire.subjects import Subjects, encode_text

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
OMITTED_HEADER: Final = "Natsrt-Dead-Omitted"
"""Header of a dead letter without the event's data, because both do not fit into one message: its size in bytes."""

_SAME: Final = (MESSAGE_ID_HEADER, STORED_HEADER)
"""The headers in which two dead letters on one subject agree if they are of the same event."""
_EXPECTED_LAST: Final = api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value
_EXPECTED_STREAM: Final = api.Header.EXPECTED_STREAM.value
_SEQUENCE: Final = "Nats-Sequence"
"""Header with the sequence of a message that was read from a stream."""
_LONGEST_SEQUENCE: Final = str(2**64 - 1)
DEAD_HEADERS: Final = "natsrt-dead-"
"""The start, in lower case, of the headers that only dead letters have."""
_NOT_KEPT: Final = ("nats-", DEAD_HEADERS)
"""Starts of the headers of an event, in lower case, that its dead letter does not have: instructions to JetStream, and
those of a former dead letter of the event."""
_LONGEST_REASON: Final = 500
"""Characters of a reason."""
_WRITE_FOR: Final = 10.0
"""Seconds for which it is tried to write a dead letter: a cluster elects a leader within that time."""
_ONE_ATTEMPT: Final = 2.0
"""Seconds within which the stream answers, beside the round trip."""
_PAUSE: Final = 0.2
"""Seconds between two attempts."""
_SERVER_ERRORS: Final = 500
"""The least code of JetStream's errors that may pass."""
_SILENT: Final = "JetStream does not answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unhandled:
    """One event that an agent type could not handle.

    ``delivery`` is that of its last attempt, which ended at ``failed_at`` (in seconds since the epoch) with ``error``.
    ``reason`` says why it is not tried again. ``attempts`` is the number of its attempts. ``message_id`` is the one
    that its handlers were given.
    """

    delivery: Delivery
    subject: str
    agent_type: str
    message_id: str
    reason: str
    error: BaseException
    attempts: int
    failed_at: float

    def headers(self, types: ErrorTypes, limits: Limits, *, with_traceback: bool) -> dict[str, str]:
        """Return its headers. ``limits`` says what is cut of the error."""
        delivery = self.delivery
        failure = describe(self.error, with_traceback=with_traceback, types=types, limits=limits)
        kept = {
            name: value
            for name, value in (delivery.message.headers or {}).items()
            if not name.lower().startswith(_NOT_KEPT)
        }
        return kept | {
            SUBJECT_HEADER: self.subject,
            MESSAGE_ID_HEADER: self.message_id,
            AGENT_TYPE_HEADER: encode_text(self.agent_type),
            REASON_HEADER: one_line(self.reason),
            # Only ASCII, because not every client reads other characters in headers.
            ERROR_HEADER: json.dumps(orjson.loads(failure.payload), separators=(",", ":")),
            ATTEMPTS_HEADER: str(self.attempts),
            STREAM_HEADER: delivery.stream,
            SEQUENCE_HEADER: str(delivery.sequence),
            STORED_HEADER: _time(delivery.stored_at),
            FAILED_HEADER: _time(self.failed_at),
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
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._error_types = error_types
        self._streams = streams
        self._stream = subjects.bucket(DEAD)
        self._domain = Domain(options.jetstream_domain)
        self._with_tracebacks = options.send_tracebacks
        self._acks = Acks(connection, options.inbox_prefix)
        self._writing: dict[str, Refusal | None] = {}
        """The subjects on which dead letters are written at present, and why the server refuses them."""
        connection.on_denied(self._on_denied)

    def _on_denied(self, denied: Refusal) -> bool:
        if denied.subject not in self._writing:
            return False
        self._writing[denied.subject] = denied
        return True

    async def stop(self) -> None:
        """Write no more. Has no effect if stopped."""
        await self._acks.close()

    async def write(self, letter: Unhandled) -> bool:
        """Store a dead letter. Returns False if it was stored before.

        Raises `StreamUnavailable`, `JetStreamFull`, `PermissionDenied` and `MessageTooLarge`.
        """
        delivery = letter.delivery
        subject = self._subjects.dead_letter(letter.agent_type, delivery.stream, delivery.sequence)
        data, headers = self._fitting(letter)
        follows = 0
        while True:
            self._writing[subject] = None
            try:
                await self._publish(subject, data, headers | {_EXPECTED_LAST: str(follows)})
                return True
            except WrongRevision:
                pass
            finally:
                self._writing.pop(subject, None)
            present = await self._present(subject)
            if present.headers is None or all(present.headers.get(name) == headers[name] for name in _SAME):
                return False
            # It is that of another event: the stream of events was made anew, and counts its messages from 1 again.
            follows = int(present.headers[_SEQUENCE])

    async def _present(self, subject: str) -> Msg:
        """The last dead letter on ``subject``."""
        request = self._domain.api(f"DIRECT.GET.{self._stream}.{subject}")
        try:
            return await self._connection.client.request(
                request, b"", timeout=_ONE_ATTEMPT + self._connection.rtt.allowance
            )
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise StreamUnavailable("read", self._stream, str(error) or _SILENT) from error

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        """Publish until the stream answers, for some seconds. It accepts the message once, however often it is sent."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _WRITE_FOR
        while True:
            try:
                async with asyncio.timeout(_ONE_ATTEMPT + self._connection.rtt.allowance):
                    await self._publish_once(subject, data, headers)
                    return
            except nats.js.errors.APIError as error:
                if (limit := limit_reached(error)) is not None:
                    raise JetStreamFull("write to", self._stream, limit.name, explained(limit, error)) from None
                problem = error.description or str(error)
                if error.code is not None and error.code < _SERVER_ERRORS:
                    raise StreamUnavailable("write to", self._stream, problem) from error
            except nats.js.errors.NoStreamResponseError:
                problem = "there is no such stream, or it has no leader now"
                await self._streams.mend_other(self._stream)
            except TimeoutError:
                problem = _SILENT
            except (nats.errors.Error, OSError) as error:
                problem = str(error) or type(error).__name__
            if (denied := self._writing[subject]) is not None:
                raise denied
            if loop.time() > until:
                raise StreamUnavailable("write to", self._stream, problem)
            await asyncio.sleep(_PAUSE)

    async def _publish_once(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        if not self._acks.open:
            await self._acks.subscribe()
        await self._acks.publish(self._domain.publish(subject), data, headers)

    def _fitting(self, letter: Unhandled) -> tuple[bytes, dict[str, str]]:
        """The data and the headers of a dead letter, so that the server accepts them."""
        data = letter.delivery.message.data
        expected = {_EXPECTED_STREAM: self._stream, _EXPECTED_LAST: _LONGEST_SEQUENCE}
        for limits in (FULL, SHORT, SHORTEST):
            with_traceback = self._with_tracebacks and limits is not SHORTEST
            headers = letter.headers(self._error_types, limits, with_traceback=with_traceback) | expected
            try:
                self._connection.check_size(data, headers)
                return data, headers
            except MessageTooLarge:
                pass
        headers[OMITTED_HEADER] = str(len(data))
        self._connection.check_size(b"", headers)
        return b"", headers


def published_on(message: Msg, again: str) -> str:
    """The subject on which an event was published. ``again``: that of events that are stored once more."""
    if message.subject == again and message.headers is not None:
        return message.headers.get(SUBJECT_HEADER, message.subject)
    return message.subject


def one_line(text: str) -> str:
    """``text`` as a header can have it: one line of limited length."""
    return carried(" ".join(text.split()))[:_LONGEST_REASON]


def _time(seconds: float) -> str:
    """A time in seconds since the epoch, as RFC 3339 writes it."""
    return (
        datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )
