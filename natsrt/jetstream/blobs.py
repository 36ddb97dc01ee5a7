"""Payloads that are sent by reference: stored in chunks, loaded into one buffer, and deleted.

Rules:

1. The chunks of a blob are messages of one stream, each under a subject of its own and with a time to live. So what a
   writer that dies has stored expires.
2. Of each blob a few chunks are under way at a time. The digest is taken chunk by chunk, so the event loop is never
   blocked for long, and memory holds the payload and these chunks.
3. A reference exists only when all chunks are acknowledged. If storing fails or is cancelled, what was stored is
   deleted.
4. Ids are random: whoever knows one may read and delete the blob.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Collection
from functools import partial
from hashlib import sha256
from io import BytesIO

import nats.errors

from natsrt.background import BackgroundTasks, end_tasks
from natsrt.errors import BlobDamaged, BlobLost, MessageTooLarge, NatsrtError
from natsrt.jetstream.agent_bucket import RETRY_FOR
from natsrt.jetstream.blob_stream import CHUNK_WITHIN, BlobStream, ChunkSource, unavailable
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.requests import OPEN, READ, WRITE, BucketRequests
from natsrt.jetstream.served_blobs import ServedBlobs
from natsrt.jetstream.streams import BLOBS
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.references import OfEvent, Reference, new_blob_id
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.blobs")

_CHUNK_BYTES = 512 * 1024
"""Bytes of one chunk, less where the server's max_payload is smaller."""
_HEADER_BYTES = 2048
"""Room for the headers of a chunk, of a worker's answer that is one, and of a record of it: see
`natsrt.jetstream.recorder`. At most half of a message."""
_CHUNKS_AT_ONCE = 8
"""Chunks of one blob that are under way at a time."""
_LOADS_AT_ONCE = 4
"""Blobs that are loaded at a time; further ones wait, in order."""
_REPLICAS_WITHIN = 1.0
"""Seconds within which a chunk must be at every server that answers. A replica may lag behind the leader that
acknowledged it."""
_FIRST_PAUSE = 0.02
"""Seconds before a chunk that is missing is asked for again. Each further pause is twice as long."""
_DELETED_WITHIN = 2.0
"""Seconds for which a stop waits until blobs are deleted."""


