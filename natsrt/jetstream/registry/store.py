"""The registry's bucket: writing and reading entries, heartbeats, and what is left of dead workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial

import nats.js.errors
from nats.aio.msg import Msg
from nats.js import api

from natsrt.errors import RegistryUnavailable
from natsrt.jetstream.buckets import MARKER, MARKER_TTL, OPERATION, TTL, ensure_bucket, last_messages
from natsrt.jetstream.registry.entries import FEED, HEARTBEAT, KnownEntry, RegistryEntry, encode_entry
from natsrt.jetstream.requests import OPEN, READ, WRITE, BucketRequests
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects

BUCKET = "natsrt_registry"
KNOWN_TTL = 36 * 3600
"""Seconds for which a type stays known without a worker that confirms it. It is confirmed every 12 hours, so a type
whose last worker has gone is known for 24 hours at least."""
_TOMBSTONE_TTL = 3600
"""Seconds for which the mark of a deleted entry stays."""
_WRITES_AT_ONCE = 256
"""Entries that are written at the same time, so that a runtime with many does not flood JetStream."""
_RETRY_FOR = 5.0
"""Seconds for which a request is tried again; a cluster elects a leader within that time."""

LEFT = "Natsrt-Left"
IN_ORDER = "in-order"
"""A header of a worker's deletion, and its value: the worker itself left, with everything answered."""


class RegistryStore:
    """Requests to the bucket of one namespace.

    Every method raises `RegistryUnavailable`, `ServerUnreachable`, `PermissionDenied` or `JetStreamRequired` where the
    bucket cannot be reached for some seconds.
    """

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._options = options
        self._feed = subjects.registry_feed
        self._bucket = subjects.bucket(BUCKET)
        self._stream = f"KV_{self._bucket}"
        self.prefix = f"$KV.{self._bucket}."
        """What stands before a key in the subject of its entry."""
        self._requests = BucketRequests(
            connection,
            self._bucket,
            RegistryUnavailable,
            subscribed=(subjects.registry_feed, options.inbox_prefix),
            retry_for=_RETRY_FOR,
        )

    async def open(self) -> None:
        """Make the bucket if it is missing."""
        await self._requests.run(OPEN, self._ensure)

    async def _ensure(self) -> None:
        config = api.KeyValueConfig(
            bucket=self._bucket,
            description="natsrt: workers, agent types and subscriptions",
            history=1,
            direct=True,
            replicas=self._options.registry_replicas,
            limit_marker_ttl=MARKER_TTL,
            republish=api.RePublish(src=f"{self.prefix}{FEED}.>", dest=f"{self._feed}.>"),
        )
        info = await ensure_bucket(self._connection.jetstream, config)
        if info.config.republish is None:
            problem = f"the bucket {self._bucket} exists without republishing: it is not natsrt's, so delete it"
            raise RegistryUnavailable("open", problem)

    # -- writing -------------------------------------------------------------------------------------------------

    async def write(self, entries: Sequence[RegistryEntry]) -> int:
        """Store entries. Returns the highest of their revisions; 0 for no entries."""
        highest = 0
        for start in range(0, len(entries), _WRITES_AT_ONCE):
            chunk = entries[start : start + _WRITES_AT_ONCE]
            highest = max(highest, await self._write_all([partial(self._write, entry) for entry in chunk]))
        return highest

    async def delete(self, keys: Sequence[str], headers: dict[str, str] | None = None) -> int:
        """Delete entries. Returns the highest revision of the deletions; 0 for no keys."""
        return await self._write_all([partial(self._delete, key, headers) for key in keys])

    async def remove_worker(self, worker_id: str, *, in_order: bool = False) -> None:
        """Delete the worker's entry, which every view takes for all its entries, and purge those from the stream.

        Only what is older than the deletion: the worker may be alive after all and declare itself again meanwhile.
        A worker that leaves ``in_order`` has answered all that it ever received.
        """
        headers = {LEFT: IN_ORDER} if in_order else None
        revision = await self.delete([f"{FEED}.worker.{worker_id}"], headers)
        for pattern in (f"{FEED}.*.*.{worker_id}", f"{FEED}.*.*.*.{worker_id}", f"{HEARTBEAT}.{worker_id}"):
            await self._requests.run(WRITE, partial(self._purge, self.prefix + pattern, revision))

    async def beat(self, worker_id: str) -> None:
        """Store a worker's heartbeat, which expires by itself. Raises as `Connection.publish` does."""
        headers = {TTL: f"{max(1, round(self._options.heartbeat_ttl))}s"}
        await self._connection.publish(f"{self.prefix}{HEARTBEAT}.{worker_id}", b"", headers=headers)

    async def _write_all(self, writes: Sequence[Callable[[], Awaitable[int]]]) -> int:
        """Do the writes at once. They are repeated together, which changes nothing."""

        async def attempt() -> int:
            return max(await asyncio.gather(*(write() for write in writes)))

        return await self._requests.run(WRITE, attempt) if writes else 0

    async def _write(self, entry: RegistryEntry) -> int:
        ttl = KNOWN_TTL if isinstance(entry, KnownEntry) else None
        subject, value = self.prefix + entry.key, encode_entry(entry)
        ack = await self._connection.jetstream.publish(subject, value, stream=self._stream, msg_ttl=ttl)
        return ack.seq

    async def _delete(self, key: str, headers: dict[str, str] | None) -> int:
        headers = {OPERATION: "DEL", TTL: str(_TOMBSTONE_TTL), **(headers or {})}
        ack = await self._connection.jetstream.publish(self.prefix + key, b"", stream=self._stream, headers=headers)
        return ack.seq

    async def _purge(self, subject: str, before: int) -> None:
        await self._connection.jetstream.purge_stream(self._stream, seq=before, subject=subject)

    # -- reading -------------------------------------------------------------------------------------------------

    async def read(self, load: Callable[[AsyncGenerator[list[Msg], None]], Awaitable[None]]) -> None:
        """Give the last message of every key, in pages, to ``load``: from the beginning again where one was lost."""

        async def attempt() -> None:
            await load(
                last_messages(
                    self._connection.jetstream, self._stream, f"{self.prefix}>", timeout=self._options.connect_timeout
                )
            )

        await self._requests.run(READ, attempt)

    async def last_change(self) -> int:
        """The revision of the last change that the feed announces; 0 for none."""

        async def last() -> int:
            try:
                message = await self._connection.jetstream.get_last_msg(
                    self._stream, f"{self.prefix}{FEED}.>", direct=True
                )
            except nats.js.errors.NotFoundError:
                return 0
            return message.seq or 0

        return await self._requests.run(READ, last)

    async def has_heartbeat(self, worker_id: str) -> bool:
        """Whether the worker's heartbeat is stored and has not expired. Raises what nats-py raises."""
        js = self._connection.jetstream
        try:
            message = await js.get_last_msg(self._stream, f"{self.prefix}{HEARTBEAT}.{worker_id}", direct=True)
        except nats.js.errors.NotFoundError:
            return False
        return MARKER not in (message.headers or {})
