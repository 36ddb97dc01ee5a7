"""One runtime's part in the registry: a view of who hosts what, and its own entries in it.

Rules:

1. A runtime reads a snapshot of the bucket, then every committed change in the stream's order (`Follower`).
2. A write returns when this runtime's own view contains it, and so everything that was committed before it
   (`OwnEntries`).
3. A worker sends heartbeats. The other runtimes remove a worker when its heartbeat has expired and it does not answer
   either (`Liveness`).
4. A worker whose entry was removed while it was frozen or cut off declares itself again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from autogen_core import AgentId

from natsrt.errors import NatsrtError, NoLiveWorker, UnknownAgent, UnknownAgentType
from natsrt.jetstream.registry.bucket import RegistryBucket
from natsrt.jetstream.registry.declare import OwnEntries
from natsrt.jetstream.registry.entries import RegistryEntry, SubscriptionEntry, WorkerEntry
from natsrt.jetstream.registry.follow import Follower
from natsrt.jetstream.registry.liveness import Liveness
from natsrt.jetstream.registry.view import View
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.peers import Peers
from natsrt.wire.subjects import Subjects

logger = logging.getLogger("natsrt.registry")

_LIST_AT_MOST = 20
"""Agents or agent types that an error lists."""


class RegistryListener:
    """Is informed of changes in the registry. A subclass overrides what it needs. No method may raise or block."""

    def rules_changed(self, agent_type: str) -> None:
        """The subscriptions in force for a type may have changed."""

    def subscription_removed(self, entry: SubscriptionEntry) -> None:
        """Another runtime removed a subscription that this runtime had declared without being a host of the type."""

    def evicted(self) -> None:
        """Another runtime considered this worker dead, and removed it."""


class Registry:
    """One runtime's part in the registry.

    Implements `natsrt.transport.calls.Directory`, and listens to its own `Follower`. What happens between following,
    declaring and liveness is decided here; those parts do not call each other back.
    """

    def __init__(self, connection: Connection, subjects: Subjects, options: Options, peers: Peers) -> None:
        self._connection = connection
        self._subjects = subjects
        self._listeners: list[RegistryListener] = []
        bucket = RegistryBucket(connection, subjects, options)
        self._follower = Follower(connection, bucket, options)
        self._own = OwnEntries(bucket, self._follower)
        self._liveness = Liveness(connection, bucket, self._follower, self._own, peers, options)
        self._follower.add_listener(self)

    def add_listener(self, listener: RegistryListener) -> None:
        self._listeners.append(listener)

    @property
    def view(self) -> View:
        """The registry as this runtime sees it now. Do not keep it: a resync replaces it."""
        return self._follower.view

    @property
    def synced(self) -> bool:
        """Whether the view is complete and this worker's own entries are stored."""
        return self._follower.synced

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Create the bucket if it is missing, read the snapshot, and check from time to time that other workers live.

        Raises `JetStreamRequired`, `PermissionDenied` or `RegistryUnavailable`.
        """
        await self._follower.open()
        self._liveness.start()

    async def close(self) -> None:
        """Stop following, and leave if the connection still allows that. Harmless when closed."""
        await self._liveness.stop()
        await self._follower.close()
        if self._connection.connected:
            try:
                await self.leave()
            except NatsrtError as error:
                logger.warning("this worker's entries stay until others remove them: %s", error)

    # -- this runtime's entries ----------------------------------------------------------------------------------

    async def join(self, worker: WorkerEntry) -> None:
        """Become a worker: stored, and kept alive by heartbeats until it leaves."""
        await self._own.join(worker)
        self._liveness.keep_alive(worker)

    async def drain(self) -> None:
        """Announce that this worker takes no new messages, and only finishes those that it has."""
        await self._own.drain()

    async def leave(self) -> None:
        """Stop being a worker: what it declared is deleted. This runtime still follows the registry."""
        await self._own.leave()

    async def declare(self, entries: Sequence[RegistryEntry]) -> None:
        """Store ``entries`` as this runtime's own. They are stored again whenever they vanish."""
        await self._own.declare(entries)

    async def withdraw(self, keys: Sequence[str]) -> None:
        """Delete entries."""
        await self._own.withdraw(keys)

    # -- following -----------------------------------------------------------------------------------------------

    async def shown(self, revision: int) -> None:
        """Wait until the view contains ``revision``.

        Raises `RegistryUnavailable` if it does not arrive within ``subscription_timeout`` seconds.
        """
        await self._follower.shown(revision)

    async def catch_up(self) -> None:
        """Wait until the view contains everything that is committed now."""
        await self._follower.catch_up()

    def rules_changed(self, agent_type: str) -> None:
        for listener in self._listeners:
            listener.rules_changed(agent_type)

    def entry_deleted(self, key: str) -> None:
        if (subscription := self._own.give_up(key)) is not None:
            for listener in self._listeners:
                listener.subscription_removed(subscription)
        worker = self._own.worker
        if worker is not None and key == worker.key and self._follower.is_open:
            for listener in self._listeners:
                listener.evicted()
            self._follower.resync()

    def heartbeat_missing(self, worker_id: str) -> None:
        self._liveness.examine(worker_id)

    async def restore(self) -> None:
        await self._own.restore()

    # -- questions -----------------------------------------------------------------------------------------------

    def is_keyed(self, agent_type: str) -> bool:
        """Whether the workers of a type declare it as keyed."""
        return agent_type in self._follower.view.keyed

    def keyed_takers(self, topic_type: str) -> tuple[str, ...]:
        """The keyed types that get events of this topic type through a subscription that is not custom."""
        return self._follower.view.keyed_takers(topic_type)

    def stays(self, worker_id: str) -> bool:
        """Whether a worker is live, and takes new messages."""
        return self._follower.view.stays(worker_id)

    def lists(self, worker_id: str) -> bool:
        """Whether a worker is live, according to the present view."""
        return worker_id in self._follower.view.workers

    # -- Directory -----------------------------------------------------------------------------------------------

    def subject_of(self, recipient: AgentId) -> str:
        if self._follower.view.instance_holders(recipient.type, recipient.key):
            return self._subjects.instance(recipient.type, recipient.key)
        return self._subjects.agent(recipient.type)

    def worker_subject(self, worker_id: str) -> str:
        return self._subjects.worker(worker_id)

    def workers_of(self, recipient: AgentId) -> Sequence[str]:
        return self._follower.view.workers_of(recipient)

    async def verify(self, recipient: AgentId) -> NatsrtError | None:
        if self.view.takers_of(recipient):
            return None
        await self.catch_up()
        view = self.view
        if view.takers_of(recipient):
            return None
        name = str(recipient)
        if view.workers_hosting(recipient.type):
            keys = sorted(view.instances.get(recipient.type, ()))
            return UnknownAgent(name, [f"{recipient.type}/{key}" for key in keys[:_LIST_AT_MOST]])
        if view.is_known(recipient.type):
            return NoLiveWorker(name, recipient.type)
        known = sorted({*view.known, *view.hosts})
        return UnknownAgentType(name, recipient.type, known[:_LIST_AT_MOST])

    def suspect(self, worker_id: str) -> None:
        if self.lists(worker_id):
            self._liveness.examine(worker_id)

    def all_stayed(self, since: float) -> bool:
        return self._follower.all_stayed(since)
