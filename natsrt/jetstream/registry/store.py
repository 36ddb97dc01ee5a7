"""The registry's bucket: writing and reading entries, heartbeats, and what is left of dead workers."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple

import nats.js.errors
import orjson
from nats.aio.msg import Msg
from nats.js import api

from natsrt.errors import CannotDecode, JetStreamFull, PermissionDenied, RegistryUnavailable
from natsrt.jetstream.acks import WRONG_REVISION
from natsrt.jetstream.buckets import (
    MARKER,
    OPERATION,
    TTL,
    created_at,
    ensure_bucket,
    is_gone,
    last_messages,
    purge,
)
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.registry.entries import (
    FEED,
    HEARTBEAT,
    KNOWN,
    DurableEntry,
    KnownEntry,
    RegistryEntry,
    SubscriptionEntry,
    decode_entry,
    encode_entry,
)
from natsrt.jetstream.registry.origin import ORIGIN, Origin
from natsrt.jetstream.registry.pages import Stored
from natsrt.jetstream.registry.reserve import Reserve
from natsrt.jetstream.requests import OPEN, READ, WRITE, BucketRequests
from natsrt.jetstream.stream_settings import MARKER_TTL, wrong_settings
from natsrt.jetstream.streams import require_settings
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.inbox import is_nobody
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.registry")

BUCKET = "natsrt_registry"
KNOWN_TTL = 36 * 3600
"""Seconds for which a type stays known without a worker that confirms it. It is confirmed every 12 hours, so a type
whose last worker was killed is known for 24 hours at least."""
DELETED_TTL = 900
"""Seconds for which the mark of a deleted entry stays. So long a type stays known whose last worker has left in order:
longer than a deployment takes that stops all workers before it starts others."""
_FOLLOWED = tuple(f"{FEED}.{kind}.>" for kind in ("worker", "type", "instance", "subscription", "durable"))
"""The keys of a snapshot. Those of the types that are known are not among them: they may be many, and only a call that
finds no worker asks for one."""
_WRITES_AT_ONCE = 256
"""Entries that are written at the same time, so that a runtime with many does not flood JetStream."""
_READS_AT_ONCE = 256
"""Keys that one request reads; the server allows 1024."""
_ACCOUNT = "$js.api.info"
"""Where nats-py asks about the account before it makes a bucket, in lower case."""
_ONE_BATCH = 2.0
"""Seconds for the next message of a batch."""
_RETRY_FOR = 5.0
"""Seconds for which a request is tried again; a cluster elects a leader within that time."""
_CHANGE_FOR = 10.0
"""Seconds for which a change is tried that other runtimes precede."""
_LONGEST_PAUSE = 0.02
"""Seconds at most until the next attempt, if another runtime changed the entry first."""

LEFT = "Natsrt-Left"
IN_ORDER = "in-order"
"""A header of a worker's deletion, and its value: the worker itself left, with everything answered."""

SharedEntry = SubscriptionEntry | DurableEntry
"""The entries that several runtimes declare together."""


class Last(NamedTuple):
    """The last message under a key: its revision, and whether it is the mark of a deletion."""

    revision: int
    deleted: bool


def registry_bucket(subjects: Subjects, options: Options) -> api.KeyValueConfig:
    """How the registry's bucket of a namespace is made."""
    bucket = subjects.bucket(BUCKET)
    return api.KeyValueConfig(
        bucket=bucket,
        description="natsrt: workers, agent types and subscriptions",
        history=1,
        direct=True,
        replicas=options.registry_replicas,
        limit_marker_ttl=MARKER_TTL,
        republish=api.RePublish(src=f"$KV.{bucket}.{FEED}.>", dest=f"{subjects.registry_feed}.>"),
    )


