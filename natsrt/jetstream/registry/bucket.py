"""The registry's JetStream KV bucket: the requests that read and write it.

Each method raises `RegistryUnavailable`, `PermissionDenied` or `JetStreamRequired` if the bucket cannot be reached for
some seconds, unless it says otherwise.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Final, NamedTuple

import nats.js.errors
from nats.aio.msg import Msg
from nats.js import api

from natsrt.errors import CannotDecode, RegistryUnavailable
from natsrt.jetstream.buckets import MARKER, MARKER_TTL, OPERATION, TTL, ensure_bucket, is_gone, last_messages
from natsrt.jetstream.registry.entries import FEED, HEARTBEAT, KnownEntry, RegistryEntry, decode_entry, encode_entry
from natsrt.jetstream.registry.view import View
from natsrt.jetstream.requests import OPEN, READ, WRITE, BucketRequests
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects

logger = logging.getLogger("natsrt.registry")

REGISTRY_BUCKET: Final = "natsrt_registry"
KNOWN_REFRESH: Final = 12 * 3600.0
"""Seconds after which a worker writes its `KnownEntry` entries again."""
LEFT: Final = "Natsrt-Left"
IN_ORDER: Final = "in-order"
"""Value of the header `LEFT` in the deletion of a worker that left by itself, after it had answered all its calls."""

_KNOWN_TTL = 36 * 3600
"""Seconds until a `KnownEntry` expires. Written every `KNOWN_REFRESH` seconds, so it stays for 24 hours at least after
the last worker ended."""
_TOMBSTONE_TTL = 3600
"""Seconds for which the tombstone of a deleted entry stays."""
_RETRY_FOR = 5.0
"""Seconds for which a request that fails is repeated."""


class Snapshot(NamedTuple):
    """What the bucket holds. ``without_heartbeat``: ids of workers that have entries, but no heartbeat."""

    view: View
    without_heartbeat: set[str]


class RegistryBucket:
    """The registry's bucket in one namespace."""

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._options = options
        self._name = subjects.bucket(REGISTRY_BUCKET)
        self._stream = f"KV_{self._name}"
        self._prefix = f"$KV.{self._name}."
        self.feed = subjects.registry_feed
        """The subject below which the stream republishes every change of an entry."""
        self._requests = BucketRequests(
            connection,
            self._name,
            RegistryUnavailable,
            subscribed=(self.feed, options.inbox_prefix),
            retry_for=_RETRY_FOR,
        )

    async def ensure(self) -> None:
        """Make the bucket if it is missing."""
        await self._requests.run(OPEN, self._ensure)

    async def _ensure(self) -> None:
        config = api.KeyValueConfig(
            bucket=self._name,
            description="natsrt: workers, agent types and subscriptions",
            history=1,
            direct=True,
            replicas=self._options.registry_replicas,
            limit_marker_ttl=MARKER_TTL,
            republish=api.RePublish(src=f"{self._prefix}{FEED}.>", dest=f"{self.feed}.>"),
        )
        info = await ensure_bucket(self._connection.jetstream, config)
        if info.config.republish is None:
            problem = f"the bucket {self._name} exists without republishing: it is not natsrt's, so delete it"
            raise RegistryUnavailable("open", problem)

    # -- reading -------------------------------------------------------------------------------------------------

    async def read(self) -> Snapshot:
        """All entries. An entry that cannot be read is logged and left out."""
        return await self._requests.run(READ, self._read)

    async def _read(self) -> Snapshot:
        view, alive = View(), set[str]()
        timeout = self._options.connect_timeout
        pages = last_messages(self._connection.jetstream, self._stream, f"{self._prefix}>", timeout=timeout)
        async with aclosing(pages):
            async for page in pages:
                for message in page:
                    self._read_one(message, view, alive)
        # `of_worker` also has workers whose removal was not finished: their own entry is gone, and others are left.
        return Snapshot(view, {*view.workers, *view.of_worker} - alive)

    def _read_one(self, message: Msg, view: View, alive: set[str]) -> None:
        key, gone = message.subject[len(self._prefix) :], is_gone(message.headers)
        revision = message.metadata.sequence.stream
        if key.startswith(f"{HEARTBEAT}."):
            if not gone:
                alive.add(key[len(HEARTBEAT) + 1 :])
        elif gone:
            view.delete(key, revision)
        else:
            try:
                view.put(key, revision, decode_entry(key, message.data))
            except CannotDecode as error:
                view.advance(revision)
                logger.warning("%s", error)

    async def last_revision(self) -> int:
        """The revision of the last change of an entry; 0 if there was none."""
        return await self._requests.run(READ, self._last_revision)

    async def _last_revision(self) -> int:
        js = self._connection.jetstream
        try:
            message = await js.get_last_msg(self._stream, f"{self._prefix}{FEED}.>", direct=True)
        except nats.js.errors.NotFoundError:
            return 0
        return message.seq or 0

    async def has_heartbeat(self, worker_id: str) -> bool:
        """Whether the worker's heartbeat is stored, and has not expired. Not repeated: raises what nats-py raises."""
        js = self._connection.jetstream
        try:
            message = await js.get_last_msg(self._stream, f"{self._prefix}{HEARTBEAT}.{worker_id}", direct=True)
        except nats.js.errors.NotFoundError:
            return False
        return MARKER not in (message.headers or {})

    # -- writing -------------------------------------------------------------------------------------------------

    async def put(self, entries: Sequence[RegistryEntry]) -> int:
        """Store entries, all at once. Returns the highest revision; 0 for no entries."""
        return await self._write([partial(self._put, entry) for entry in entries])

    async def delete(self, keys: Sequence[str]) -> int:
        """Delete entries, all at once. Returns the highest revision; 0 for no keys."""
        return await self._write([partial(self._delete, key) for key in keys])

    async def remove_worker(self, worker_id: str, *, in_order: bool = False) -> None:
        """Delete the worker's own entry, which also ends its other entries in every view, and purge those.

        Only what is older than the deletion is purged: the worker may be alive after all, and declare itself again
        meanwhile. ``in_order``: the worker leaves by itself, and has answered all that it received.
        """
        headers = {LEFT: IN_ORDER} if in_order else None
        revision = await self._write([partial(self._delete, f"{FEED}.worker.{worker_id}", headers)])
        for pattern in (f"{FEED}.*.*.{worker_id}", f"{FEED}.*.*.*.{worker_id}", f"{HEARTBEAT}.{worker_id}"):
            await self._requests.run(WRITE, partial(self._purge, pattern, revision))

    async def beat(self, worker_id: str) -> None:
        """Send the worker's heartbeat, without waiting until it is stored. Raises as `Connection.publish` does."""
        await self._connection.publish(
            f"{self._prefix}{HEARTBEAT}.{worker_id}",
            b"",
            headers={TTL: f"{max(1, round(self._options.heartbeat_ttl))}s"},
        )

    async def _write(self, writes: Sequence[Callable[[], Awaitable[int]]]) -> int:
        """Do the writes at once. Returns the highest revision. They are repeated together, which changes nothing."""

        async def attempt() -> list[int]:
            return list(await asyncio.gather(*(write() for write in writes)))

        return max(await self._requests.run(WRITE, attempt)) if writes else 0

    async def _put(self, entry: RegistryEntry) -> int:
        ttl = _KNOWN_TTL if isinstance(entry, KnownEntry) else None
        subject, value = self._prefix + entry.key, encode_entry(entry)
        ack = await self._connection.jetstream.publish(subject, value, stream=self._stream, msg_ttl=ttl)
        return ack.seq

    async def _delete(self, key: str, headers: dict[str, str] | None = None) -> int:
        headers = {OPERATION: "DEL", TTL: str(_TOMBSTONE_TTL), **(headers or {})}
        ack = await self._connection.jetstream.publish(self._prefix + key, b"", stream=self._stream, headers=headers)
        return ack.seq

    async def _purge(self, pattern: str, before: int) -> None:
        await self._connection.jetstream.purge_stream(self._stream, seq=before, subject=self._prefix + pattern)
