"""The dead letters that are stored: read, counted and removed. `natsrt.jetstream.dead_letters` writes them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Final

import orjson
from autogen_core import TopicId

from natsrt.errors import CannotDecode, NatsrtError
from natsrt.jetstream.dead_letters import (
    AGENT_TYPE_HEADER,
    ATTEMPTS_HEADER,
    DEAD_HEADERS,
    ERROR_HEADER,
    FAILED_HEADER,
    OMITTED_HEADER,
    REASON_HEADER,
    SEQUENCE_HEADER,
    STORED_HEADER,
    STREAM_HEADER,
    SUBJECT_HEADER,
)
from natsrt.jetstream.stream_reader import StoredMessage, StreamReader
from natsrt.jetstream.streams import DEAD
from natsrt.wire import envelope
from natsrt.wire.envelope import MESSAGE_ID_HEADER
from natsrt.wire.subjects import Subjects, decode_token, encode_token
from natsrt.wire.times import seconds_of

_STORED_WITHIN: Final = 0.002
"""Seconds by which the time of an event in its dead letter differs from that in its stream, at most."""

_OF_DEAD_LETTERS: Final = ("nats-", DEAD_HEADERS, SUBJECT_HEADER.lower(), MESSAGE_ID_HEADER.lower())
"""Starts of the headers, in lower case, that the event itself did not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event of a durable topic that an agent type could not handle.

    It stays until it is redriven or discarded, for thirty days at most. Times are in seconds since the epoch.
    """

    sequence: int
    """Its number among the dead letters: it names the dead letter."""
    agent_type: str
    """The agent type that could not handle the event."""
    topic: TopicId | None
    """The topic of the event; None if it cannot be read."""
    message_id: str
    """The message id that the event's handlers were given."""
    reason: str
    """Why the event is not tried again."""
    error_type: str
    """The class of the last error, as natsrt names it: of the handler's exception, for example."""
    error: str
    """The text of the last error."""
    traceback: str | None
    """The traceback of the last error; None if workers send none, or it did not fit."""
    attempts: int
    """How often the event was tried."""
    stream: str
    """The stream of the event."""
    event_sequence: int
    """The sequence of the event in its stream."""
    stored_at: float
    """When the event was stored in its stream."""
    failed_at: float
    """When the last attempt failed."""
    subject: str
    """The subject on which the event was published."""
    data: bytes | None = field(repr=False)
    """The body of the event, as it was published; None if it did not fit, and is only in the event's stream."""
    headers: Mapping[str, str] = field(repr=False)
    """The headers of the event, as it was published, without those that JetStream reads."""
    kept_at: float = field(repr=False)
    """When the dead letter was stored."""


class DeadLetterBox:
    """The dead letters of one namespace. Its methods raise as those of `StreamReader`."""

    def __init__(self, subjects: Subjects, reader: StreamReader) -> None:
        self._subjects = subjects
        self._reader = reader
        self._stream = subjects.bucket(DEAD)
        self.measured: int | None = None
        """The number of dead letters when `measure` last ran; None: it did not run, or this user may not read it."""

    async def measure(self) -> None:
        """Count the dead letters for `measured`. Does not fail."""
        try:
            self.measured = sum((await self.count()).values())
        except NatsrtError:
            self.measured = None

    async def count(self, agent_type: str | None = None) -> dict[str, int]:
        """The number of dead letters by agent type, of one type if it is given. A name that is too long for a subject
        is counted by its hash."""
        info = await self._reader.info(self._stream, self._filter(agent_type))
        found: dict[str, int] = {}
        at = self._subjects.dead.count(".") + 1
        for subject, number in ((info.state.subjects if info is not None else None) or {}).items():
            token = subject.split(".")[at]
            found[token] = found.get(token, 0) + int(number)
        return {_name(token): number for token, number in sorted(found.items())}

    def _filter(self, agent_type: str | None) -> str:
        return f"{self._subjects.dead}.{'*' if agent_type is None else encode_token(agent_type)}.>"

    async def read(self, agent_type: str | None = None, since: float | None = None) -> AsyncGenerator[DeadLetter, None]:
        """The dead letters that are there now, the oldest first: of one type, and kept at ``since`` or later."""
        info = await self._reader.info(self._stream)
        if info is None or not info.state.messages:
            return
        async for message in self._reader.read(
            self._stream, self._filter(agent_type), since=since, last=info.state.last_seq
        ):
            yield self.decode(message)

    async def get(self, sequence: int) -> DeadLetter | None:
        """The dead letter with this number; None if there is none."""
        message = await self._reader.message(self._stream, sequence)
        return None if message is None else self.decode(message)

    async def discard(self, letter: DeadLetter) -> bool:
        """Remove a dead letter. Returns False if it was removed before."""
        return await self._reader.delete(self._stream, letter.sequence)

    async def data(self, letter: DeadLetter) -> bytes | None:
        """The body of the event: from its stream if the dead letter does not have it. None if it is not there."""
        if letter.data is not None:
            return letter.data
        event = await self._reader.message(letter.stream, letter.event_sequence)
        if event is None or abs(event.stored_at - letter.stored_at) > _STORED_WITHIN:
            return None
        return event.data

    def decode(self, message: StoredMessage) -> DeadLetter:
        """A dead letter as it is stored. What it lacks is empty: any NATS client can write one."""
        headers = {name.lower(): value for name, value in message.headers.items()}

        def text(name: str) -> str:
            return headers.get(name.lower(), "")

        tokens = message.subject.removeprefix(f"{self._subjects.dead}.").split(".")
        error = _json(text(ERROR_HEADER))
        subject = text(SUBJECT_HEADER)
        traceback = error.get("traceback")
        return DeadLetter(
            sequence=message.sequence,
            agent_type=decode_token(text(AGENT_TYPE_HEADER) or tokens[0]),
            topic=self._topic(subject, message.data),
            message_id=text(MESSAGE_ID_HEADER),
            reason=text(REASON_HEADER),
            error_type=str(error.get("type", "")),
            error=str(error.get("message", "")),
            traceback=None if traceback is None else str(traceback),
            attempts=_number(text(ATTEMPTS_HEADER)),
            stream=text(STREAM_HEADER),
            event_sequence=_number(text(SEQUENCE_HEADER)),
            stored_at=_time(text(STORED_HEADER), message.stored_at),
            failed_at=_time(text(FAILED_HEADER), message.stored_at),
            subject=subject,
            data=None if text(OMITTED_HEADER) else message.data,
            headers={
                name: value for name, value in message.headers.items() if not name.lower().startswith(_OF_DEAD_LETTERS)
            },
            kept_at=message.stored_at,
        )

    def _topic(self, subject: str, data: bytes) -> TopicId | None:
        return event_topic(self._subjects, subject, data)


def event_topic(subjects: Subjects, subject: str, data: bytes) -> TopicId | None:
    """The topic of an event, from its subject, and from its body where the subject has only a hash of it."""
    try:
        body = envelope.decode(data)
        claims = (None, None) if body is None else (body.text("topictype"), body.text("topicsource"))
        return TopicId(*subjects.parse_topic(subject, topic_type=claims[0], source=claims[1]))
    except (CannotDecode, ValueError):
        return None


def _name(token: str) -> str:
    try:
        return decode_token(token)
    except ValueError:
        return token


def _json(text: str) -> dict[str, object]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _time(text: str, default: float) -> float:
    try:
        return seconds_of(text)
    except ValueError:
        return default
