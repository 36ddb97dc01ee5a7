"""The bucket of keyed agents, and the states in it that are too large for one message."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator
from typing import Final

import nats.errors
import nats.js.errors
from autogen_core import AgentId
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

from natsrt.errors import NatsrtError, StateUnavailable
from natsrt.jetstream.acks import Acks
from natsrt.jetstream.buckets import MARKER_TTL, ensure_bucket, is_gone, last_messages
from natsrt.jetstream.record import Stored, parts_key
from natsrt.jetstream.requests import OPEN, READ, WRITE, BucketRequests
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects

logger = logging.getLogger("natsrt.agents")

BUCKET: Final = "natsrt_agents"
RETRY_FOR: Final = 10.0
"""Seconds; writes fail for up to 7.5 s after the leader of a cluster was killed."""
ANSWER_WITHIN: Final = 2.0
"""Seconds for one attempt."""
MAX_BODY_BYTES: Final = 64 * 1024
"""The largest state that is stored in the record itself, which is written anew whenever the owner changes."""
HEADERS_AT_MOST: Final = 256
"""Bytes of a record's headers besides the head."""
_PART_BYTES = 512 * 1024
_PARTS_AT_ONCE = 8
_NO_MESSAGE = 10037


class AgentBucket:
    """The bucket of keyed agents. What is asked of it through ``guard`` is repeated where that helps."""

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._options = options
        self._name = subjects.bucket(BUCKET)
        self._stream = f"KV_{self._name}"
        self._prefix = f"$KV.{self._name}."
        self.guard = BucketRequests(
            connection,
            self._name,
            StateUnavailable,
            subscribed=(options.inbox_prefix,),
            retry_for=RETRY_FOR,
            patient=True,
        )
        self._acks = Acks(connection, options.inbox_prefix)
        self.publish = self._acks.publish
        self._opened: int | None = None
        """How often the connection had come back when the bucket was seen last."""
        self._opening = asyncio.Lock()
        self._context: tuple[Client, JetStreamContext] | None = None

    def subject(self, key: str) -> str:
        return self._prefix + key

    def key(self, subject: str) -> str:
        return subject[len(self._prefix) :]

    @property
    def is_open(self) -> bool:
        """Whether it was seen since the connection was lost last, and acknowledgements arrive."""
        return self._opened == self._connection.reconnects and self._acks.open

    async def open(self) -> None:
        """Make the bucket if it is missing. Costs nothing until the connection was lost again."""
        if self.is_open:
            return
        async with self._opening:
            if not self._acks.open:
                await self._acks.subscribe()
            reconnects = self._connection.reconnects
            if self._opened != reconnects:
                await self.guard.run(OPEN, self._ensure)
                self._opened = reconnects

    def doubt(self) -> None:
        """The bucket is perhaps gone: let `open` look."""
        self._opened = None

    async def _ensure(self) -> None:
        config = api.KeyValueConfig(
            bucket=self._name,
            description="natsrt: owners and state of keyed agents",
            history=1,
            direct=True,
            replicas=self._options.registry_replicas,
            limit_marker_ttl=MARKER_TTL,
        )
        await ensure_bucket(self._js, config)

    @property
    def _js(self) -> JetStreamContext:
        client = self._connection.client
        if self._context is None or self._context[0] is not client:
            self._context = client, client.jetstream(timeout=ANSWER_WITHIN)
        return self._context[1]

    async def last(self, key: str, *, direct: bool = False) -> api.RawStreamMsg | None:
        """The last message under ``key``, None for none; from the leader, or ``direct`` from any replica."""
        try:
            return await self._js.get_last_msg(self._stream, self._prefix + key, direct=direct)
        except nats.js.errors.NotFoundError as error:
            if error.err_code not in (_NO_MESSAGE, None):  # a direct answer has no such code
                raise
            return None

    def all_headers(self, pattern: str) -> AsyncGenerator[list[Msg], None]:
        """The headers under all keys that match, in pages."""
        return last_messages(self._js, self._stream, self._prefix + pattern, timeout=ANSWER_WITHIN, headers_only=True)

    async def purge(self, pattern: str, before: int | None) -> None:
        await self._js.purge_stream(self._stream, seq=before, subject=self._prefix + pattern)


class StateParts:
    """States in parts, each under a key of its own that is written once."""

    def __init__(self, connection: Connection, bucket: AgentBucket) -> None:
        self._connection = connection
        self._bucket = bucket

    def count(self, agent: AgentId, state: bytes) -> int:
        """In how many parts a state is stored; 0: in the record."""
        names = 12 * (len(agent.type) + len(agent.key))  # bytes of a character in JSON, at most
        room = self._connection.max_payload - names - 2 * HEADERS_AT_MOST
        return 0 if len(state) <= min(MAX_BODY_BYTES, room) else math.ceil(len(state) / self._size)

    @property
    def _size(self) -> int:
        return min(_PART_BYTES, self._connection.max_payload)

    async def write(self, agent: AgentId, write: str, state: bytes) -> int:
        """Store a state. The lowest sequence of its parts."""
        key, size = parts_key(agent, write), self._size
        subject = self._bucket.subject(key)
        sequences: list[int] = []
        for start in range(0, len(state), size * _PARTS_AT_ONCE):
            pieces = range(start, min(len(state), start + size * _PARTS_AT_ONCE), size)

            async def store(pieces: range = pieces) -> list[int]:
                writes = (self._bucket.publish(f"{subject}.{at // size}", state[at : at + size]) for at in pieces)
                return list(await asyncio.gather(*writes))

            sequences += await self._bucket.guard.run(WRITE, store, subject=subject, within=ANSWER_WITHIN)
        return min(sequences)

    async def read(self, agent: AgentId, stored: Stored) -> bytes | None:
        """The state; None where a part is missing."""
        key = parts_key(agent, stored.saved_by)
        pieces: list[bytes] = []
        for start in range(0, stored.parts, _PARTS_AT_ONCE):
            numbers = range(start, min(stored.parts, start + _PARTS_AT_ONCE))

            async def load(numbers: range = numbers) -> list[bytes | None]:
                return list(await asyncio.gather(*(self._part(f"{key}.{number}") for number in numbers)))

            for piece in await self._bucket.guard.run(READ, load):
                if piece is None:
                    return None
                pieces.append(piece)
        return b"".join(pieces)

    async def _part(self, key: str) -> bytes | None:
        """One part, None where there is none: not even at the leader, which no replica that lags behind can tell."""
        for direct in (True, False):
            message = await self._bucket.last(key, direct=direct)
            if message is not None and not is_gone(message.headers):
                return message.data or b""
        return None

    async def clean(self, agent: AgentId, writes: str, *, before: int | None = None) -> None:
        """Delete the parts that ``writes`` stored, or those of them with a sequence below ``before``, if that works.

        What cannot be deleted now is deleted with the next state in parts.
        """
        try:
            await self._bucket.purge(parts_key(agent, writes), before)
        except (nats.errors.Error, NatsrtError, OSError, TimeoutError) as error:
            logger.debug("old parts of the state of %s stay for now: %s", agent, error)
