"""Whether a worker can own more keyed agents: each of them needs a subscription, and the server may limit these."""

from __future__ import annotations

import asyncio

from natsrt.transport.connection import Connection, Refusal

_DECLINE_FIRST = 1.0
"""Seconds for which a worker claims no agents after the server refused a subscription; doubled each time."""
_DECLINE_LONGEST = 30.0
"""Seconds of such a time at most."""


class Room:
    """Whether this worker may subscribe to the subjects of more agents, as far as it knows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._refusal: Refusal | None = None
        self._ended = 0
        self._until = 0.0
        self._pause = _DECLINE_FIRST

    @property
    def refusal(self) -> Refusal | None:
        """Why this worker should not try; None if it may."""
        if self._ended != self._connection.ended_subscriptions or self._loop.time() >= self._until:
            return None  # another subscription has ended, or the limit may be another one by now
        return self._refusal

    def refused(self, refusal: Refusal) -> None:
        """The server has refused the subject of an agent."""
        self._refusal, self._ended = refusal, self._connection.ended_subscriptions
        self._until = self._loop.time() + self._pause
        self._pause = min(2 * self._pause, _DECLINE_LONGEST)

    def accepted(self) -> None:
        """The server has accepted the subject of an agent."""
        self._pause = _DECLINE_FIRST
