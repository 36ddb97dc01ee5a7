"""The registry: who hosts what, in a JetStream KV bucket, and the view of it that a runtime keeps.

Rules:

1. A snapshot, then every committed change in the stream's order. Changes come over a plain subscription to what the
   stream republishes, not over a KV watch, which can be blind for 20 s after a server restart. After each reconnect,
   and when a change shows that one before it was missed, a new snapshot is read.
2. A write returns when this runtime's own view contains it, and so everything that was committed before it.
3. Heartbeats are outside that feed, so an idle runtime hears nothing of idle workers. Every worker looks after the next
   one in the order of worker ids, and any other runtime after one by chance, and removes it when its heartbeat has
   expired and it does not answer either.
4. A worker whose entry was removed (it was frozen, or cut off) declares itself again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import nats.errors
import nats.js.errors
from autogen_core import AgentId
from nats.aio.msg import Msg
from nats.js import api

from natsrt.background import BackgroundTasks
from natsrt.errors import (
    CannotDecode,
    NatsrtError,
    NoLiveWorker,
    PermissionDenied,
    RegistryUnavailable,
    UnknownAgent,
    UnknownAgentType,
)
from natsrt.jetstream.buckets import MARKER, MARKER_TTL, OPERATION, TTL, ensure_bucket, is_gone, last_messages
from natsrt.jetstream.registry.entries import (
    FEED,
    HEARTBEAT,
    NOBODY,
    KnownEntry,
    RegistryEntry,
    SubscriptionEntry,
    View,
    WorkerEntry,
    decode_entry,
    encode_entry,
)
from natsrt.jetstream.requests import OPEN, READ, WRITE, BucketRequests
from natsrt.options import Options
from natsrt.transport.connection import Connection, Interest
from natsrt.transport.peers import Peers
from natsrt.wire.subjects import Subjects

logger = logging.getLogger("natsrt.registry")

BUCKET = "natsrt_registry"
KNOWN_TTL = 36 * 3600
"""Seconds a type stays known without a worker that confirms it; confirmed every 12 hours, so 24 hours at least."""
_KNOWN_REFRESH = 12 * 3600
_TOMBSTONE_TTL = 3600
_WRITES_AT_ONCE = 256
_RETRY_FOR = 5.0
_LIST_AT_MOST = 20

_LEFT = "Natsrt-Left"
_IN_ORDER = "in-order"
"""A header of a worker's deletion: the worker itself left, with everything answered."""
_REMEMBERED = 32_768
"""Topic types whose keyed takers are remembered."""


class RegistryListener:
    """Hears of changes in the registry. A subclass overrides what it needs; nothing here may raise or block."""

    def rules_changed(self, agent_type: str) -> None:
        """The subscriptions in force for a type may have changed."""

    def subscription_removed(self, entry: SubscriptionEntry) -> None:
        """Another runtime removed a subscription that this one had declared for nobody."""

    def evicted(self) -> None:
        """Another runtime took this worker for dead and removed it."""


