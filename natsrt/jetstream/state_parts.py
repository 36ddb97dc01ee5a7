"""States of keyed agents that are too large for one message, in parts."""

from __future__ import annotations

import asyncio
import logging
import math
from io import BytesIO
from typing import Final, cast

import nats.errors
from autogen_core import AgentId

from natsrt.errors import JetStreamFull, NatsrtError
from natsrt.jetstream.agent_bucket import ANSWER_WITHIN, AgentBucket
from natsrt.jetstream.buckets import is_gone
from natsrt.jetstream.record import OTHER_HEADER_BYTES, SUPERSEDED_BYTES, Stored, parts_key
from natsrt.jetstream.requests import READ, WRITE
from natsrt.transport.connection import Connection

logger: logging.Logger = logging.getLogger("natsrt.agents")

MAX_BODY_BYTES: Final = 64 * 1024
"""The largest state that is stored in the record itself. The record is written again whenever the owner changes."""
_PART_BYTES = 512 * 1024
"""Bytes of one part, less where the server's max_payload is smaller."""
_PARTS_AT_ONCE = 8
"""Parts that are written or read at a time."""


class StateParts:
    """Stores, reads and deletes states in parts. Each part has a key of its own, which is written once."""

    def __init__(self, connection: Connection, bucket: AgentBucket) -> None:
        self._connection = connection
        self._bucket = bucket

    def count(self, agent: AgentId, state: bytes) -> int:
        """The number of parts that a state is stored in; 0: it is stored in the record."""
        names = 12 * (len(agent.type) + len(agent.key))  # one character takes at most 12 bytes of JSON in ASCII
        room = self._connection.max_payload - names - 2 * OTHER_HEADER_BYTES - SUPERSEDED_BYTES
        return 0 if len(state) <= min(MAX_BODY_BYTES, room) else math.ceil(len(state) / self._size)

    @property
    def _size(self) -> int:
        return min(_PART_BYTES, self._connection.max_payload)

    async def write(self, agent: AgentId, write: str, state: bytes) -> int:
        """Store a state in parts, for the write named ``write``. Returns the lowest sequence of the parts.

        Where JetStream is full, it deletes again what it stored, so that this takes no room.
        """
        key, size = parts_key(agent, write), self._size
        subject = self._bucket.subject(key)
        sequences: list[int] = []
        for start in range(0, len(state), size * _PARTS_AT_ONCE):
            pieces = range(start, min(len(state), start + size * _PARTS_AT_ONCE), size)

            async def store(pieces: range = pieces) -> list[int]:
                writes = (self._bucket.publish(f"{subject}.{at // size}", state[at : at + size]) for at in pieces)
                stored = await asyncio.gather(*writes, return_exceptions=True)  # none is on its way afterwards
                for failed in stored:
                    if isinstance(failed, BaseException):
                        raise failed
                return cast(list[int], stored)

            try:
                sequences += await self._bucket.requests.run(WRITE, store, subject=subject, within=ANSWER_WITHIN)
            except JetStreamFull:
                await self.clean(agent, f"{write}.>")
                raise
        return min(sequences)

    async def read(self, agent: AgentId, stored: Stored) -> bytes | None:
        """The state; None if a part is missing."""
        key = parts_key(agent, stored.saved_by)
        buffer = BytesIO()  # so that memory holds the state once, and a few parts
        for start in range(0, stored.parts, _PARTS_AT_ONCE):
            numbers = range(start, min(stored.parts, start + _PARTS_AT_ONCE))

            async def load(numbers: range = numbers) -> list[bytes | None]:
                return list(await asyncio.gather(*(self._part(f"{key}.{number}") for number in numbers)))

            for piece in await self._bucket.requests.run(READ, load):
                if piece is None:
                    return None
                buffer.write(piece)
        return buffer.getvalue()  # shares the buffer

    async def _part(self, key: str) -> bytes | None:
        """One part; None if there is none. A replica may lag behind, so the leader is asked if it has none."""
        for direct in (True, False):
            message = await self._bucket.last(key, direct=direct)
            if message is not None and not is_gone(message.headers):
                return message.data or b""
        return None

    async def clean(self, agent: AgentId, writes: str, *, before: int | None = None) -> None:
        """Delete the parts that ``writes`` stored; with ``before`` only those of a lower sequence.

        ``writes`` is ``>`` for all writes, or ``<write>.>`` for one. Does not fail: parts that cannot be deleted now
        are deleted with the next state in parts.
        """
        try:
            await self._bucket.purge(parts_key(agent, writes), before)
        except (nats.errors.Error, NatsrtError, OSError, TimeoutError) as error:
            logger.debug("old parts of the state of %s stay for now: %s", agent, error)
