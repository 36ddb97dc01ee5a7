"""What refers to payloads of events that are sent by reference.

All methods raise as `StreamReader`.
"""

from __future__ import annotations

from typing import Final

from autogen_core import AgentId

from natsrt.jetstream.stream_reader import StreamReader
from natsrt.jetstream.streams import DEAD
from natsrt.reminder_types import reminder_of, reminder_topic
from natsrt.wire import envelope
from natsrt.wire.references import Reference
from natsrt.wire.subjects import Subjects, encode_token

_ALL_TYPES: Final = "*"


class PayloadUses:
    """Finds the references in the streams of one namespace."""

    def __init__(self, subjects: Subjects, reader: StreamReader) -> None:
        self._subjects = subjects
        self._reader = reader
        self._dead = subjects.bucket(DEAD)

    async def by_copies(self, stream: str) -> set[str]:
        """The payloads of all dead letters of a stream, and of what is in the stream on other subjects than topics:
        events that wait for a later attempt, and what is published later.

        Look for events that wait to be handled before. What is found is searched for in the order in which events move:
        dead letters are stored in the stream again, and what is published later is stored there again.
        """
        return await self._referred_to(stream, _ALL_TYPES, f"{self._subjects.later(stream)}.>")

    async def by_copies_for(self, stream: str, agent_type: str) -> set[str]:
        """The payloads of the dead letters of one agent type, and of what waits in the stream for a later attempt."""
        return await self._referred_to(stream, encode_token(agent_type), f"{self._subjects.later(stream)}.retry.>")

    async def _referred_to(self, stream: str, type_token: str, later: str) -> set[str]:
        found: set[str] = set()
        letters = f"{self._subjects.dead}.{type_token}.{stream}.>"
        info = await self._reader.info(self._dead, letters)
        if info is not None and info.state.subjects:  # workers may count them, and not all workers may read them
            found |= await self._references(self._dead, letters)
        for subject in (later, f"{self._subjects.again(stream)}.>"):
            found |= await self._references(stream, subject)
        return found

    async def by_reminders(self, stream: str) -> set[str]:
        """The payloads of the events that reminders have published in ``stream``, and that wait to be handled."""
        topics = self._subjects.everything
        info = await self._reader.info(stream, topics)
        found: set[str] = set()
        for subject in (info.state.subjects if info is not None else None) or {}:
            try:
                reminder = reminder_of(*self._subjects.parse_topic(subject))
            except ValueError:  # another program published it
                continue
            if reminder is not None:
                found |= await self.by_reminder(stream, *reminder)
        return found

    async def by_reminder(self, stream: str, agent: AgentId, name: str) -> set[str]:
        """The payloads of the events that one reminder has published in ``stream``, and that wait to be handled."""
        topic = reminder_topic(agent, name)
        consumer = await self._reader.consumer(stream, encode_token(agent.type))
        handled = 0 if consumer is None else int(consumer["ack_floor"]["stream_seq"])
        return await self._references(stream, self._subjects.topic(topic.type, topic.source), handled + 1)

    async def of_reminder(self, stream: str, subject: str) -> Reference | None:
        """The payload of the reminder that ``stream`` keeps on ``subject``; None: it has none by reference, or is not
        set."""
        message = await self._reader.last(stream, subject)
        return None if message is None else envelope.reference_of(message.data)

    async def _references(self, stream: str, subject: str, first: int = 1) -> set[str]:
        """The payloads of the events in a stream, from a sequence on, on subjects that match ``subject``."""
        read = [
            envelope.reference_of(message.data) async for message in self._reader.read(stream, subject, first=first)
        ]
        return {reference.blob_id for reference in read if reference is not None}