class Registry:
    """One runtime's part in the registry. Implements `natsrt.transport.calls.Directory`; a connection `Listener`."""

    def __init__(self, connection: Connection, subjects: Subjects, options: Options, peers: Peers | None) -> None:
        """``peers`` None: this one only reads. It does not remove dead workers."""
        self._connection = connection
        self._subjects = subjects
        self._options = options
        self._peers = peers
        self._listeners: list[RegistryListener] = []
        self._bucket = subjects.bucket(BUCKET)
        self._stream = f"KV_{self._bucket}"
        self._kv = f"$KV.{self._bucket}."
        self._feed_prefix = len(subjects.registry_feed) + 1
        self._worker: WorkerEntry | None = None
        self._own: dict[str, RegistryEntry] = {}
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._interest: Interest | None = None
        self._tasks = BackgroundTasks(logger, "following the registry failed")
        self._syncing: asyncio.Task[None] | None = None
        self._collected: list[Msg] | None = None
        self._open = False
        self._examined: set[str] = set()
        self._may_remove = peers is not None
        self._synced = asyncio.Event()
        self._departed_at = float("-inf")
        self._takers: dict[str, tuple[str, ...]] = {}
        self._generation = 0
        self._reading = asyncio.Lock()
        self.view = View()
        connection.add_listener(self)
        self._guard = BucketRequests(
            connection,
            self._bucket,
            RegistryUnavailable,
            subscribed=(subjects.registry_feed, options.inbox_prefix),
            retry_for=_RETRY_FOR,
        )

    def add_listener(self, listener: RegistryListener) -> None:
        self._listeners.append(listener)

    @property
    def synced(self) -> bool:
        """Whether the view is complete and this worker's own entries are stored."""
        return self._synced.is_set() and self._connection.connected

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Create the bucket if it is missing, and read the snapshot.

        Raises `JetStreamRequired`, `PermissionDenied` or `RegistryUnavailable`.
        """
        self.view = View()
        self._own.clear()
        self._open = True
        try:
            self._interest = await self._connection.subscribe(f"{self._subjects.registry_feed}.>", self._on_change)
            await self._guard.run(OPEN, self._ensure_bucket)
            await self._read_snapshot()
        except BaseException:
            self._open = False
            raise
        self._tasks.spawn(self._look_after_others())
        self._synced.set()

    async def leave(self) -> None:
        """Stop being a worker: what it declared is removed, and following goes on."""
        worker, self._worker = self._worker, None
        self._own.clear()
        if worker is not None:
            await self._remove_worker(worker.worker_id, in_order=True)

    async def close(self) -> None:
        """Leave, if that can still be done, and stop following. Harmless when closed."""
        self._open = False
        self._synced.clear()
        await self._tasks.cancel()
        if self._connection.connected:
            try:
                await self.leave()
            except NatsrtError as error:
                logger.warning("this worker's entries stay until others remove them: %s", error)
        for _, waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(RegistryUnavailable("follow", "this runtime was stopped"))
                waiter.exception()  # whoever waits gets it; nobody has to
        self._waiting.clear()
        if self._interest is not None:
            await self._connection.unsubscribe(self._interest)
            self._interest = None

    def connection_lost(self) -> None:
        self._synced.clear()

    def connection_made(self) -> None:
        if self._open and self._interest is not None:
            self._resync()

    # -- declaring -----------------------------------------------------------------------------------------------

    async def join(self, worker: WorkerEntry) -> None:
        """Become a worker: stored, kept alive by heartbeats, removed by others when those end."""
        self._worker = worker
        await self._beat(worker)
        await self.declare([worker])
        self._tasks.spawn(self._heartbeats(worker))

    async def drain(self) -> None:
        """Say that this worker takes no new messages: it is there only for what it has."""
        if self._worker is not None:
            self._worker = replace(self._worker, draining=True)
            await self.declare([self._worker])

    async def declare(self, entries: Sequence[RegistryEntry]) -> None:
        """Store ``entries`` as this runtime's own; they are stored again whenever they vanish."""
        revisions = []
        for start in range(0, len(entries), _WRITES_AT_ONCE):
            chunk = entries[start : start + _WRITES_AT_ONCE]
            revisions += await self._write_all([partial(self._write, entry) for entry in chunk])
        if revisions:
            await self.shown(max(revisions))
        for entry in entries:
            self._own[entry.key] = entry

    async def withdraw(self, keys: Sequence[str]) -> None:
        """Delete entries."""
        for key in keys:
            self._own.pop(key, None)
        revisions = await self._write_all([partial(self._delete, key) for key in keys])
        if revisions:
            await self.shown(max(revisions))

    def revision_of(self, key: str) -> int:
        """The revision of an entry in the view; 0 if it is not there."""
        present = self.view.entries.get(key)
        return present[0] if present is not None else 0

    async def _write_all(self, writes: Sequence[Callable[[], Awaitable[int]]]) -> list[int]:
        """Do the writes at once, and give the revisions. They are repeated together, which changes nothing."""

        async def attempt() -> list[int]:
            return list(await asyncio.gather(*(write() for write in writes)))

        return await self._guard.run(WRITE, attempt) if writes else []

    async def _write(self, entry: RegistryEntry) -> int:
        ttl = KNOWN_TTL if isinstance(entry, KnownEntry) else None
        subject, value = self._kv + entry.key, encode_entry(entry)
        ack = await self._connection.jetstream.publish(subject, value, stream=self._stream, msg_ttl=ttl)
        return ack.seq

    async def _delete(self, key: str, headers: dict[str, str] | None = None) -> int:
        headers = {OPERATION: "DEL", TTL: str(_TOMBSTONE_TTL), **(headers or {})}
        ack = await self._connection.jetstream.publish(self._kv + key, b"", stream=self._stream, headers=headers)
        return ack.seq

    async def _remove_worker(self, worker_id: str, *, in_order: bool = False) -> None:
        """Delete the worker's entry, which every view takes for all its entries, and purge those from the stream.

        Only what is older than the deletion: the worker may be alive after all and declare itself again meanwhile.
        A worker that leaves ``in_order`` has answered all that it ever received.
        """
        headers = {_LEFT: _IN_ORDER} if in_order else None
        [revision] = await self._write_all([partial(self._delete, f"{FEED}.worker.{worker_id}", headers)])
        for pattern in (f"{FEED}.*.*.{worker_id}", f"{FEED}.*.*.*.{worker_id}", f"{HEARTBEAT}.{worker_id}"):
            await self._guard.run(WRITE, partial(self._purge, self._kv + pattern, revision))

    async def _purge(self, subject: str, before: int) -> None:
        await self._connection.jetstream.purge_stream(self._stream, seq=before, subject=subject)

    # -- following -----------------------------------------------------------------------------------------------

    def _on_change(self, message: Msg) -> None:
        if self._collected is not None:
            self._collected.append(message)
        else:
            self._apply(message)

    def _apply(self, message: Msg) -> None:
        headers = message.headers or {}
        key = f"{FEED}.{message.subject[self._feed_prefix :]}"
        try:
            revision, before = int(headers["Nats-Sequence"]), int(headers.get("Nats-Last-Sequence", 0))
        except (KeyError, ValueError):
            raise CannotDecode(f"a message on {message.subject}", "it is not from the registry's stream") from None
        if self.revision_of(key) < before and self.revision_of(key):
            self._resync()
        try:
            self._change(key, revision, headers, message.data)
        finally:  # one that cannot be read, perhaps of a newer runtime, is seen too
            self.view.applied = max(self.view.applied, revision)
            self._takers.clear()
            self._wake()

    def _change(self, key: str, revision: int, headers: dict[str, str], value: bytes) -> None:
        if is_gone(headers):
            own = self._own.get(key)
            if isinstance(own, SubscriptionEntry) and own.declarer == NOBODY:
                del self._own[key]  # somebody removed it, as anybody may
                for listener in self._listeners:
                    listener.subscription_removed(own)
            workers = len(self.view.workers)
            touched = self.view.delete(key, revision)
            if len(self.view.workers) < workers and headers.get(_LEFT) != _IN_ORDER:
                self._departed_at = asyncio.get_running_loop().time()
            if self._worker is not None and key == self._worker.key and self._open:
                for listener in self._listeners:
                    listener.evicted()
                self._resync()
        else:
            touched = self.view.put(key, revision, decode_entry(key, value))
        for agent_type in touched:
            self._tell_rules_changed(agent_type)

    def _tell_rules_changed(self, agent_type: str) -> None:
        for listener in self._listeners:
            listener.rules_changed(agent_type)

    def _wake(self) -> None:
        still = []
        for revision, waiter in self._waiting:
            if revision <= self.view.applied:
                if not waiter.done():
                    waiter.set_result(None)
            else:
                still.append((revision, waiter))
        self._waiting = still

    async def shown(self, revision: int) -> None:
        """Wait until the view contains ``revision``. Raises `RegistryUnavailable` when it does not come."""
        if revision <= self.view.applied:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append((revision, waiter))
        try:
            async with asyncio.timeout(self._options.subscription_timeout):
                await waiter
        except TimeoutError:
            self._resync()
            raise RegistryUnavailable("follow", f"change {revision} was stored but not announced") from None

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def _ensure_bucket(self) -> None:
        config = api.KeyValueConfig(
            bucket=self._bucket,
            description="natsrt: workers, agent types and subscriptions",
            history=1,
            direct=True,
            replicas=self._options.registry_replicas,
            limit_marker_ttl=MARKER_TTL,
            republish=api.RePublish(src=f"{self._kv}{FEED}.>", dest=f"{self._subjects.registry_feed}.>"),
        )
        info = await ensure_bucket(self._connection.jetstream, config)
        if info.config.republish is None:
            problem = f"the bucket {self._bucket} exists without republishing: it is not natsrt's, so delete it"
            raise RegistryUnavailable("open", problem)

    async def _read_snapshot(self) -> None:
        """Replace the view by what the stream holds; what the feed brings meanwhile is applied after."""
        async with self._reading:
            await self._replace_view()

    async def _replace_view(self) -> None:
        self._collected = []
        stale = self.view
        try:
            await self._connection.barrier()
            self.view = await self._guard.run(READ, self._load)
            if not stale.workers.keys() <= self.view.workers.keys():
                self._departed_at = asyncio.get_running_loop().time()
        finally:
            collected, self._collected = self._collected, None
            for message in collected:
                try:
                    self._apply(message)
                except CannotDecode as error:
                    logger.warning("%s", error)
        self._takers.clear()
        for agent_type in {*stale.declared, *self.view.declared}:
            self._tell_rules_changed(agent_type)
        self._wake()

    async def _load(self) -> View:
        view, alive = View(), set[str]()
        pages = last_messages(
            self._connection.jetstream, self._stream, f"{self._kv}>", timeout=self._options.connect_timeout
        )
        async with aclosing(pages):
            async for page in pages:
                for message in page:
                    self._load_one(message, view, alive)
        for worker_id in {*view.workers, *view.of_worker} - alive:  # the latter: whose removal was not finished
            self._tasks.spawn(self._remove_if_dead(worker_id))
        return view

    def _load_one(self, message: Msg, view: View, alive: set[str]) -> None:
        key, gone = message.subject[len(self._kv) :], is_gone(message.headers)
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
                view.applied = max(view.applied, revision)
                logger.warning("%s", error)

    def _resync(self) -> None:
        """Read everything again. One that is under way is not enough: it may have read before what matters now."""
        self._generation += 1
        if self._syncing is None or self._syncing.done():
            self._syncing = self._tasks.spawn(self._synchronise())

    async def _synchronise(self) -> None:
        """After a reconnect or a gap: bucket, snapshot, own entries. Tries until it succeeds without another one."""
        pause = self._options.reconnect_wait
        while self._open:
            self._synced.clear()
            generation = self._generation
            try:
                await self._guard.run(OPEN, self._ensure_bucket)
                await self._read_snapshot()
                missing = [
                    entry
                    for key, entry in self._own.items()
                    if key not in self.view.entries or self.view.entries[key][1] != entry
                ]
                if self._worker is not None:
                    await self._beat(self._worker)
                await self.declare(sorted(missing, key=lambda entry: not isinstance(entry, WorkerEntry)))
                if generation == self._generation:
                    self._synced.set()
                    return
            except Exception as error:  # whatever it is, the registry comes back
                known = isinstance(error, NatsrtError | nats.errors.Error)
                logger.info("the registry is not back yet: %s", error, exc_info=None if known else error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)

    # -- liveness ------------------------------------------------------------------------------------------------

    async def _beat(self, worker: WorkerEntry) -> None:
        await self._connection.publish(
            f"{self._kv}{HEARTBEAT}.{worker.worker_id}",
            b"",
            headers={TTL: f"{max(1, round(self._options.heartbeat_ttl))}s"},
        )

    async def _heartbeats(self, worker: WorkerEntry) -> None:
        known_since = asyncio.get_running_loop().time()
        while self._worker is worker:
            await asyncio.sleep(self._options.heartbeat_interval)
            if not self._connection.connected or self._worker is not worker:
                continue
            try:
                await self._beat(worker)
                now = asyncio.get_running_loop().time()
                if now - known_since > _KNOWN_REFRESH:
                    known_since = now
                    await self.declare([entry for entry in self._own.values() if isinstance(entry, KnownEntry)])
            except NatsrtError as error:
                logger.debug("heartbeat: %s", error)

    async def _look_after_others(self) -> None:
        while self._may_remove:
            await asyncio.sleep(self._options.heartbeat_interval)
            if self._connection.connected and (worker_id := self._one_to_look_after()) is not None:
                await self._remove_if_dead(worker_id)

    def _one_to_look_after(self) -> str | None:
        if self._worker is None:
            return random.choice(list(self.view.workers)) if self.view.workers else None
        own = self._worker.worker_id
        ring = sorted({*self.view.workers, own})
        following = ring[(ring.index(own) + 1) % len(ring)]
        return following if following != own else None

    async def _remove_if_dead(self, worker_id: str) -> None:
        """Remove a worker that has no heartbeat and does not answer. Removing it twice changes nothing."""
        if worker_id in self._examined or not self._may_remove or self._peers is None:
            return
        self._examined.add(worker_id)
        try:
            if await self.has_heartbeat(worker_id) or await self._peers.alive(worker_id):
                return
            if not (worker_id in self.view.workers or worker_id in self.view.of_worker) and self._synced.is_set():
                return  # another one was faster
            logger.info("worker %s has no heartbeat and does not answer: removing its entries", worker_id)
            await self._remove_worker(worker_id)
        except PermissionDenied as error:
            self._may_remove = False
            logger.info("this runtime leaves the entries of dead workers to others: %s", error)
        except (NatsrtError, nats.errors.Error) as error:
            logger.debug("looking after worker %s: %s", worker_id, error)
        finally:
            self._examined.discard(worker_id)

    async def has_heartbeat(self, worker_id: str) -> bool:
        """Whether the worker's heartbeat is stored, and has not expired."""
        js = self._connection.jetstream
        try:
            message = await js.get_last_msg(self._stream, f"{self._kv}{HEARTBEAT}.{worker_id}", direct=True)
        except nats.js.errors.NotFoundError:
            return False
        return MARKER not in (message.headers or {})

    # -- Directory -----------------------------------------------------------------------------------------------

    def is_keyed(self, agent_type: str) -> bool:
        """Whether the type's workers say that it is keyed."""
        return agent_type in self.view.keyed

    def keyed_takers(self, topic_type: str) -> tuple[str, ...]:
        """The keyed types that an ordinary subscription gives topics of this type to."""
        if not self.view.keyed:
            return ()
        takers = self._takers.get(topic_type)
        if takers is None:
            if len(self._takers) >= _REMEMBERED:
                self._takers.clear()
            takers = self._takers[topic_type] = self.view.keyed_takers(topic_type)
        return takers

    def stays(self, worker_id: str) -> bool:
        """Whether a worker is live, and takes new messages."""
        return self.view.stays(worker_id)

    def lists(self, worker_id: str) -> bool:
        """Whether a worker is live, as far as this view goes."""
        return worker_id in self.view.workers

    def subject_of(self, recipient: AgentId) -> str:
        if self.view.instance_holders(recipient.type, recipient.key):
            return self._subjects.instance(recipient.type, recipient.key)
        return self._subjects.agent(recipient.type)

    def worker_subject(self, worker_id: str) -> str:
        return self._subjects.worker(worker_id)

    def workers_of(self, recipient: AgentId) -> Sequence[str]:
        return self.view.workers_of(recipient)

    async def verify(self, recipient: AgentId) -> NatsrtError | None:
        if self.view.takers_of(recipient):
            return None
        await self.catch_up()
        if self.view.takers_of(recipient):
            return None
        name = str(recipient)
        if self.view.workers_hosting(recipient.type):
            keys = sorted(self.view.instances.get(recipient.type, ()))
            return UnknownAgent(name, [f"{recipient.type}/{key}" for key in keys[:_LIST_AT_MOST]])
        if self.view.is_known(recipient.type):
            return NoLiveWorker(name, recipient.type)
        known = sorted({*self.view.known, *self.view.hosts})
        return UnknownAgentType(name, recipient.type, known[:_LIST_AT_MOST])

    def suspect(self, worker_id: str) -> None:
        if worker_id in self.view.workers:
            self._tasks.spawn(self._remove_if_dead(worker_id))

    def all_stayed(self, since: float) -> bool:
        return self._departed_at < since and self.synced

    async def catch_up(self) -> None:
        """Make the view contain everything that is committed now."""
        js = self._connection.jetstream

        async def last() -> int:
            try:
                message = await js.get_last_msg(self._stream, f"{self._kv}{FEED}.>", direct=True)
            except nats.js.errors.NotFoundError:
                return 0
            return message.seq or 0

        await self.shown(await self._guard.run(READ, last))
