"""Events that are stored once more in their stream, for one agent type: dead letters, and what is replayed.

Such an event is published on ``natsrt.again.<stream>.<type>``, which only the consumer of that type delivers. Its body
is unchanged, and headers say its subject and message id, so that its handlers see the event as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from autogen_core import TopicId
from nats.js import api

from natsrt.errors import EventNotStored
from natsrt.jetstream.dead_letter_box import DeadLetter, DeadLetterBox, event_topic
from natsrt.jetstream.dead_letters import SUBJECT_HEADER
from natsrt.jetstream.stream_reader import StoredMessage
from natsrt.sending.durable import DurablePublisher
from natsrt.wire.envelope import MESSAGE_ID_HEADER
from natsrt.wire.subjects import Subjects, encode_token

_MSG_ID: Final = api.Header.MSG_ID.value
_EXPECTED_STREAM: Final = api.Header.EXPECTED_STREAM.value
_UNKNOWN: Final = TopicId("unknown", "unknown")
"""The topic in errors about an event whose topic cannot be read."""


class Again:
    """Stores events once more. Its methods raise as `DurablePublisher.store`."""

    def __init__(self, publisher: DurablePublisher, subjects: Subjects, box: DeadLetterBox) -> None:
        self._publisher = publisher
        self._subjects = subjects
        self._box = box

    async def redrive(self, letter: DeadLetter) -> None:
        """Give a dead letter to its agent type again, then remove it.

        If this is interrupted between the two, and done again within the time for which the stream remembers ids, the
        stream takes the event as stored already.

        Raises `EventNotStored` also if the dead letter lacks the event's body, which is not in its stream any more.
        """
        data = await self._box.data(letter)
        if data is None:
            reason = f"its body did not fit into the dead letter, and event {letter.event_sequence} is gone"
            raise EventNotStored(str(letter.topic or letter.subject), letter.stream, reason, may_be_stored=False)
        # The time tells it from another dead letter with this number, if the stream of dead letters was made anew.
        headers = dict(letter.headers)
        if letter.message_id:
            headers[MESSAGE_ID_HEADER] = letter.message_id
        store_id = f"redrive-{letter.sequence}-{letter.kept_at * 1000:.0f}"
        await self._publish(letter.stream, letter.agent_type, letter.subject, letter.topic, headers, data, store_id)
        await self._box.discard(letter)

    async def replay(self, event: StoredMessage, agent_type: str, name: str) -> None:
        """Give an event to an agent type again. ``name`` tells this replay from others of the same event."""
        headers = {key: value for key, value in event.headers.items() if not key.lower().startswith("nats-")}
        headers.setdefault(MESSAGE_ID_HEADER, f"{event.stream}-{event.sequence}")
        topic = event_topic(self._subjects, event.subject, event.data)
        store_id = f"replay-{name}-{event.sequence}"
        await self._publish(event.stream, agent_type, event.subject, topic, headers, event.data, store_id)

    async def _publish(
        self,
        stream: str,
        agent_type: str,
        event_subject: str,
        topic: TopicId | None,
        headers: Mapping[str, str],
        data: bytes,
        store_id: str,
    ) -> None:
        subject = f"{self._subjects.again(stream)}.{encode_token(agent_type)}"
        own = {SUBJECT_HEADER: event_subject, _MSG_ID: f"{store_id}@{subject}", _EXPECTED_STREAM: stream}
        await self._publisher.store(subject, topic or _UNKNOWN, stream, data, {**headers, **own}, None)
