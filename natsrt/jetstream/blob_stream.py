"""The stream of the payloads that are sent by reference: how its chunks are stored and read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import nats.js.errors
from nats.aio.msg import Msg
from nats.js import api

from natsrt.errors import NatsrtError, StreamUnavailable
from natsrt.jetstream.acks import Acks
from natsrt.jetstream.buckets import TTL, created_at, purge
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.streams import BLOBS, MAKE_BLOBS_AGAIN, blobs_stream, ensure_stream, require_settings
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.headers import headers_size
from natsrt.wire.references import is_number
from natsrt.wire.subjects import Subjects
from natsrt.wire.times import seconds_of

CHUNK_WITHIN: Final = 10.0
"""Seconds for one chunk to be stored or read, beside the round trip. Several are under way, so a link of 4 Mbit/s
manages that."""

_EXPECTED_STREAM: Final = api.Header.EXPECTED_STREAM.value
_NEVER: Final = "never"
"""The time to live of a chunk that does not expire."""
_STORED_AT: Final = "Nats-Time-Stamp"
"""Header with the time at which a message was stored, in the answer of a direct get (RFC 3339)."""
_MISSING: Final = "404"
"""Status of the answer of a direct get for a message that is not there."""


class ChunkSource(Protocol):
    """Where one runtime stores, reads and deletes chunks: in the stream itself, or through workers.

    Each method makes one attempt, and raises what nats-py raises.
    """

    @property
    def subject(self) -> str | None:
        """The only subject that it publishes to; None if there are several."""

    async def ensure(self) -> str:
        """Make the stream if it is missing. Returns when it was made.

        Raises `StreamUnavailable` if it cannot be used.
        """

    async def write(self, blob_id: str, chunk: int, data: bytes, ttl: float) -> None:
        """Store a chunk for ``ttl`` seconds; infinity: until it is deleted. Returns when it is stored."""

    async def read(self, blob_id: str, chunk: int) -> bytes | None:
        """A chunk; None if it is not there, or not yet at the server that answers."""

    async def delete(self, blob_id: str) -> None:
        """Delete all chunks of a blob."""


class BlobStream:
    """The stream, for runtimes that may send requests to JetStream. Implements `ChunkSource`."""

    subject = None

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._subjects = subjects
        self._config = blobs_stream(subjects, options)
        self._name = subjects.bucket(BLOBS)
        self._domain = Domain(options.jetstream_domain)
        self._acks = Acks(connection, options.inbox_prefix)

    async def ensure(self) -> str:
        if not self._acks.open:
            await self._acks.subscribe()
        js = self._connection.jetstream
        info = await ensure_stream(js, self._name, partial(js.add_stream, self._config))
        require_settings(info, self._config, unavailable(self._subjects), MAKE_BLOBS_AGAIN)
        return created_at(info)

    async def write(self, blob_id: str, chunk: int, data: bytes, ttl: float) -> None:
        if not self._acks.open:
            await self._acks.subscribe()
        lives = _NEVER if ttl == math.inf else f"{max(1, round(ttl))}s"
        headers = {TTL: lives, _EXPECTED_STREAM: self._name}
        self._connection.check_stored(len(data), headers_size(headers))
        await self._acks.publish(self._subjects.blob(blob_id, str(chunk)), data, headers)

    async def read(self, blob_id: str, chunk: int) -> bytes | None:
        message = await self._get(blob_id, chunk)
        return None if message is None else message.data

    async def _get(self, blob_id: str, chunk: int) -> Msg | None:
        subject = self._domain.api(f"DIRECT.GET.{self._name}.{self._subjects.blob(blob_id, str(chunk))}")
        timeout = CHUNK_WITHIN + self._connection.rtt.allowance
        message = await self._connection.client.request(subject, b"", timeout=timeout)
        headers = message.headers or {}
        status = headers.get("Status")
        if status == _MISSING:
            return None
        if status is not None:
            raise nats.js.errors.APIError(code=int(status), description=headers.get("Description"))
        return message

    async def left(self, blob_id: str, chunk: int) -> float | None:
        """Seconds until a chunk expires; infinity: it does not. None: it is not there. One attempt, as `read`."""
        message = await self._get(blob_id, chunk)
        if message is None:
            return None
        headers = message.headers or {}
        lives = headers.get(TTL, _NEVER)
        if lives == _NEVER:
            return math.inf
        seconds = lives.removesuffix("s")
        if not is_number(seconds):  # another program wrote it: a unit that natsrt does not use
            return 0.0
        return seconds_of(headers[_STORED_AT]) + int(seconds) - time.time()

    async def delete(self, blob_id: str) -> None:
        await purge(self._connection.jetstream, self._name, self._subjects.blob(blob_id, "*"))


def unavailable(subjects: Subjects) -> Callable[[str, str], NatsrtError]:
    """What makes the error of an operation on the stream, from the operation and the reason."""
    name = subjects.bucket(BLOBS)
    return lambda operation, reason: StreamUnavailable(operation, name, reason)
