"""Counts attempts to handle events, where JetStream's count of deliveries says too little.

JetStream counts the deliveries of a message to a consumer. A delivery is an attempt only if a handler began: a worker
that is killed, or stops, has many events whose handlers did not. So each event that is delivered more than once has a
count of its own, a message counter in a stream:

1. A first delivery is not counted when its handler begins, since that would be a write for each event. If the handler
   raises, one is added. If the worker dies, nothing is.
2. For each later delivery one is added *before* its handler begins, and taken away if it ends in another way than by
   raising, or by the death of its worker. So an event that ends one worker after the other is counted each time but the
   first.
3. What a worker gives back without an attempt is counted apart, as is that the event has become a dead letter.

All of this is one number, whose decimal value is the sum of attempts, of `_RETURNED` for each delivery that was given
back, and of `_GIVEN_UP` for a dead letter. It is kept for a week.
"""

from __future__ import annotations

import logging
from typing import Final, NamedTuple

import nats.errors
import orjson

from natsrt.background import BackgroundTasks
from natsrt.errors import ServerUnreachable
from natsrt.transport.connection import Connection
from natsrt.transport.headers import header_block
from natsrt.wire.retry_subjects import attempts_of
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_RETURNED: Final = 1_000_000
"""What is added for a delivery that was given back: more than any ``max_deliver`` makes sense for."""
_GIVEN_UP: Final = 1_000_000_000_000
"""What is added for a dead letter."""
_ONE_REQUEST: Final = 2.0
"""Seconds within which the server tells a count, beside the round trip."""


class Counted(NamedTuple):
    """What is known of an event. ``attempts`` that were counted, how often it was given back (``returned``) since, and
    whether it has become a dead letter (``given_up``)."""

    attempts: int = 0
    returned: int = 0
    given_up: bool = False

    @classmethod
    def of(cls, value: int) -> Counted:
        """Read the number of a message counter."""
        value = max(0, value)
        return cls(value % _RETURNED, value % _GIVEN_UP // _RETURNED, value >= _GIVEN_UP)


class Attempts:
    """The counts of one namespace."""

    def __init__(self, connection: Connection, subjects: Subjects) -> None:
        self._connection = connection
        self._subjects = subjects
        self._tasks = BackgroundTasks(logger, "counting an attempt to handle an event failed")

    async def begin(self, agent_type: str, stream: str, sequence: int, stored_at: float) -> Counted | None:
        """Count an attempt that is about to begin. Returns what was counted before; None if the server does not say.

        ``sequence`` and ``stored_at`` (in seconds since the epoch) say where in ``stream``, and when, the event is
        stored.
        """
        subject = self._subject(agent_type, stream, sequence, stored_at)
        timeout = _ONE_REQUEST + self._connection.rtt.allowance
        try:
            message = await self._connection.client.request(subject, b"", timeout=timeout, headers=_added(1))
            return Counted.of(int(orjson.loads(message.data)["val"]) - 1)
        except (nats.errors.Error, OSError, TimeoutError, ValueError, TypeError, KeyError) as error:
            logger.debug("an attempt to handle event %d of %s could not be counted: %s", sequence, stream, error)
            return None

    def ended(self, agent_type: str, stream: str, sequence: int, stored_at: float) -> None:
        """What `begin` counted was no attempt, or was successful."""
        self._post(self._subject(agent_type, stream, sequence, stored_at), -1)

    def failed(self, agent_type: str, stream: str, sequence: int, stored_at: float) -> None:
        """Count an attempt that has failed, and that `begin` did not count.

        Call it before the event is given back. If this gets lost, the event has another attempt.
        """
        self._post(self._subject(agent_type, stream, sequence, stored_at), 1)

    def returned(self, agent_type: str, stream: str, sequence: int, stored_at: float) -> None:
        """Count a delivery that is given back without an attempt. Call it before that."""
        self._post(self._subject(agent_type, stream, sequence, stored_at), _RETURNED)

    def gave_up(self, agent_type: str, stream: str, sequence: int, stored_at: float) -> None:
        """The event has become a dead letter: it is not tried again. Call it before the event is settled."""
        self._post(self._subject(agent_type, stream, sequence, stored_at), _GIVEN_UP)

    def _subject(self, agent_type: str, stream: str, sequence: int, stored_at: float) -> str:
        return attempts_of(self._subjects, agent_type, stream, sequence, stored_at)

    def _post(self, subject: str, change: int) -> None:
        try:
            if self._connection.client.post(subject, b"", "", header_block(_added(change))):
                return
        except ServerUnreachable:  # a new client is being connected
            pass
        self._tasks.spawn(self._publish(subject, change))

    async def _publish(self, subject: str, change: int) -> None:
        await self._connection.publish(subject, b"", headers=_added(change))


def _added(change: int) -> dict[str, str]:
    """The header that adds ``change`` to a message counter."""
    return {"Nats-Incr": f"{change:+d}"}
