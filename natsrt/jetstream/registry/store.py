"""The registry's bucket: writing and reading entries, heartbeats, and what is left of dead workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from functools import partial

import nats.js.errors
import orjson
from nats.aio.msg import Msg
from nats.js import api

from natsrt.errors import CannotDecode, PermissionDenied, RegistryUnavailable
from natsrt.jetstream.acks import WRONG_REVISION
from natsrt.jetstream.buckets import MARKER, MARKER_TTL, OPERATION, TTL, ensure_bucket, is_gone, last_messages
from natsrt.jetstream.registry.entries import (
    FEED,
    HEARTBEAT,
    KNOWN,
    KnownEntry,
    RegistryEntry,
    SubscriptionEntry,
    decode_entry,
    encode_entry,
)
from natsrt.jetstream.requests import OPEN, READ, WRITE, BucketRequests
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.registry")

BUCKET = "natsrt_registry"
KNOWN_TTL = 36 * 3600
"""Seconds for which a type stays known without a worker that confirms it. It is confirmed every 12 hours, so a type
whose last worker was killed is known for 24 hours at least."""
DELETED_TTL = 900
"""Seconds for which the mark of a deleted entry stays. So long a type stays known whose last worker has left in order:
longer than a deployment takes that stops all workers before it starts others."""
_FOLLOWED = tuple(f"{FEED}.{kind}.>" for kind in ("worker", "type", "instance", "subscription"))
"""The keys of a snapshot. Those of the types that are known are not among them: they may be many, and only a call that
finds no worker asks for one."""
_WRITES_AT_ONCE = 256
"""Entries that are written at the same time, so that a runtime with many does not flood JetStream."""
_ACCOUNT = "$JS.API.INFO"
"""Where nats-py asks about the account before it makes a bucket."""
_ONE_BATCH = 2.0
"""Seconds for the next message of a batch."""
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
        self.prefix: str = f"$KV.{self._bucket}."
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
        try:
            await self._requests.run(OPEN, self._ensure)
        except PermissionDenied as denied:
            if denied.subject not in (_ACCOUNT, f"$JS.API.STREAM.CREATE.{self._stream}"):
                raise
            # Only who has found no bucket publishes there.
            problem = (
                "there is none, because no worker has started yet, and this user may not create it. Start a worker "
                "first, as a user with a worker's permissions (docs/permissions.md)"
            )
            raise RegistryUnavailable("open", problem) from denied

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
        return await self._in_chunks([partial(self._write, entry) for entry in entries])

    async def delete(self, keys: Sequence[str], headers: dict[str, str] | None = None) -> int:
        """Delete entries. Returns the highest revision of the deletions; 0 for no keys."""
        return await self._in_chunks([partial(self._delete, key, headers) for key in keys])

    async def retire(self, known: Sequence[KnownEntry]) -> None:
        """Delete what is known of types whose last worker leaves in order. The deletion keeps the value."""
        await self._in_chunks([partial(self._delete, entry.key, None, encode_entry(entry)) for entry in known])

    async def forget(self, known: KnownEntry) -> None:
        """Delete what is known of a type, and the mark of the deletion, so that the type is unknown at once.

        The deletion comes first: a worker that hosts the type by now sees it, and stores the entry again.
        """
        revision = await self.delete([known.key])
        await self._requests.run(WRITE, partial(self._purge, self.prefix + known.key, revision + 1))

    async def replace(self, entry: SubscriptionEntry, revision: int, *, gone: bool = False) -> int | None:
        """Store an entry, or delete it if ``gone``, if its key is still at ``revision``; 0: if it was never stored.

        Returns the new revision; None if the key is at another one, which an earlier attempt may have made.
        """

        async def attempt() -> int | None:
            headers = {api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(revision)}
            try:
                return await (self._delete(entry.key, headers) if gone else self._write(entry, headers))
            except nats.js.errors.APIError as error:
                if error.err_code in WRONG_REVISION:
                    return None
                raise

        return await self._requests.run(WRITE, attempt)

    async def remove_worker(self, worker_id: str, *, in_order: bool = False) -> int:
        """Delete the worker's entry, which every view takes for all its entries, and purge those from the stream.

        Only what is older than the deletion: the worker may be alive after all and declare itself again meanwhile.
        A worker that leaves ``in_order`` has answered all that it ever received. Returns the deletion's revision.
        """
        headers = {LEFT: IN_ORDER} if in_order else None
        revision = await self.delete([f"{FEED}.worker.{worker_id}"], headers)
        for pattern in (f"{FEED}.*.*.{worker_id}", f"{FEED}.*.*.*.{worker_id}", f"{HEARTBEAT}.{worker_id}"):
            await self._requests.run(WRITE, partial(self._purge, self.prefix + pattern, revision))
        return revision

    async def end_heartbeat(self, runtime_id: str) -> None:
        """Delete a heartbeat, instead of letting it expire."""
        await self._requests.run(WRITE, partial(self._purge, f"{self.prefix}{HEARTBEAT}.{runtime_id}", 0))

    async def beat(self, worker_id: str) -> None:
        """Store a worker's heartbeat, which expires by itself. Raises as `Connection.publish` does."""
        headers = {TTL: f"{max(1, round(self._options.heartbeat_ttl))}s"}
        await self._connection.publish(f"{self.prefix}{HEARTBEAT}.{worker_id}", b"", headers=headers)

    async def _in_chunks(self, writes: Sequence[Callable[[], Awaitable[int]]]) -> int:
        """Do the writes, a limited number at once. Returns the highest revision; 0 for no writes."""
        highest = 0
        for start in range(0, len(writes), _WRITES_AT_ONCE):
            highest = max(highest, await self._write_all(writes[start : start + _WRITES_AT_ONCE]))
        return highest

    async def _write_all(self, writes: Sequence[Callable[[], Awaitable[int]]]) -> int:
        """Do the writes at once. They are repeated together, which changes nothing."""

        async def attempt() -> int:
            return max(await asyncio.gather(*(write() for write in writes)))

        return await self._requests.run(WRITE, attempt)

    async def _write(self, entry: RegistryEntry, headers: dict[str, str] | None = None) -> int:
        ttl = KNOWN_TTL if isinstance(entry, KnownEntry) else None
        subject, value = self.prefix + entry.key, encode_entry(entry)
        js = self._connection.jetstream
        ack = await js.publish(subject, value, stream=self._stream, headers=headers, msg_ttl=ttl)
        return ack.seq

    async def _delete(self, key: str, headers: dict[str, str] | None, value: bytes = b"") -> int:
        headers = {OPERATION: "DEL", TTL: str(DELETED_TTL), **(headers or {})}
        ack = await self._connection.jetstream.publish(self.prefix + key, value, stream=self._stream, headers=headers)
        return ack.seq

    async def _purge(self, subject: str, before: int) -> None:
        """Purge what is older than the revision ``before``; 0: everything."""
        await self._connection.jetstream.purge_stream(self._stream, seq=before or None, subject=subject)

    # -- reading -------------------------------------------------------------------------------------------------

    async def read(self, load: Callable[[int, AsyncGenerator[list[Msg], None]], Awaitable[None]]) -> None:
        """Give ``load`` the last message of every key that is followed, and of every heartbeat, in pages, and before
        them the revision that they are complete to: from the beginning again where one was lost.
        """

        async def attempt() -> None:
            last = await self._last(f"{FEED}.>")  # perhaps of a key that is not followed
            await load((last.seq or 0) if last is not None else 0, self._last_messages(*_FOLLOWED, f"{HEARTBEAT}.>"))

        await self._requests.run(READ, attempt)

    def _last_messages(self, *keys: str) -> AsyncGenerator[list[Msg], None]:
        subjects = (self.prefix + key for key in keys)
        js, timeout = self._connection.jetstream, self._options.connect_timeout
        return last_messages(js, self._stream, *subjects, timeout=timeout)

    async def present(self, key: str) -> tuple[int, RegistryEntry | None]:
        """The revision of the last message of a key, 0 if there is none, and its entry, None if it was deleted.

        An entry that cannot be read counts as deleted: whoever declares it next replaces it.
        """
        message = await self._requests.run(READ, partial(self._last, key))
        if message is None:
            return 0, None
        if is_gone(message.headers):
            return message.seq or 0, None
        try:
            return message.seq or 0, decode_entry(key, message.data or b"")
        except CannotDecode as error:
            logger.warning("%s", error)
            return message.seq or 0, None

    # -- what is known ---------------------------------------------------------------------------------------------

    async def is_known(self, agent_type: str) -> bool:
        """True if a worker hosted the type within the last day, or left in order within the last quarter of an hour."""
        message = await self._requests.run(READ, partial(self._last, KnownEntry(agent_type).key))
        return message is not None and MARKER not in (message.headers or {})

    async def known(self, agent_type: str | None = None) -> dict[str, KnownEntry]:
        """What is known of types with or without workers, by type. ``agent_type`` None: of all, which may be many."""
        keys = f"{KNOWN}>" if agent_type is None else KnownEntry(agent_type).key
        found: dict[str, KnownEntry] = {}

        async def attempt() -> None:
            async with aclosing(self._last_messages(keys)) as pages:
                async for page in pages:
                    found.update((entry.agent_type, entry) for entry in map(self._known_in, page) if entry is not None)

        await self._requests.run(READ, attempt)
        return found

    async def some_known(self, limit: int) -> list[str]:
        """Names of types that are known, ``limit`` at most."""

        async def attempt() -> list[str]:
            client = self._connection.client
            answers = await client.subscribe(client.new_inbox())
            try:
                wanted = {"seq": 1, "batch": limit, "next_by_subj": f"{self.prefix}{KNOWN}>"}
                await client.publish(f"$JS.API.DIRECT.GET.{self._stream}", orjson.dumps(wanted), reply=answers.subject)
                found: list[KnownEntry | None] = []
                while True:
                    message = await answers.next_msg(_ONE_BATCH)
                    subject = (message.headers or {}).get("Nats-Subject")
                    if subject is None:  # the end of the batch, or nothing found
                        break
                    found.append(self._known_in(message, subject))
                return [entry.agent_type for entry in found if entry is not None]
            finally:
                await answers.unsubscribe()

        return await self._requests.run(READ, attempt)

    def _known_in(self, message: Msg, subject: str = "") -> KnownEntry | None:
        """What a message says of a type; None if it cannot be read, or has expired."""
        try:
            entry = decode_entry((subject or message.subject)[len(self.prefix) :], message.data)
        except CannotDecode:
            return None
        return entry if isinstance(entry, KnownEntry) else None

    # -- changes and heartbeats ------------------------------------------------------------------------------------

    async def last_change(self) -> int:
        """The revision of the last change that the feed announces; 0 for none."""

        async def last() -> int:
            message = await self._last(f"{FEED}.>")
            return (message.seq or 0) if message is not None else 0

        return await self._requests.run(READ, last)

    async def without_heartbeat(self, runtime_ids: Collection[str]) -> set[str]:
        """Those of the ids whose heartbeats are not stored, or have expired."""

        async def attempt() -> set[str]:
            alive = await asyncio.gather(*map(self.has_heartbeat, runtime_ids))
            return {runtime_id for runtime_id, lives in zip(runtime_ids, alive, strict=True) if not lives}

        return await self._requests.run(READ, attempt) if runtime_ids else set()

    async def has_heartbeat(self, worker_id: str) -> bool:
        """Whether the worker's heartbeat is stored and has not expired. Raises what nats-py raises."""
        message = await self._last(f"{HEARTBEAT}.{worker_id}")
        return message is not None and MARKER not in (message.headers or {})

    async def _last(self, key: str) -> api.RawStreamMsg | None:
        """The last message of a key or of keys that match a pattern. Raises what nats-py raises."""
        try:
            return await self._connection.jetstream.get_last_msg(self._stream, self.prefix + key, direct=True)
        except nats.js.errors.NotFoundError:
            return None
