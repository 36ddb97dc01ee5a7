"""Sets, removes and lists reminders: see `natsrt.reminder_types`.

A reminder is a schedule in the stream of the reminders' topics, on a subject of its own, so that setting it again
replaces it. Its message has no envelope: an envelope has a message id, which would be the same each time. So the
handler gets the id that events with a plain body have, which says the stream and the sequence: another one for each
time at which the reminder is due, and the same in all attempts to handle it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autogen_core import AgentId, TopicId
from nats.aio.msg import Msg

from natsrt.errors import CannotSchedule
from natsrt.jetstream.durable import DurableStreams
from natsrt.jetstream.registry.registry import Registry
from natsrt.reminder_types import Reminder, reminder_of, reminder_prefix, reminder_topic
from natsrt.sending.durable import EXPECTED_STREAM, DurablePublisher
from natsrt.wire.envelope import TYPE_HEADER
from natsrt.wire.schedules import SCHEDULE, TARGET, TIME_ZONE, Schedule
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects, encode_token


def reminder_headers(
    subjects: Subjects, stream: str, topic: TopicId, type_name: str, schedule: Schedule
) -> dict[str, str]:
    """The headers of a reminder on ``topic``, with a message of the type ``type_name``."""
    headers = schedule.headers(subjects.topic(topic.type, topic.source))
    return headers | {TYPE_HEADER: type_name, EXPECTED_STREAM: stream}


class Reminders:
    """The reminders of one namespace."""

    def __init__(
        self,
        subjects: Subjects,
        registry: Registry,
        serialization: Serialization,
        streams: DurableStreams,
        publisher: DurablePublisher,
    ) -> None:
        self._subjects = subjects
        self._registry = registry
        self._serialization = serialization
        self._streams = streams
        self._publisher = publisher

    def _stream(self, agent_type: str) -> str | None:
        """The stream of the reminders of a type; None as long as no reminder was ever set."""
        return self._registry.view.durable_stream(f"{reminder_prefix(agent_type)}any")

    async def set(
        self, agent: AgentId, name: str, message: Any, schedule: Schedule, sent: Callable[[], None] | None
    ) -> None:
        """Set a reminder, in place of one with the same name. The topics of reminders must be durable.

        ``sent`` is called when later messages may be sent; None: no function is called. Raises as
        `DurablePublisher.publish`, and `CannotSerialize` and ValueError if the message or the names cannot be sent.
        """
        topic = reminder_topic(agent, name)
        stream = self._stream(agent.type)
        if stream is None:
            raise CannotSchedule(f"a message for {topic}", "the topics of reminders are not durable")
        encoded = self._serialization.encode(message)
        subject = self._subjects.reminder(stream, agent.type, agent.key, name)
        headers = reminder_headers(self._subjects, stream, topic, encoded.type_name, schedule)
        await self._publisher.store(subject, topic, stream, encoded.payload, headers, sent)

    async def forget(self, agent: AgentId, name: str) -> bool:
        """Remove a reminder. Returns False if there was none. Raises ValueError, and as `DurableStreams.purge`."""
        reminder_topic(agent, name)
        stream = self._stream(agent.type)
        if stream is None:
            return False
        return await self._streams.purge(stream, self._subjects.reminder(stream, agent.type, agent.key, name)) > 0

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
