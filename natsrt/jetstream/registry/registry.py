"""One runtime's part in the registry: who hosts what, in a JetStream KV bucket, and this runtime's view of it.

`follow` keeps the view, `declare` stores what this runtime announces, `liveness` finds out which workers live. They
are put together here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from autogen_core import AgentId

from natsrt.errors import (
    JetStreamFull,
    NatsrtError,
    NoLiveWorker,
    RegistryUnavailable,
    UndeliveredCall,
    UnknownAgent,
    UnknownAgentType,
)
from natsrt.jetstream.registry.declare import Declared
from natsrt.jetstream.registry.entries import (
    PEER,
    DurableEntry,
    KnownEntry,
    RegistryEntry,
    SubscriptionEntry,
    WorkerEntry,
)
from natsrt.jetstream.registry.follow import Change, Follower
from natsrt.jetstream.registry.integrity import Integrity
from natsrt.jetstream.registry.leftovers import Leftovers
from natsrt.jetstream.registry.liveness import Liveness
from natsrt.jetstream.registry.origin import Origin
from natsrt.jetstream.registry.source import RegistrySource
from natsrt.jetstream.registry.store import BUCKET, DELETED_TTL, KNOWN_TTL, RegistryStore
from natsrt.jetstream.registry.view import Takers, View
from natsrt.jetstream.usage import Usage
from natsrt.options import Options
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.peers import Peers
from natsrt.wire.subjects import Subjects

__all__ = ["BUCKET", "DELETED_TTL", "KNOWN_TTL", "Registry", "RegistryListener"]

logger: logging.Logger = logging.getLogger("natsrt.registry")

_LIST_AT_MOST = 20
"""Names that an error lists at most."""


class RegistryListener:
    """Hears of changes in the registry. A subclass overrides what it needs; nothing here may raise or block."""

    def rules_changed(self, agent_type: str) -> None:
        """The subscriptions in force for a type may have changed."""

    def view_changed(self) -> None:
        """Anything in the view may have changed."""

    def durable_changed(self) -> None:
        """The durable topics are others."""

    def subscription_removed(self, entry: SubscriptionEntry) -> None:
        """Another runtime removed a subscription that this one had declared for nobody."""

    def evicted(self) -> None:
        """Another runtime took this worker for dead and removed it."""


class Registry:
    """The registry as one runtime uses it. Implements `natsrt.transport.call_watch.Directory`."""

    def __init__(self, connection: Connection, subjects: Subjects, options: Options, peers: Peers | None) -> None:
        """``peers`` None: this one only reads. It does not remove dead workers."""
        self._connection = connection
        self._subjects = subjects
        self._ttl = options.heartbeat_ttl
        self._may_ask_peers = True
        connection.on_denied(self._on_denied)
        self._listeners: list[RegistryListener] = []
        self._durable: Mapping[str, DurableEntry] = {}
        """The durable topics that the listeners know."""
        self._rejoined: Callable[[], Awaitable[None]] | None = None
        self.away: bool = False
        """True if other runtimes may have removed this worker, until its entries are stored again and it has learned
        what the others told those that started meanwhile."""
        connection.add_listener(self)
        self._store = RegistryStore(connection, subjects, options)
        self._source = RegistrySource(connection, subjects, options, self._store)
        self._follower = Follower(connection, subjects, options, self._source, self)
        self._declared = Declared(self._store, self._follower)
        self._integrity = Integrity(connection, options, self._store, self._source, self._follower, self._declared)
        self._liveness = Liveness(connection, options, self._store, self._source, self._follower, self._declared, peers)

    def _on_denied(self, denied: Refusal) -> None:
        if denied.operation == "publish to" and denied.subject.lower().startswith(self._subjects.peer("").lower()[:-1]):
            self._may_ask_peers = False

    def add_listener(self, listener: RegistryListener) -> None:
        """Tell ``listener`` of changes from now on."""
        self._listeners.append(listener)

    def on_rejoined(self, function: Callable[[], Awaitable[None]]) -> None:
        """Await ``function`` when this worker may have been removed, and its entries are stored again."""
        self._rejoined = function

    def connection_lost(self) -> None:
        """Part of `Listener`."""

    def connection_made(self) -> None:
        """Part of `Listener`."""
        self.away = self.away or self._declared.is_overdue(self._ttl)

    @property
    def view(self) -> View:
        """The present view. Do not keep it: a new snapshot replaces it."""
        return self._follower.view

    @property
    def synced(self) -> bool:
        """Whether the view is complete and this worker's own entries are stored."""
        return self._follower.synced and not self._integrity.problem

    @property
    def problem(self) -> str:
        """Why it is not `synced`, as a sentence, if that is known; empty if it is not, or if it is synced."""
        return self._integrity.problem or ("" if self._follower.synced else self._follower.problem)

    @property
    def foreign(self) -> Origin | None:
        """Another registry of the namespace, in another JetStream domain; None if none was heard of lately."""
        return self._integrity.foreign

    @property
    def conflict(self) -> str:
        """Why this runtime may not own keyed agents, as sentences: an older registry is in reach. Empty if it may."""
        return self._integrity.conflict

    async def in_step(self) -> None:
        """Wait until `synced` is true."""
        await self._follower.in_step()

    @property
    def usage(self) -> Usage:
        """What is used of the limits of the account and of the bucket, as a worker measures it from time to time."""
        return self._store.reserve.usage

    def full(self, now: float) -> JetStreamFull | None:
        """The last refusal because of a limit, if it is less than a minute ago; ``now`` is the event loop's time."""
        return self._store.full(now)

    @property
    def origin(self) -> Origin | None:
        """Which registry it is; None if that is not known."""
        return self._source.origin

    @property
    def reads_bucket(self) -> bool:
        """True if this runtime reads the registry's bucket itself, and is not told by workers what is in it."""
        return self._source.is_bucket

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Create the bucket if it is missing, and read the snapshot: from a worker if the bucket may not be read.

        Raises `JetStreamRequired`, `PermissionDenied` or `RegistryUnavailable`.
        """
        self._declared.clear()
        await self._follower.open()
        self._liveness.start()
        self._integrity.start()

    async def close(self) -> None:
        """Leave, if that can still be done, and stop following. Harmless when closed."""
        await self._follower.stop()
        await self._integrity.stop()
        await self._liveness.stop()
        if self._connection.connected:
            try:
                await self._declared.leave()
            except NatsrtError as error:
                logger.warning("this worker's entries stay until others remove them: %s", error)
        await self._follower.close()
        self._source.close()

    # -- declaring -----------------------------------------------------------------------------------------------

    async def join(self, worker: WorkerEntry) -> None:
        """Become a worker: stored, kept alive by heartbeats, removed by others when those end.

        Raises `RegistryUnavailable` if an older registry of the namespace is in reach, in another JetStream domain.
        """
        await self.live_as(worker.worker_id)
        await self._declared.join(worker)
        await self._integrity.meet_others()
        if self.conflict:
            raise RegistryUnavailable("join", self.conflict)
        await self._store.reserve.keep()

    async def live_as(self, runtime_id: str) -> None:
        """Have heartbeats under this id from now on, as workers have, and runtimes that declare a subscription without
        hosting its type. Has no effect if it has them."""
        if self._declared.alive_as != runtime_id:
            await self._declared.live_as(runtime_id)
            self._liveness.keep_alive(runtime_id)

    async def drain(self) -> None:
        """Announce that this worker takes no new messages: it finishes what it has."""
        await self._declared.drain()

    async def leave(self) -> None:
        """Stop being a worker: what it declared is removed, and following goes on."""
        await self._declared.leave()

    async def declare(self, entries: Sequence[RegistryEntry]) -> None:
        """Store ``entries`` as this runtime's own; they are stored again whenever they vanish."""
        await self._declared.declare(entries)

    async def withdraw(self, entries: Sequence[RegistryEntry]) -> None:
        """Delete entries, with what is known of types that have no worker left. Other runtimes' declarations stay."""
        await self._declared.withdraw(entries)

    async def remove_durable(self, stream: str, pattern: str) -> None:
        """Make the topics of a pattern of a stream not durable any more."""
        await self._declared.remove_durable(stream, pattern)

    async def leftovers(self, agent_type: str) -> Leftovers:
        """What is stored of an agent type now."""
        await self.catch_up()
        known = KnownEntry(agent_type) if await self._source.now.is_known(agent_type) else None
        return Leftovers.of(agent_type, self.view, known)

    async def forget(self, leftovers: Leftovers) -> None:
        """Delete entries of an agent type that no live worker hosts. A worker that joins meanwhile keeps its own."""
        await self._follower.shown(await self._store.delete(leftovers.keys))
        if leftovers.known is not None:
            await self._store.forget(leftovers.known)

    # -- what the follower sees (FollowerOwner) ------------------------------------------------------------------

    def rules_changed(self, agent_type: str) -> None:
        for listener in self._listeners:
            listener.rules_changed(agent_type)

    def view_changed(self) -> None:
        durable = self._follower.view.durable
        if durable is not self._durable and durable != self._durable:
            self._durable = durable
            for listener in self._listeners:
                listener.durable_changed()
        for listener in self._listeners:
            listener.view_changed()

    def entry_changed(self, change: Change) -> None:
        removed = self._declared.ended(change)
        if removed is not None:
            for listener in self._listeners:
                listener.subscription_removed(removed)
        if self._declared.undone(change) and self._follower.is_open:
            self._follower.resync()
        worker = self._declared.worker
        if worker is not None and change.deletes and change.key == worker.key and self._follower.is_open:
            self.away = True
            for listener in self._listeners:
                listener.evicted()
            self._follower.resync()

    def elsewhere(self, origin: Origin | None, *, is_answer: bool) -> None:
        self._integrity.elsewhere(origin, is_answer=is_answer)

    def workers_without_heartbeat(self, worker_ids: Collection[str]) -> None:
        for worker_id in worker_ids:
            self._liveness.suspect(worker_id)

    async def restore(self, *, everything: bool = False) -> None:
        self.away = self.away or self._declared.is_overdue(self._ttl)
        await self._declared.restore(everything=everything)
        if self.away and self._rejoined is not None:
            await self._rejoined()
        self.away = False

    # -- questions -----------------------------------------------------------------------------------------------

    def is_keyed(self, agent_type: str) -> bool:
        """Whether the type's workers say that it is keyed."""
        return agent_type in self._follower.view.keyed

    def takers(self, topic_type: str) -> Takers:
        """The types that take topics of this type by an ordinary subscription, as far as a publisher must know them."""
        return self._follower.view.takers(topic_type)

    def instance_keys(self, agent_type: str) -> list[str]:
        """The keys of the type's registered instances on live workers, in alphabetical order."""
        view = self._follower.view
        return sorted(key for key in view.instances.get(agent_type, ()) if view.instance_holders(agent_type, key))

    def has_instance(self, agent_type: str, key: str) -> bool:
        """Whether a live worker hosts a registered instance with this key."""
        return bool(self._follower.view.instance_holders(agent_type, key))

    def stays(self, worker_id: str) -> bool:
        """Whether a worker is live, and takes new messages."""
        return self._follower.view.stays(worker_id)

    def lists(self, worker_id: str) -> bool:
        """Whether a worker is live, by the present view."""
        return worker_id in self._follower.view.workers

    def subject_of(self, recipient: AgentId) -> str:
        if self._follower.view.instance_holders(recipient.type, recipient.key):
            return self._subjects.instance(recipient.type, recipient.key)
        return self._subjects.agent(recipient.type)

    def worker_subject(self, worker_id: str) -> str:
        return self._subjects.worker(worker_id)

    def peer_subject(self, worker_id: str) -> str:
        """The subject on which this runtime asks another worker what callers need not ask.

        Workers of older versions are asked on their `worker_subject`, and so is everybody by a user that may not
        publish to the subjects of peers, as the permissions of older versions are.
        """
        if self._may_ask_peers and self.view.understands(worker_id, PEER):
            return self._subjects.peer(worker_id)
        return self._subjects.worker(worker_id)

    def owns_inbox(self, reply: str) -> str | None:
        """The id of the live worker that a reply subject belongs to; None if no worker is known to have it."""
        return self.view.inboxes.get(reply.rpartition(".")[0])

    def workers_of(self, recipient: AgentId) -> Sequence[str]:
        return self._follower.view.workers_of(recipient)

    async def verify(self, recipient: AgentId) -> NatsrtError | None:
        if self.view.takers_of(recipient):
            return None
        name = str(recipient)
        try:
            await self.catch_up()
        except RegistryUnavailable as error:
            if not self._source.says_nobody_lives(error):
                raise
            return UndeliveredCall(name, error.reason)
        if self.view.takers_of(recipient):
            return None
        if self.view.workers_hosting(recipient.type):
            keys = sorted(self.view.instances.get(recipient.type, ()))
            return UnknownAgent(name, [f"{recipient.type}/{key}" for key in keys[:_LIST_AT_MOST]])
        if await self.is_known(recipient.type):
            return NoLiveWorker(name, recipient.type)
        return UnknownAgentType(name, recipient.type, await self.some_known())

    async def is_known(self, agent_type: str) -> bool:
        """True if a worker hosts the type, or hosted it lately. Reads the bucket if none does now."""
        return agent_type in self.view.hosts or await self._source.now.is_known(agent_type)

    async def some_known(self) -> list[str]:
        """The names of types that are known, in their order, 20 at most; those that workers host first."""
        hosted = sorted(self.view.hosts)[:_LIST_AT_MOST]
        others = await self._source.now.some_known(_LIST_AT_MOST) if len(hosted) < _LIST_AT_MOST else []
        return sorted([*hosted, *sorted({*others} - {*hosted})][:_LIST_AT_MOST])

    async def known(self, agent_type: str | None = None) -> dict[str, KnownEntry]:
        """What is known of the types that workers host or hosted lately, or of one type. It is read from the bucket."""
        return await self._source.now.known(agent_type)

    def suspect(self, worker_id: str) -> None:
        if worker_id in self.view.workers:
            self._liveness.suspect(worker_id)

    def all_stayed(self, since: float) -> bool | None:
        if self._follower.departed_at >= since:
            return False
        return True if self.synced else None

    async def has_heartbeat(self, worker_id: str) -> bool:
        """Whether the worker's heartbeat is stored, and has not expired. Raises what nats-py raises."""
        return await self._source.has_heartbeat(worker_id)

    async def shown(self, revision: int) -> None:
        """Wait until the view contains ``revision``. Raises `RegistryUnavailable` when it does not come."""
        await self._follower.shown(revision)

    async def catch_up(self) -> None:
        """Make the view contain everything that is committed now."""
        await self._follower.shown(await self._source.now.last_change())