class RegistryStore:
    """Requests to the bucket of one namespace.

    Every method raises `RegistryUnavailable`, `ServerUnreachable`, `PermissionDenied` or `JetStreamRequired` where the
    bucket cannot be reached for some seconds.
    """

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._options = options
        self._config = registry_bucket(subjects, options)
        self.bucket: str = subjects.bucket(BUCKET)
        self._stream = f"KV_{self.bucket}"
        self._domain = Domain(options.jetstream_domain)
        self.prefix: str = f"$KV.{self.bucket}."
        """What stands before a key in the subject of its entry."""
        self._requests = BucketRequests(
            connection,
            self.bucket,
            RegistryUnavailable,
            subscribed=(subjects.registry_feed, options.inbox_prefix),
            domain=self._domain,
            retry_for=_RETRY_FOR,
        )
        self.origin: Origin | None = None
        """The registry that `open` found last; None before."""
        self.reserve: Reserve = Reserve(connection, self._stream, self.prefix, self._requests, self._domain)

    def full(self, now: float) -> JetStreamFull | None:
        """See `BucketRequests.full`."""
        return self._requests.full(now)

    async def open(self, above: int = 0) -> None:
        """Make the bucket if it is missing. The revisions of a new one are higher than ``above``, and than those of an
        earlier bucket.
        """
        try:
            await self._requests.run(OPEN, partial(self._ensure, above))
        except PermissionDenied as denied:
            if self._domain.plain(denied.subject) not in (_ACCOUNT, f"$js.api.stream.create.{self._stream}".lower()):
                raise
            # Only who has found no bucket publishes there.
            problem = (
                "there is none, because no worker has started yet, and this user may not create it. Start a worker "
                "first, as a user with a worker's permissions (docs/permissions.md)"
            )
            raise RegistryUnavailable("open", problem) from denied

    async def _ensure(self, above: int) -> None:
        first = max(time.time_ns() // 1000, above + 1)  # clocks may differ, or be set back
        info = await ensure_bucket(self._connection.jetstream, self._config, first_revision=first)
        require_settings(info, self._config, RegistryUnavailable)
        domain = self._options.jetstream_domain or self._connection.client.jetstream_domain
        self.origin = Origin(created_at(info), domain)

    @property
    def is_named(self) -> bool:
        """True if the registry is in a named JetStream domain, so that there may be others."""
        return self.origin is not None and self.origin.domain != ""

    async def is_same(self) -> bool:
        """False if the bucket that `open` found is gone, or another one is in its place, or its settings are wrong."""

        async def attempt() -> bool:
            try:
                info = await self._connection.jetstream.stream_info(self._stream)
            except nats.js.errors.NotFoundError:
                return False
            is_same = self.origin is not None and self.origin.created == created_at(info)
            return is_same and not wrong_settings(info.config, self._config)

        return await self._requests.run(OPEN, attempt)

    def _target(self, key: str) -> str:
        """The subject to publish a key's entry to."""
        return self._domain.publish(self.prefix + key)

    def _told(self) -> dict[str, str]:
        """The header that tells the registry of an entry."""
        return {ORIGIN: str(self.origin)} if self.origin is not None else {}

    # -- writing -------------------------------------------------------------------------------------------------

    async def write(self, entries: Sequence[RegistryEntry], headers: dict[str, str] | None = None) -> int:
        """Store entries. Returns the highest of their revisions; 0 for no entries."""
        return await self._in_chunks([partial(self._write, entry, headers) for entry in entries])

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

    async def replace(self, entry: SharedEntry, revision: int, *, gone: bool = False) -> int | None:
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

        return await self.reserve.used_by(attempt)

    async def change(
        self, key: str, change: Callable[[RegistryEntry | None], Awaitable[tuple[SharedEntry, bool] | None]]
    ) -> int:
        """Change an entry that several runtimes may change at once. Returns the revision that contains the change.

        ``change`` gets the entry that is stored, or None, and returns the new one, and whether to delete it; None: it
        is as it must be. It is called again whenever another runtime changed the entry first. Raises
        `RegistryUnavailable` if that is always so.
        """
        until = asyncio.get_running_loop().time() + _CHANGE_FOR
        while True:
            revision, present = await self.present(key)
            changed = await change(present)
            if changed is None:
                return revision
            entry, gone = changed
            written = await self.replace(entry, revision, gone=gone)
            if written is not None:
                return written
            if asyncio.get_running_loop().time() > until:
                raise RegistryUnavailable(WRITE, f"other runtimes always change {key} first")
            await asyncio.sleep(random.uniform(0, _LONGEST_PAUSE))

    async def remove_worker(self, worker_id: str, *, in_order: bool = False) -> int:
        """Delete the worker's entry, which every view takes for all its entries, and purge those from the stream.

        Only what is older than the deletion: the worker may be alive after all and declare itself again meanwhile.
        A worker that leaves ``in_order`` has answered all that it ever received. Returns the deletion's revision.
        """
        key, headers = f"{FEED}.worker.{worker_id}", {LEFT: IN_ORDER} if in_order else None
        others = (f"{FEED}.*.*.{worker_id}", f"{FEED}.*.*.*.{worker_id}", f"{HEARTBEAT}.{worker_id}")
        try:
            revision = await self.delete([key], headers)
        except JetStreamFull:
            if not in_order:
                raise
            await self._purge_all((key, *others), 0)  # makes room for the deletion
            return await self.delete([key], headers)
        await self._purge_all(others, revision)
        return revision

    async def _purge_all(self, patterns: Sequence[str], before: int) -> None:
        for pattern in patterns:
            await self._requests.run(WRITE, partial(self._purge, self.prefix + pattern, before))

    async def end_heartbeat(self, runtime_id: str) -> None:
        """Delete a heartbeat, instead of letting it expire."""
        await self._requests.run(WRITE, partial(self._purge, f"{self.prefix}{HEARTBEAT}.{runtime_id}", 0))

    async def beat(self, worker_id: str) -> None:
        """Store a worker's heartbeat, which expires by itself."""
        headers = {TTL: f"{max(1, round(self._options.heartbeat_ttl))}s"}

        async def attempt() -> None:
            subject = self._target(f"{HEARTBEAT}.{worker_id}")
            await self._connection.jetstream.publish(subject, b"", stream=self._stream, headers=headers)

        await self.reserve.used_by(attempt)

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

        return await self.reserve.used_by(attempt)

    async def _write(self, entry: RegistryEntry, headers: dict[str, str] | None = None) -> int:
        ttl = KNOWN_TTL if isinstance(entry, KnownEntry) else None
        subject, value = self._target(entry.key), encode_entry(entry)
        js = self._connection.jetstream
        headers = {**self._told(), **(headers or {})}
        ack = await js.publish(subject, value, stream=self._stream, headers=headers, msg_ttl=ttl)
        return ack.seq

    async def _delete(self, key: str, headers: dict[str, str] | None, value: bytes = b"") -> int:
        headers = {OPERATION: "DEL", TTL: str(DELETED_TTL), **self._told(), **(headers or {})}
        js, subject = self._connection.jetstream, self._target(key)
        ack = await js.publish(subject, value, stream=self._stream, headers=headers)
        return ack.seq

    async def _purge(self, subject: str, before: int) -> None:
        """Purge what is older than the revision ``before``; 0: everything."""
        await purge(self._connection.jetstream, self._stream, subject, before or None)

    # -- reading -------------------------------------------------------------------------------------------------

    async def read(self, load: Callable[[int, AsyncGenerator[list[Stored], None]], Awaitable[None]]) -> None:
        """Give ``load`` the last message of every key that is followed, and of every heartbeat, in pages, and before
        them the revision that they are complete to: from the beginning again where one was lost.
        """

        async def attempt() -> None:
            last = await self._last(f"{FEED}.>")  # perhaps of a key that is not followed
            await load((last.seq or 0) if last is not None else 0, self._stored())

        await self._requests.run(READ, attempt)

    async def _stored(self) -> AsyncGenerator[list[Stored], None]:
        start = len(self.prefix)
        async with aclosing(self._last_messages(*_FOLLOWED, f"{HEARTBEAT}.>")) as pages:
            async for page in pages:
                yield [
                    Stored(
                        message.subject[start:],
                        message.metadata.sequence.stream,
                        None if is_gone(message.headers) else message.data,
                    )
                    for message in page
                ]

    def _last_messages(self, *keys: str) -> AsyncGenerator[list[Msg], None]:
        subjects = (self.prefix + key for key in keys)
        js, timeout = self._connection.jetstream, self._options.connect_timeout
        return last_messages(js, self._stream, *subjects, timeout=timeout)

    async def revisions(self, keys: Collection[str]) -> dict[str, Last]:
        """What is stored under ``keys``, by key, without those under which nothing is."""
        found: dict[str, Last] = {}

        async def attempt(some: Sequence[str]) -> None:
            wanted = {"multi_last": [self.prefix + key for key in some], "batch": len(some)}
            async for subject, message in self._batch(wanted):
                headers = message.headers or {}
                last = Last(int(headers["Nats-Sequence"]), deleted=OPERATION in headers)
                found[subject[len(self.prefix) :]] = last

        ordered = list(keys)
        for start in range(0, len(ordered), _READS_AT_ONCE):
            await self._requests.run(READ, partial(attempt, ordered[start : start + _READS_AT_ONCE]))
        return found

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
            wanted = {"seq": 1, "batch": limit, "next_by_subj": f"{self.prefix}{KNOWN}>"}
            found = [self._known_in(message, subject) async for subject, message in self._batch(wanted)]
            return [entry.agent_type for entry in found if entry is not None]

        return await self._requests.run(READ, attempt)

    async def _batch(self, wanted: dict[str, Any]) -> AsyncGenerator[tuple[str, Msg], None]:
        """The messages that answer one direct request, with their subjects. Raises what nats-py raises."""
        client = self._connection.client
        answers = await client.subscribe(client.new_inbox())
        try:
            subject = self._domain.api(f"DIRECT.GET.{self._stream}")
            await client.publish(subject, orjson.dumps(wanted), reply=answers.subject)
            while True:
                message = await answers.next_msg(_ONE_BATCH + self._connection.rtt.allowance)
                headers = message.headers or {}
                if is_nobody(message):
                    raise nats.js.errors.NoStreamResponseError
                if "Status" in headers:  # the end of the batch, or nothing found
                    return
                yield headers["Nats-Subject"], message
        finally:
            await answers.unsubscribe()

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