class Blobs:
    """Stores, loads and deletes the blobs of one runtime. Implements `natsrt.transport.bodies.BlobStore`."""

    def __init__(self, connection: Connection, subjects: Subjects, options: Options, registry: Registry) -> None:
        self._connection = connection
        self._subjects = subjects
        self._options = options
        self._registry = registry
        self._name = subjects.bucket(BLOBS)
        self.stream: BlobStream = BlobStream(connection, subjects, options)
        self._served = ServedBlobs(connection, subjects)
        self._requests = BucketRequests(
            connection,
            self._name,
            unavailable(subjects),
            subscribed=(options.inbox_prefix,),
            domain=Domain(options.jetstream_domain),
            retry_for=RETRY_FOR,
            patient=True,
            make_again=self._make_again,
            stream=(self._name, subjects.blob("-", "*").rpartition(".")[0]),
        )
        self._opened: int | None = None
        """The connection's number of reconnects when the stream was last found; None: not found yet."""
        self._opening = asyncio.Lock()
        self._created = ""
        """When the stream that was last found was made."""
        self._loads = asyncio.Semaphore(_LOADS_AT_ONCE)
        self._deleting = BackgroundTasks(logger, "a blob stays until it expires")

    @property
    def _source(self) -> ChunkSource:
        return self.stream if self._registry.reads_bucket else self._served

    # -- storing -------------------------------------------------------------------------------------------------

    async def store(self, payload: bytes, ttl: float | None = None, of_event: OfEvent | None = None) -> Reference:
        """Store a payload for ``ttl`` seconds; None: for ``blob_ttl``; infinity: until it is deleted.

        ``of_event``: what its id is to say of the event whose payload it is; None: nothing.
        Raises `MessageTooLarge`, `StreamUnavailable`, `JetStreamFull`, `JetStreamRequired`, `PermissionDenied` or
        `ServerUnreachable`.
        """
        size, limit = len(payload), self._options.max_blob_size
        if size > limit:
            raise MessageTooLarge(size, limit, f"and the setting max_blob_size is {limit:,}")
        if self._connection.limit_is_guessed:
            most = self._connection.max_payload
            raise MessageTooLarge(
                size,
                most,
                f"but the account accepts at most {most:,} in one message, perhaps fewer: the server does not say its "
                "limit, so the message is not sent in parts; raise max_payload of the account",
            )
        if ttl is not None and ttl > self._options.blob_ttl and not self._registry.reads_bucket:
            most = self._connection.max_payload
            raise MessageTooLarge(
                size,
                most,
                f"but one message may have {most:,}, and this user may send no requests to JetStream: workers store "
                "payloads for it for their blob_ttl at most, and this one is needed for longer, for a durable topic",
            )
        await self._open()
        blob_id = new_blob_id(of_event)
        most = self._connection.max_payload
        piece = min(_CHUNK_BYTES, max(most - _HEADER_BYTES, most // 2))
        seconds = self._options.blob_ttl if ttl is None else ttl
        digest, storing = sha256(), deque[asyncio.Task[None]]()
        try:
            for number, start in enumerate(range(0, max(1, size), piece)):
                chunk = payload[start : start + piece]
                digest.update(chunk)
                if len(storing) == _CHUNKS_AT_ONCE:
                    await _first(storing)
                storing.append(asyncio.ensure_future(self.write(blob_id, number, chunk, seconds)))
            while storing:
                await _first(storing)
        except BaseException:
            self._deleting.spawn(self._give_up(blob_id, storing))
            raise
        return Reference(blob_id, size, number + 1, digest.hexdigest())

    async def _give_up(self, blob_id: str, storing: Collection[asyncio.Task[None]]) -> None:
        """Delete what was stored of a blob. Chunks that are under way are waited for: they would be stored later."""
        try:
            await asyncio.gather(*storing, return_exceptions=True)
        finally:
            await end_tasks(*storing)
        await self._delete(blob_id)

    async def write(self, blob_id: str, number: int, chunk: bytes, ttl: float) -> None:
        """Store one chunk for ``ttl`` seconds. Raises as `store` does."""
        source = self._source
        subject = source.subject or self._subjects.blob(blob_id, str(number))

        def write() -> Awaitable[None]:
            return source.write(blob_id, number, chunk, ttl)

        await self._requests.run(WRITE, write, subject=subject, within=CHUNK_WITHIN)

    async def _open(self) -> None:
        """Find the stream, and make it if it is missing. Returns at once if it was found since the last reconnect."""
        if self._opened == self._connection.reconnects:
            return
        async with self._opening:
            reconnects = self._connection.reconnects
            if self._opened != reconnects:
                await self._requests.run(OPEN, self._ensure, subject=self._source.subject)
                self._opened = reconnects

    async def _ensure(self) -> None:
        self._created = await self._source.ensure()

    async def _make_again(self) -> bool:
        """Make the stream if it is gone. Returns whether another one was found before, or none."""
        known = self._created
        await self._ensure()
        return known != self._created

    # -- loading -------------------------------------------------------------------------------------------------

    async def load(self, reference: Reference) -> bytes:
        """Return a payload.

        Raises `BlobLost`, `BlobDamaged`, `MessageTooLarge` if it is larger than ``max_blob_size``, and what `store`
        raises.
        """
        limit = self._options.max_blob_size
        if reference.size > limit:
            raise MessageTooLarge(reference.size, limit, f"and the receiver's setting max_blob_size is {limit:,}")
        async with self._loads:
            return await self._load(reference)

    async def _load(self, reference: Reference) -> bytes:
        blob_id, size, chunks, expected = reference
        digest, buffer = sha256(), BytesIO()
        loading = deque[asyncio.Task[bytes | None]]()
        try:
            for number in range(chunks):
                while len(loading) < min(_CHUNKS_AT_ONCE, chunks - number):
                    loading.append(asyncio.ensure_future(self._chunk(blob_id, number + len(loading))))
                chunk = await loading.popleft()
                if chunk is None:
                    raise BlobLost(blob_id, number, chunks)
                digest.update(chunk)
                if buffer.write(chunk) and buffer.tell() > size:
                    break
        finally:
            await end_tasks(*loading)
        if buffer.tell() != size:
            raise BlobDamaged(blob_id, f"its chunks do not have {size:,} bytes together")
        if digest.hexdigest() != expected:
            raise BlobDamaged(blob_id, "its SHA-256 is not the one in the reference")
        return buffer.getvalue()  # shares the buffer

    async def _chunk(self, blob_id: str, number: int) -> bytes | None:
        """A chunk; None if it is not there."""
        pause, until = _FIRST_PAUSE, asyncio.get_running_loop().time() + _REPLICAS_WITHIN

        def read() -> Awaitable[bytes | None]:
            return self._source.read(blob_id, number)

        while (chunk := await self._requests.run(READ, read, subject=self._source.subject)) is None:
            if asyncio.get_running_loop().time() + pause > until:
                break
            await asyncio.sleep(pause)
            pause *= 2
        return chunk

    # -- keeping -------------------------------------------------------------------------------------------------

    async def keep(self, reference: Reference, seconds: float) -> None:
        """Have a payload live for ``seconds`` from now at least; infinity: until it is deleted.

        A chunk's time to live cannot be changed, so all chunks are stored once more in their places if they would
        expire earlier, and then for ``blob_ttl`` longer. A call that is interrupted can be made again.
        Does nothing for a user that may send no requests to JetStream. Raises `BlobLost`, and as `store`.
        """
        if not self._registry.reads_bucket:
            return
        blob_id, _, chunks, _ = reference
        await self._open()
        # The last one is stored last, also here.
        left = await self._requests.run(READ, partial(self.stream.left, blob_id, chunks - 1))
        if left is None:
            raise BlobLost(blob_id, chunks - 1, chunks)
        if left >= seconds:
            return

        async def again(number: int) -> None:
            chunk = await self._chunk(blob_id, number)
            if chunk is None:
                raise BlobLost(blob_id, number, chunks)
            await self.write(blob_id, number, chunk, seconds + self._options.blob_ttl)

        for start in range(0, chunks, _CHUNKS_AT_ONCE):
            numbers = range(start, min(chunks, start + _CHUNKS_AT_ONCE))
            for failed in await asyncio.gather(*map(again, numbers), return_exceptions=True):
                if failed is not None:
                    raise failed

    # -- deleting ------------------------------------------------------------------------------------------------

    def delete(self, blob_id: str) -> None:
        """Delete a blob, in the background. One that cannot be deleted now expires."""
        self._deleting.spawn(self._delete(blob_id))

    async def _delete(self, blob_id: str) -> None:
        try:
            await self._source.delete(blob_id)
        except (nats.errors.Error, NatsrtError, OSError, TimeoutError) as error:
            logger.debug("the blob %s stays until it expires: %s", blob_id, error)

    async def remove(self, blob_id: str) -> None:
        """Delete a blob. One that cannot be deleted now expires."""
        await self._delete(blob_id)

    async def stop(self) -> None:
        """Finish deleting, for some seconds at most."""
        await self._deleting.wait(_DELETED_WITHIN)
        await self._deleting.cancel()


async def _first(storing: deque[asyncio.Task[None]]) -> None:
    """Wait for the oldest chunk. A cancellation of the wait does not cancel it, since it may be on its way."""
    await asyncio.wait((storing[0],))
    storing.popleft().result()
