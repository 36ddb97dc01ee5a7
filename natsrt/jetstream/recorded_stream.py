"""Reads what ``natsrt record`` has stored: calls, replies and events, with their messages decoded."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from autogen_core import AgentId, TopicId
from autogen_core._serialization import UnknownPayload

from natsrt.errors import BlobDamaged, BlobLost, CannotDecode, StreamUnavailable
from natsrt.jetstream.dead_letter_box import event_topic
from natsrt.jetstream.recorder import record_tree
from natsrt.jetstream.stream_reader import StoredMessage, StreamReader
from natsrt.wire import envelope
from natsrt.wire.envelope import TYPE_HEADER, Envelope
from natsrt.wire.failures import SERVICE_ERROR, ErrorTypes, decode_answer
from natsrt.wire.recorded import Kind, Record, read_record
from natsrt.wire.references import Reference
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects, decode_token

_UNANSWERED = 100_000
"""Calls that are kept for their replies: the latest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEntry:
    """A message that passed while ``natsrt record`` ran.

    Attributes:
        kind: ``call``, ``reply``, ``event``, or ``delivery``: an event on its way to one keyed agent.
        sequence: Its number in the stream.
        at: When it passed the recorder, in seconds since the epoch.
        stored_at: When the stream stored it.
        sender: The agent that sent it; of a reply, the agent that was called. None: no agent, or not known.
        recipient: The agent that a call or a delivery is for. None for replies and events.
        topic: The topic of an event. None for the others, and if it cannot be read.
        message: The message, or the message of the reply. It is an ``UnknownPayload`` if its class is not known in this
            process, and the body's bytes if it is plain. None if there is none: see `error` and `problem`.
        error: The exception that a reply reports, as a caller would get it. None if it reports none.
        problem: Why the message cannot be read, as `BlobLost` for a payload of which a part did not pass. None if it
            was read.
        call: The call that a reply belongs to. None if the recorder did not see it, or did not say so.
        message_id: Its id; empty for a plain message. That of a reply is its call's with ``-r`` at the end.
        parents: The visits that waited for this call, the first one first, as its sender named them.
        run: The run of the recorder, and `number` its number there, from 1 in the order of passing.
        missed: How many messages the recorder left out just before this one.
        gap: For how many seconds it was not connected just before this one.
        subject, reply_to, headers, data: The message as it was sent. ``reply_to`` is empty if it wants no reply.
    """

    kind: Kind
    sequence: int
    at: float
    stored_at: float
    sender: AgentId | None
    recipient: AgentId | None
    topic: TopicId | None
    message: Any = None
    error: BaseException | None = None
    problem: Exception | None = None
    call: RecordedEntry | None = field(default=None, repr=False)
    message_id: str
    parents: tuple[str, ...]
    run: str
    number: int
    missed: int
    gap: float
    subject: str
    reply_to: str
    headers: dict[str, str]
    data: bytes = field(repr=False)


async def records(
    reader: StreamReader, subjects: Subjects, stream: str, since: float | None = None, branch: str = ">"
) -> AsyncIterator[tuple[StoredMessage, Record]]:
    """The records that are in ``stream`` now, from the time ``since`` on if it is given, each as it is stored.

    ``branch`` is what follows the name of the stream in their subjects. Raises as `natsrt.NatsAgentRuntime.recorded`.
    """
    tree = record_tree(subjects, stream)
    info = await reader.info(stream)
    if info is None:
        raise StreamUnavailable("read", stream, "there is no such stream: `natsrt record --to` makes it")
    async for stored in reader.read(stream, f"{tree}.{branch}", since=since, last=info.state.last_seq):
        yield stored, read_record(stored.headers, stored.data)


