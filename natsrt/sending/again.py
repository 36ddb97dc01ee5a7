"""Events that are stored once more in their stream, for one agent type: dead letters, and what is replayed.

Such an event is published on ``natsrt.again.<stream>.<type>`` if it is replayed, and else on a subject that is for it
alone; only the consumer of that type delivers it. Its body
is unchanged, and headers say its subject and message id, so that its handlers see the event as it was.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Final

from autogen_core import TopicId
from nats.js import api

from natsrt.durable_types import MONTH
from natsrt.errors import BlobLost, EventNotStored
from natsrt.jetstream.dead_letter_box import DeadLetter, DeadLetterBox, event_topic
from natsrt.jetstream.dead_letters import SUBJECT_HEADER
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.stream_reader import StoredMessage
from natsrt.sending.durable import EXPECTED_STREAM, DurablePublisher
from natsrt.task_types import task_of
from natsrt.transport.bodies import Bodies
from natsrt.wire import envelope
from natsrt.wire.envelope import MESSAGE_ID_HEADER
from natsrt.wire.retry_subjects import redriven
from natsrt.wire.subjects import Subjects, encode_token

_MSG_ID: Final = api.Header.MSG_ID.value
_EXPECTED_LAST: Final = api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value
_UNKNOWN: Final = TopicId("unknown", "unknown")
"""The topic in errors about an event whose topic cannot be read."""


def redrive_headers(letter: DeadLetter) -> dict[str, str]:
    """The headers of the event of a dead letter that is stored once more."""
    headers = dict(letter.headers)
    if letter.message_id:
        headers[MESSAGE_ID_HEADER] = letter.message_id
    return headers | {SUBJECT_HEADER: letter.subject, EXPECTED_STREAM: letter.stream, _EXPECTED_LAST: "0"}


class Again:
    """Stores events once more. Its methods raise as `DurablePublisher.store`."""

    def __init__(
        self, publisher: DurablePublisher, subjects: Subjects, box: DeadLetterBox, bodies: Bodies, registry: Registry
    ) -> None:
        self._publisher = publisher
        self._bodies = bodies
        self._registry = registry
        self._subjects = subjects
        self._box = box

    async def redrive(self, letter: DeadLetter) -> None:
        """Give a dead letter to its agent type again, then remove it.

        If this is interrupted between the two, and done again, the stream refuses the event as the second one on its
        subject. So it is given once, for as long as the stream keeps it.

        Raises `EventNotStored` also if the dead letter lacks the event's body, which is not in its stream any more, and
        `BlobLost` if its payload was sent by reference and is gone.
        """
        data = await self._box.data(letter)
        if data is None:
            reason = f"its body did not fit into the dead letter, and event {letter.event_sequence} is gone"
            raise EventNotStored(str(letter.topic or letter.subject), letter.stream, reason, may_be_stored=False)
        subject = redriven(self._subjects, letter.stream, letter.agent_type, letter.sequence, letter.kept_at)
        if task_of(letter.topic) is not None:
            subject = letter.subject  # which is of this agent type alone; there it is found by its ticket
        topic = letter.topic or _UNKNOWN
        await self._keep_payload(letter.stream, data)
        await self._publisher.store(subject, topic, letter.stream, data, redrive_headers(letter), None)
        await self._box.discard(letter)

    async def replay(self, event: StoredMessage, agent_type: str, name: str, stream: str | None = None) -> None:
        """Give an event to an agent type again. ``name`` tells this replay from others of the same event.

        ``stream`` is one whose events the agent type handles; None: the one that the event was read from.
        """
        stream = event.stream if stream is None else stream
        headers = {key: value for key, value in event.headers.items() if not key.lower().startswith("nats-")}
        headers.setdefault(MESSAGE_ID_HEADER, f"{event.stream}-{event.sequence}")
        topic = event_topic(self._subjects, event.subject, event.data)
        subject = f"{self._subjects.again(stream)}.{encode_token(agent_type)}"
        headers |= {
            SUBJECT_HEADER: event.subject,
            _MSG_ID: f"replay-{name}-{event.sequence}@{subject}",
            EXPECTED_STREAM: stream,
        }
        with suppress(BlobLost):  # its agent says so
            await self._keep_payload(stream, event.data)
        await self._publisher.store(subject, topic or _UNKNOWN, stream, event.data, headers, None)

    async def _keep_payload(self, stream: str, data: bytes) -> None:
        """Have the payload of an event by reference live as long as ``stream`` keeps what is stored now."""
        if (reference := envelope.reference_of(data)) is None:
            return
        entry = self._registry.view.durable.get(stream)
        max_age = MONTH if entry is None else entry.topics.max_age
        await self._bodies.keep(reference, math.inf if max_age is None else max_age)
