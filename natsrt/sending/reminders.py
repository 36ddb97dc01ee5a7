"""Sets, removes and lists reminders: see `natsrt.reminder_types`.

A reminder is a schedule in the stream of the reminders' topics, on a subject of its own, so that setting it again
replaces it. Its message has no envelope: an envelope has a message id, which would be the same each time. So the
handler gets the id that events with a plain body have, which says the stream and the sequence: another one for each
time at which the reminder is due, and the same in all attempts to handle it.

A message that does not fit is sent by reference, which only an envelope can have. Its message id is put in the place of
that in the envelope. The payload lives until the reminder is removed or replaced, and longer if something that was due
before is not handled yet: see `natsrt.jetstream.payload_sweep`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from autogen_core import AgentId, TopicId
from nats.aio.msg import Msg
from nats.js import api
from nats.nuid import NUID

from natsrt.errors import CannotSchedule, MessageTooLarge, NatsrtError
from natsrt.jetstream.durable import DurableStreams
from natsrt.jetstream.payload_uses import PayloadUses
from natsrt.jetstream.registry.registry import Registry
from natsrt.reminder_types import Reminder, reminder_of, reminder_prefix, reminder_topic
from natsrt.sending.durable import EXPECTED_STREAM, DurablePublisher
from natsrt.sending.referring import Referring
from natsrt.sending.steps import SendSteps
from natsrt.transport.bodies import Bodies
from natsrt.wire import envelope
from natsrt.wire.envelope import TYPE_HEADER, attribute
from natsrt.wire.references import Reference
from natsrt.wire.schedules import SCHEDULE, TARGET, TIME_ZONE, Schedule
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.subjects import Subjects, encode_token

logger: logging.Logger = logging.getLogger("natsrt.sending")

_MSG_ID: Final = api.Header.MSG_ID.value


def reminder_headers(
    subjects: Subjects,
    stream: str,
    topic: TopicId,
    type_name: str,
    schedule: Schedule,
    blob_id: str | None = None,
) -> dict[str, str]:
    """The headers of a reminder on ``topic``, with a message of the type ``type_name``.

    ``blob_id`` is that of its payload if it is sent by reference; None: it is not.
    """
    headers = schedule.headers(subjects.topic(topic.type, topic.source))
    headers |= {TYPE_HEADER: type_name, EXPECTED_STREAM: stream}
    # A payload is of one reminder: what is sent again must not take the place of another one that is set meanwhile.
    return headers if blob_id is None else headers | {_MSG_ID: blob_id}


def reminder_attributes(encoded: Encoded) -> str:
    """The attributes of the envelope that a reminder has if its message is sent by reference, as JSON text.

    The id is the same each time, so those who handle what the server publishes put another one in its place.
    """
    names = envelope.message_names(encoded.type_name, encoded.class_name)
    return f"{attribute('id', NUID().next().decode())},{attribute('source', envelope.NO_AGENT)},{names}"


class Reminders:
    """The reminders of one namespace."""

    def __init__(
        self,
        *,
        steps: SendSteps,
        subjects: Subjects,
        registry: Registry,
        serialization: Serialization,
        streams: DurableStreams,
        publisher: DurablePublisher,
        bodies: Bodies,
        referring: Referring,
        uses: PayloadUses,
    ) -> None:
        self._steps = steps
        self._subjects = subjects
        self._registry = registry
        self._serialization = serialization
        self._streams = streams
        self._publisher = publisher
        self._bodies = bodies
        self._referring = referring
        self._uses = uses

    def _stream(self, agent_type: str) -> str | None:
        """The stream of the reminders of a type; None as long as no reminder was ever set."""
        return self._registry.view.durable_stream(f"{reminder_prefix(agent_type)}any")

    async def set(self, agent: AgentId, name: str, message: Any, schedule: Schedule) -> None:
        """Set a reminder, in place of one with the same name. The topics of reminders must be durable.

        Raises as `DurablePublisher.publish`, and `CannotSerialize` and ValueError if the message or the names cannot be
        sent.
        """
        begun = asyncio.get_running_loop().time()
        async with self._steps.queue.turn(None) as turn:
            await self._steps.wait_ready(None, begun)
            await self._set(agent, name, message, schedule, turn.end)

    async def _set(self, agent: AgentId, name: str, message: Any, schedule: Schedule, sent: Callable[[], None]) -> None:
        """Set a reminder. ``sent`` is called when later messages may be sent."""
        topic = reminder_topic(agent, name)
        stream = self._stream(agent.type)
        if stream is None:
            raise CannotSchedule(f"a message for {topic}", "the topics of reminders are not durable")
        encoded = self._serialization.encode(message)
        subject = self._subjects.reminder(stream, agent.type, agent.key, name)
        headers = reminder_headers(self._subjects, stream, topic, encoded.type_name, schedule)
        replaced = await self._payload(stream, subject)
        attributes = reminder_attributes(encoded)
        if self._referring.stored_whole(attributes, encoded, headers, topic):
            await self._publisher.store(subject, topic, stream, encoded.payload, headers, sent)
        else:
            await self._set_large(subject, topic, stream, attributes, encoded, schedule, sent)
        if replaced is not None:
            await self._release(stream, agent, name, replaced)

    async def _set_large(
        self,
        subject: str,
        topic: TopicId,
        stream: str,
        attributes: str,
        encoded: Encoded,
        schedule: Schedule,
        sent: Callable[[], None],
    ) -> None:
        """Set a reminder whose message is sent by reference: it lives until the reminder is gone."""
        self._referring.require_readers(self._registry.view.workers, len(encoded.payload))
        last = schedule.last
        ttl = math.inf if last is None else self._referring.kept_for(stream, last)
        reference = await self._bodies.store(encoded.payload, ttl, self._referring.event_in(stream))
        unused = partial(self._bodies.discard, reference)
        headers = reminder_headers(self._subjects, stream, topic, encoded.type_name, schedule, reference.blob_id)
        try:
            body = self._bodies.pack_reference(envelope.EVENT, attributes, reference, encoded.content_type)
        except MessageTooLarge:
            unused()
            raise
        await self._publisher.store(subject, topic, stream, body, headers, sent, unused)

    async def _payload(self, stream: str, subject: str) -> Reference | None:
        """The payload of a reminder that is set; None if it has none by reference, or if that cannot be found out."""
        if not self._registry.reads_bucket:
            return None
        try:
            return await self._uses.of_reminder(stream, subject)
        except NatsrtError as error:
            logger.debug("the payload on %s is left to be swept: %s", subject, error)
            return None

    async def _release(self, stream: str, agent: AgentId, name: str, payload: Reference) -> None:
        """Delete the payload of a reminder that is gone, unless an event that it has published still needs it."""
        try:
            used = await self._uses.by_reminder(stream, agent, name)
            # An event that has failed meanwhile is found here.
            used |= await self._uses.by_copies_for(stream, agent.type)
        except NatsrtError as error:
            logger.debug("the payload of the reminder %s of %s is left to be swept: %s", name, agent, error)
            return
        if payload.blob_id not in used:
            self._bodies.discard(payload)

    async def forget(self, agent: AgentId, name: str) -> bool:
        """Remove a reminder. Returns False if there was none. Raises ValueError, and as `DurableStreams.purge`."""
        reminder_topic(agent, name)
        stream = self._stream(agent.type)
        if stream is None:
            return False
        subject = self._subjects.reminder(stream, agent.type, agent.key, name)
        payload = await self._payload(stream, subject)
        removed = await self._streams.purge(stream, subject) > 0
        if removed and payload is not None:
            await self._release(stream, agent, name, payload)
        return removed

    async def list(self, agent_type: str | None, key: str | None) -> list[Reminder]:
        """The reminders of all agents, of one type, or of one agent, in the order of agents and names.

        Raises as `DurableStreams.purge`.
        """
        stream = self._stream(agent_type or "any")
        if stream is None:
            return []
        type_token, key_token = ("*" if value is None else encode_token(value) for value in (agent_type, key))
        subject = f"{self._subjects.reminders(stream)}.{type_token}.{key_token}.*"
        read = map(self._read, await self._streams.headers(stream, subject))
        found = [reminder for reminder in read if reminder is not None]
        return sorted(found, key=lambda reminder: (reminder.agent.type, reminder.agent.key, reminder.name))

    def _read(self, message: Msg) -> Reminder | None:
        """The reminder that a schedule is; None if it is none, because another program wrote it."""
        headers = message.headers or {}
        try:
            named = reminder_of(*self._subjects.parse_topic(headers.get(TARGET, "")))
        except ValueError:
            return None
        if named is None or SCHEDULE not in headers:
            return None
        agent, name = named
        return Reminder(
            agent=agent,
            name=name,
            schedule=headers[SCHEDULE],
            timezone=headers.get(TIME_ZONE),
            message_type=headers.get(TYPE_HEADER),
            set_at=message.metadata.timestamp,
        )