class RecordedStream:
    """Reads streams of records."""

    def __init__(
        self, subjects: Subjects, reader: StreamReader, serialization: Serialization, error_types: ErrorTypes
    ) -> None:
        self._subjects = subjects
        self._reader = reader
        self._serialization = serialization
        self._error_types = error_types

    async def read(self, stream: str, since: float | None = None) -> AsyncIterator[RecordedEntry]:
        """The entries that are there now. Raises as `natsrt.NatsAgentRuntime.recorded`."""
        tree = record_tree(self._subjects, stream)
        calls: dict[tuple[str, int], RecordedEntry] = {}
        async for stored, record in records(self._reader, self._subjects, stream, since):
            if record.kind == "chunk":
                continue
            call = None if record.call is None else calls.get((record.run, record.call))
            entry = await self._entry(stored, record, call, tree)
            if entry.kind == "call" and entry.reply_to:
                calls[record.run, record.number] = entry
                if len(calls) > _UNANSWERED:
                    del calls[next(iter(calls))]
            yield entry

    async def _entry(
        self, stored: StoredMessage, record: Record, call: RecordedEntry | None, tree: str
    ) -> RecordedEntry:
        message = error = problem = body = None
        try:
            body = decode_answer(record.headers or None, record.data)
            if body is not None and body.reference is not None:
                body.payload = await self._payload(stored.stream, tree, body.reference)
            error = self._error(record, body)
            message = None if error is not None else self._message(record, body)
        except (CannotDecode, BlobLost, BlobDamaged) as unreadable:
            problem = unreadable
        visits = "" if body is None else body.text("chain") or ""
        return RecordedEntry(
            kind=record.kind,
            sequence=stored.sequence,
            at=record.at,
            stored_at=stored.stored_at,
            sender=_agent(record.sender),
            recipient=_agent(record.recipient),
            topic=event_topic(self._subjects, record.subject, record.data) if record.kind == "event" else None,
            message=message,
            error=error,
            problem=problem,
            call=call,
            message_id=record.id,
            parents=tuple(visits.split()),
            run=record.run,
            number=record.number,
            missed=record.missed,
            gap=record.gap,
            subject=record.subject,
            reply_to=record.reply,
            headers=dict(record.headers),
            data=record.data,
        )

    def _error(self, record: Record, body: Envelope | None) -> BaseException | None:
        if record.kind != "reply":
            return None
        text = record.headers.get(SERVICE_ERROR)
        if (body is None and text is None) or (body is not None and body.type != envelope.ERROR):
            return None
        worker = None if body is None else body.text("workerid")
        payload = record.data if body is None else body.payload
        return self._error_types.rebuild(payload, agent=record.sender or None, worker_id=worker, text=text)

    def _message(self, record: Record, body: Envelope | None) -> Any:
        if body is None:
            name = record.headers.get(TYPE_HEADER)
            if name is None:
                return record.data
            found = self._serialization.decode(name, self._serialization.content_type_of(name), record.data)
            return self._known(found, None)
        name, full_name = body.required("messagetype"), body.text("messageclass")
        try:
            found = self._serialization.decode(name, body.content_type, body.payload, full_name)
        except CannotDecode:
            if (body.reference is not None) or (general := body.general()) is None:
                raise
            found = self._serialization.decode(name, general.content_type, general.payload, full_name)
        return self._known(found, full_name)

    def _known(self, found: Any, class_name: str | None) -> Any:
        if isinstance(found, UnknownPayload):
            return self._serialization.decode_unregistered(found, class_name)
        return found

    async def _payload(self, stream: str, tree: str, reference: Reference) -> bytes:
        """A payload that was sent by reference, from the chunks that passed."""
        parts: dict[str, bytes] = {}
        chunks = f"{tree}.chunk.{reference.blob_id}"
        async for stored in self._reader.read(stream, f"{chunks}.*"):
            parts.setdefault(stored.subject, stored.data)
        for number in range(reference.chunks):
            if f"{chunks}.{number}" not in parts:
                raise BlobLost(reference.blob_id, number, reference.chunks)
        payload = b"".join(parts[f"{chunks}.{number}"] for number in range(reference.chunks))
        if hashlib.sha256(payload).hexdigest() != reference.sha256:
            raise BlobDamaged(reference.blob_id, "its recorded chunks do not have its SHA-256")
        return payload


def _agent(text: str) -> AgentId | None:
    agent_type, slash, key = text.partition("/")
    try:
        return AgentId(agent_type, decode_token(key)) if slash else None
    except ValueError:
        return None
