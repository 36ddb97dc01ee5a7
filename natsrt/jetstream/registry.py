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
from functools import partial
from typing import Any, TypeVar

import nats.errors
import nats.js.errors
from autogen_core import AgentId
from nats.aio.msg import Msg
from nats.js import api

from natsrt.errors import (
    CannotDecode,
    JetStreamRequired,
    NatsrtError,
    NoLiveWorker,
    PermissionDenied,
    RegistryUnavailable,
    UnknownAgent,
    UnknownAgentType,
)
from natsrt.jetstream.entries import (
    FEED,
    HEARTBEAT,
    NOBODY,
    Entry,
    KnownEntry,
    SubscriptionEntry,
    View,
    WorkerEntry,
    decode_entry,
    encode_entry,
)
from natsrt.options import Options
from natsrt.transport.connection import Connection, Interest
from natsrt.wire.subjects import Subjects

logger = logging.getLogger("natsrt.registry")

BUCKET = "natsrt_registry"
KNOWN_TTL = 36 * 3600
"""Seconds a type stays known without a worker that confirms it; confirmed every 12 hours, so 24 hours at least."""
_KNOWN_REFRESH = 12 * 3600
_MARKER_TTL = 60.0
_TOMBSTONE_TTL = 3600
_FETCH = 500
_WRITES_AT_ONCE = 256
_RETRY_FOR = 5.0
_LIST_AT_MOST = 20

_NEEDED = {
    "open": ("$js.api.info", "$js.api.stream.info.", "$js.api.stream.create."),
    "read": ("$js.api.consumer.", "$js.api.direct."),
    "write to": ("$kv.", "$js.api.stream.purge."),
}
"""The subjects that an operation publishes to. A refusal shows only in the client's log: this tells whose it is."""

_MARKER = "Nats-Marker-Reason"
_OPERATION = "KV-Operation"
_TTL = "Nats-TTL"

T = TypeVar("T")


class Registry:
    """One runtime's part in the registry. Implements `natsrt.transport.calls.Directory`; a connection `Listener`.

    ``on_rules_changed(agent_type)`` is called when the subscriptions in force for a type may have changed;
    ``on_removed(entry)`` when another runtime removed a subscription that this one had declared for nobody.
    ``ask_worker(worker_id)`` tells whether a worker answers on its own subject.
    """

    def __init__(
        self,
        connection: Connection,
        subjects: Subjects,
        options: Options,
        *,
        on_rules_changed: Callable[[str], None],
        on_removed: Callable[[SubscriptionEntry], None],
        ask_worker: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._options = options
        self._on_rules_changed = on_rules_changed
        self._on_removed = on_removed
        self._ask_worker = ask_worker
        self._bucket = subjects.bucket(BUCKET)
        self._stream = f"KV_{self._bucket}"
        self._kv = f"$KV.{self._bucket}."
        self._feed_prefix = len(subjects.registry_feed) + 1
        self._worker: WorkerEntry | None = None
        self._own: dict[str, Entry] = {}
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._interest: Interest | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._syncing: asyncio.Task[None] | None = None
        self._collected: list[Msg] | None = None
        self._guarded: dict[asyncio.Future[PermissionDenied], str] = {}
        self._open = False
        self._examined: set[str] = set()
        self._may_remove = True
        self._synced = asyncio.Event()
        self._departed_at = float("-inf")
        self._generation = 0
        self._reading = asyncio.Lock()
        self.view = View()
        connection.add_listener(self)
        connection.on_denied(self._on_denied)

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
            await self._guard("open", self._ensure_bucket)
            await self._read_snapshot()
        except BaseException:
            self._open = False
            raise
        self._run(self._look_after_others())
        self._synced.set()

    async def leave(self) -> None:
        """Stop being a worker: what it declared is removed, and following goes on."""
        worker, self._worker = self._worker, None
        self._own.clear()
        if worker is not None:
            await self._remove_worker(worker.worker_id)

    async def close(self) -> None:
        """Leave, if that can still be done, and stop following. Harmless when closed."""
        self._open = False
        self._synced.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
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
        self._run(self._heartbeats(worker))

    async def declare(self, entries: Sequence[Entry]) -> None:
        """Store ``entries`` as this runtime's own; they are stored again whenever they vanish."""
        revisions = []
        for start in range(0, len(entries), _WRITES_AT_ONCE):
            chunk = entries[start : start + _WRITES_AT_ONCE]
            revisions += await asyncio.gather(*(self._write(entry) for entry in chunk))
        if revisions:
            await self.shown(max(revisions))
        for entry in entries:
            self._own[entry.key] = entry

    async def withdraw(self, keys: Sequence[str]) -> None:
        """Delete entries."""
        for key in keys:
            self._own.pop(key, None)
        revisions = await asyncio.gather(*(self._delete(key) for key in keys))
        if revisions:
            await self.shown(max(revisions))

    def revision_of(self, key: str) -> int:
        """The revision of an entry in the view; 0 if it is not there."""
        present = self.view.entries.get(key)
        return present[0] if present is not None else 0

    async def _write(self, entry: Entry) -> int:
        ttl = KNOWN_TTL if isinstance(entry, KnownEntry) else None
        subject, value = self._kv + entry.key, encode_entry(entry)
        ack = await self._guard(
            "write to", lambda: self._connection.jetstream.publish(subject, value, stream=self._stream, msg_ttl=ttl)
        )
        return ack.seq

    async def _delete(self, key: str) -> int:
        headers = {_OPERATION: "DEL", _TTL: str(_TOMBSTONE_TTL)}
        ack = await self._guard(
            "write to",
            lambda: self._connection.jetstream.publish(self._kv + key, b"", stream=self._stream, headers=dict(headers)),
        )
        return ack.seq

    async def _remove_worker(self, worker_id: str) -> None:
        """Delete the worker's entry, which every view takes for all its entries, and purge those from the stream.

        Only what is older than the deletion: the worker may be alive after all and declare itself again meanwhile.
        """
        revision = await self._delete(f"{FEED}.worker.{worker_id}")
        for pattern in (f"{FEED}.*.*.{worker_id}", f"{FEED}.*.*.*.{worker_id}", f"{HEARTBEAT}.{worker_id}"):
            await self._guard("write to", partial(self._purge, self._kv + pattern, revision))

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
            self._wake()

    def _change(self, key: str, revision: int, headers: dict[str, str], value: bytes) -> None:
        if _OPERATION in headers or _MARKER in headers:
            own = self._own.get(key)
            if isinstance(own, SubscriptionEntry) and own.declarer == NOBODY:
                del self._own[key]  # somebody removed it, as anybody may
                self._on_removed(own)
            workers = len(self.view.workers)
            touched = self.view.delete(key, revision)
            if len(self.view.workers) < workers:
                self._departed_at = asyncio.get_running_loop().time()
            if self._worker is not None and key == self._worker.key and self._open:
                self._resync()
        else:
            touched = self.view.put(key, revision, decode_entry(key, value))
        for agent_type in touched:
            self._on_rules_changed(agent_type)

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
        js = self._connection.jetstream
        try:
            info = await js.stream_info(self._stream)
            if info.config.republish is None:
                problem = f"the bucket {self._bucket} exists without republishing: it is not natsrt's, so delete it"
                raise RegistryUnavailable("open", problem)
            return
        except nats.js.errors.NotFoundError:
            pass
        try:
            await js.create_key_value(
                api.KeyValueConfig(
                    bucket=self._bucket,
                    description="natsrt: workers, agent types and subscriptions",
                    history=1,
                    direct=True,
                    replicas=self._options.registry_replicas,
                    limit_marker_ttl=_MARKER_TTL,
                    republish=api.RePublish(src=f"{self._kv}{FEED}.>", dest=f"{self._subjects.registry_feed}.>"),
                )
            )
        except nats.js.errors.BadRequestError:  # another runtime created it at the same moment
            await js.stream_info(self._stream)

    async def _read_snapshot(self) -> None:
        """Replace the view by what the stream holds; what the feed brings meanwhile is applied after."""
        async with self._reading:
            await self._replace_view()

    async def _replace_view(self) -> None:
        self._collected = []
        stale = self.view
        try:
            await self._connection.barrier()
            self.view = await self._guard("read", self._load)
            if not stale.workers.keys() <= self.view.workers.keys():
                self._departed_at = asyncio.get_running_loop().time()
        finally:
            collected, self._collected = self._collected, None
            for message in collected:
                try:
                    self._apply(message)
                except CannotDecode as error:
                    logger.warning("%s", error)
        for agent_type in {*stale.declared, *self.view.declared}:
            self._on_rules_changed(agent_type)
        self._wake()

    async def _load(self) -> View:
        js = self._connection.jetstream
        view, alive = View(), set[str]()
        subscription = await js.pull_subscribe(
            f"{self._kv}>",
            stream=self._stream,
            config=api.ConsumerConfig(
                deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
                ack_policy=api.AckPolicy.NONE,
                inactive_threshold=30.0,
                mem_storage=True,
                num_replicas=1,
            ),
        )
        try:
            remaining = (await subscription.consumer_info()).num_pending or 0
            while remaining:
                messages = await subscription.fetch(min(remaining, _FETCH), timeout=self._options.connect_timeout)
                for message in messages:
                    key, headers = message.subject[len(self._kv) :], message.headers or {}
                    revision = message.metadata.sequence.stream
                    if key.startswith(f"{HEARTBEAT}."):
                        if _MARKER not in headers and _OPERATION not in headers:
                            alive.add(key[len(HEARTBEAT) + 1 :])
                    elif _OPERATION in headers or _MARKER in headers:
                        view.delete(key, revision)
                    else:
                        try:
                            view.put(key, revision, decode_entry(key, message.data))
                        except CannotDecode as error:
                            view.applied = max(view.applied, revision)
                            logger.warning("%s", error)
                    remaining = message.metadata.num_pending
        finally:
            await subscription.unsubscribe()
        for worker_id in {*view.workers, *view.of_worker} - alive:  # the latter: whose removal was not finished
            self._run(self._remove_if_dead(worker_id))
        return view

    def _resync(self) -> None:
        """Read everything again. One that is under way is not enough: it may have read before what matters now."""
        self._generation += 1
        if self._syncing is None or self._syncing.done():
            self._syncing = self._run(self._synchronise())

    async def _synchronise(self) -> None:
        """After a reconnect or a gap: bucket, snapshot, own entries. Tries until it succeeds without another one."""
        pause = self._options.reconnect_wait
        while self._open:
            self._synced.clear()
            generation = self._generation
            try:
                await self._guard("open", self._ensure_bucket)
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
            headers={_TTL: f"{max(1, round(self._options.heartbeat_ttl))}s"},
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
        if worker_id in self._examined or not self._may_remove:
            return
        self._examined.add(worker_id)
        try:
            if await self.has_heartbeat(worker_id) or await self._ask_worker(worker_id):
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
        return _MARKER not in (message.headers or {})

    # -- Directory -----------------------------------------------------------------------------------------------

    def subject_of(self, recipient: AgentId) -> str:
        if self.view.instance_holders(recipient.type, recipient.key):
            return self._subjects.instance(recipient.type, recipient.key)
        return self._subjects.agent(recipient.type)

    def worker_subject(self, worker_id: str) -> str:
        return self._subjects.worker(worker_id)

    def workers_of(self, recipient: AgentId) -> Sequence[str]:
        return self.view.workers_of(recipient)

    async def verify(self, recipient: AgentId) -> NatsrtError | None:
        if self.view.workers_of(recipient):
            return None
        await self.catch_up()
        if self.view.workers_of(recipient):
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
            self._run(self._remove_if_dead(worker_id))

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

        await self.shown(await self._guard("read", last))

    # -- errors --------------------------------------------------------------------------------------------------

    def _on_denied(self, denied: PermissionDenied) -> None:
        lowered = denied.subject.lower()
        for waiter, operation in self._guarded.items():
            needed = (*_NEEDED[operation], self._subjects.registry_feed.lower(), self._options.inbox_prefix.lower())
            if lowered.startswith(needed) and not waiter.done():
                waiter.set_result(denied)

    async def _guard(self, operation: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run ``attempt``, again for some seconds where a leader change explains its failure, and name what failed."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _RETRY_FOR
        while True:
            running = asyncio.ensure_future(attempt())
            denied: asyncio.Future[PermissionDenied] = loop.create_future()
            self._guarded[denied] = operation
            try:
                waits: set[asyncio.Future[Any]] = {running, denied}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if denied.done():
                    raise denied.result()
                return running.result()
            except NatsrtError:
                raise
            except nats.js.errors.ServiceUnavailableError:
                if operation == "open":
                    raise JetStreamRequired(self._connection.server) from None
                problem = "JetStream does not answer"
            except (nats.js.errors.NoStreamResponseError, TimeoutError):
                problem = "JetStream does not answer"
            except nats.js.errors.APIError as error:
                if error.err_code == 10039:  # JetStream not enabled for account
                    raise JetStreamRequired(self._connection.server) from None
                if error.code is not None and error.code < 500:
                    raise RegistryUnavailable(operation, error.description or str(error)) from error
                problem = error.description or str(error)
            except (nats.errors.Error, OSError) as error:
                problem = str(error) or type(error).__name__
            finally:
                del self._guarded[denied]
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            if loop.time() > until or not self._connection.connected:
                raise RegistryUnavailable(operation, problem)
            await asyncio.sleep(0.2)

    def _run(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
