"""What one runtime declares in the registry: itself as a worker, its types, instances and subscriptions.

A write returns when this runtime's own view contains it, and so everything that was committed before it. What was
declared is stored again whenever it vanishes: a worker that was frozen, or cut off, may have been removed meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from natsrt.errors import NatsrtError
from natsrt.jetstream.registry.durable import SharedTopics
from natsrt.jetstream.registry.entries import (
    DurableEntry,
    KnownEntry,
    RegistryEntry,
    SubscriptionEntry,
    TypeEntry,
    WorkerEntry,
)
from natsrt.jetstream.registry.follow import Change, Follower
from natsrt.jetstream.registry.origin import ANSWER
from natsrt.jetstream.registry.shared import SharedSubscriptions
from natsrt.jetstream.registry.store import Last, RegistryStore

logger: logging.Logger = logging.getLogger("natsrt.registry")


class Declared:
    """The entries of one runtime."""

    def __init__(self, store: RegistryStore, follower: Follower) -> None:
        self._store = store
        self._follower = follower
        self._shared = SharedSubscriptions(store)
        self._topics = SharedTopics(store)
        self._own: dict[str, RegistryEntry] = {}
        self._lost: set[str] = set()
        """Keys of own entries that the view does not have, and that were deleted."""
        self.worker: WorkerEntry | None = None
        """This runtime as a worker; None while it is none."""
        self.alive_as: str | None = None
        """The id under which this runtime has a heartbeat; None if it needs none."""
        self.beaten_at: float = float("-inf")
        """The event loop's time at which it was known that a heartbeat is stored."""

    def is_overdue(self, ttl: float) -> bool:
        """True if this runtime is a worker whose last heartbeat has expired, ``ttl`` seconds after it was stored."""
        return self.worker is not None and asyncio.get_running_loop().time() > self.beaten_at + ttl

    @property
    def is_empty(self) -> bool:
        """True if this runtime has nothing in the registry."""
        return not self._own

    async def join(self, worker: WorkerEntry) -> None:
        """Become a worker."""
        self.worker = worker
        await self.declare([worker])

    async def live_as(self, runtime_id: str) -> None:
        """Have a heartbeat from now on."""
        self.alive_as = runtime_id
        await self.beat()

    async def beat(self) -> None:
        """Store the heartbeat, if this runtime has one."""
        if self.alive_as is not None:
            await self._store.beat(self.alive_as)
            self.beaten_at = asyncio.get_running_loop().time()

    async def announce(self, *, is_answer: bool) -> None:
        """Store this worker again, unchanged, so that runtimes in other JetStream domains hear of its registry.

        An answer to one of theirs is not answered in turn.
        """
        if self.worker is not None:
            await self._store.write([self.worker], {ANSWER: "1"} if is_answer else None)

    async def drain(self) -> None:
        """Announce that this worker takes no new messages: it finishes what it has."""
        if self.worker is not None:
            self.worker = replace(self.worker, draining=True)
            await self.declare([self.worker])

    async def leave(self) -> None:
        """Stop being a worker, and alive. What this runtime declared is removed, except the subscriptions that no
        worker has to keep alive.
        """
        worker, self.worker = self.worker, None
        alive_as, self.alive_as = self.alive_as, None
        known = [entry for entry in self._own.values() if isinstance(entry, KnownEntry)]
        self.clear()
        if worker is not None:
            await self._retire(known, await self._store.remove_worker(worker.worker_id, in_order=True))
        elif alive_as is not None:
            await self._store.end_heartbeat(alive_as)

    async def declare(self, entries: Sequence[RegistryEntry]) -> None:
        """Store entries as this runtime's own. Those that are stored already keep their revisions."""
        await self._write([entry for entry in entries if self._own.get(entry.key) != entry or self._is_missing(entry)])

    async def withdraw(self, entries: Sequence[RegistryEntry]) -> None:
        """Delete entries, with what is known of types that have no worker left. Other runtimes' declarations stay."""
        types = {entry.agent_type for entry in entries if isinstance(entry, TypeEntry)}
        known = [entry for entry in self._own.values() if isinstance(entry, KnownEntry) and entry.agent_type in types]
        for entry in (*entries, *known):
            self._own.pop(entry.key, None)
        shared, _, others = _parted(entries)
        removals = (self._shared.remove(entry) for entry in shared)
        revision = max(await asyncio.gather(self._store.delete([entry.key for entry in others]), *removals))
        await self._follower.shown(revision)
        await self._retire(known, revision)

    async def remove_durable(self, stream: str, pattern: str) -> None:
        """Make the topics of a pattern not durable any more, whoever declared them."""
        await self._follower.shown(await self._topics.remove(stream, pattern))

    async def _write(self, entries: Sequence[RegistryEntry]) -> None:
        shared, durable, others = _parted(entries)
        additions = [*map(self._shared.add, shared), *map(self._topics.add, durable)]
        await self._follower.shown(max(await asyncio.gather(self._store.write(others), *additions)))
        for entry in entries:
            self._own[entry.key] = entry
            self._lost.discard(entry.key)

    async def _retire(self, known: Sequence[KnownEntry], revision: int) -> None:
        """End what is known of types that have no worker at ``revision``, at which this one does not host them.

        Of several workers that leave at the same time, the one whose deletion is stored last finds no other.
        """
        if not known:
            return
        try:
            await self._follower.shown(revision)
            view = self._follower.view
            await self._store.retire([entry for entry in known if not view.live(view.hosts.get(entry.agent_type, ()))])
        except NatsrtError as error:
            logger.debug("%d agent types stay known for a day: %s", len(known), error)

    async def confirm_known(self) -> None:
        """Store again what this runtime's types handle, which would be forgotten otherwise."""
        await self._write([entry for entry in self._own.values() if isinstance(entry, KnownEntry)])

    async def restore(self, *, everything: bool = False) -> None:
        """Store again what is missing in the view, or everything; the worker itself first."""
        missing = [entry for entry in self._own.values() if everything or self._is_missing(entry)]
        await self.store_again(missing)

    async def store_again(self, entries: Sequence[RegistryEntry]) -> None:
        """Store own entries again, and the heartbeat; the worker itself first."""
        await self.beat()
        await self._write(sorted(entries, key=lambda entry: not isinstance(entry, WorkerEntry)))

    async def vanished(self) -> list[RegistryEntry]:
        """Own entries that are not stored any more, as after a purge: the feed does not announce that.

        Also those that somebody deleted to whom they do not belong. A deletion of what several runtimes declare, or of
        what is known of a type, is not among them: `ended` and `undone` decide about it.
        """
        own = {key: (entry, self._follower.view.revision_of(key)) for key, entry in self._own.items()}
        stored = await self._store.revisions(own)
        return [
            entry
            for key, (entry, revision) in own.items()
            if self._own.get(key) is entry and self._has_vanished(entry, revision, stored.get(key))
        ]

    @staticmethod
    def _has_vanished(entry: RegistryEntry, revision: int, stored: Last | None) -> bool:
        if stored is None or stored.revision < revision:  # the latter after an old copy of the bucket was restored
            return True
        others_may = isinstance(entry, KnownEntry | DurableEntry) or (
            isinstance(entry, SubscriptionEntry) and entry.is_shared
        )
        return stored.deleted and not others_may

    def _is_missing(self, entry: RegistryEntry) -> bool:
        """True if an own entry is not stored, by the present view, or is not certain to be."""
        if isinstance(entry, KnownEntry):  # the view does not have it; what lost the type may have lost this too
            worker_id = "" if self.worker is None else self.worker.worker_id
            return entry.key in self._lost or worker_id not in self._follower.view.hosts.get(entry.agent_type, ())
        present = self._follower.view.entry(entry.key)
        if isinstance(entry, SubscriptionEntry) and isinstance(present, SubscriptionEntry) and entry.is_shared:
            return not present.includes(entry)
        return present != entry

    # -- what other runtimes change --------------------------------------------------------------------------------

    def ended(self, change: Change) -> SubscriptionEntry | None:
        """The subscription without a declarer that this runtime declared and another one removed by ``change``. It is
        not declared again. None if the change is another one.
        """
        own = self._own.get(change.key)
        if not isinstance(own, SubscriptionEntry) or not own.is_shared or self._overwrites(change):
            return None
        before, after = change.before, change.after
        was_there = change.deletes or (isinstance(before, SubscriptionEntry) and before.includes(own))
        if not was_there or (isinstance(after, SubscriptionEntry) and after.includes(own)):
            return None
        del self._own[change.key]
        return own

    def undone(self, change: Change) -> bool:
        """True if ``change`` took away what this runtime has to store again with `restore`."""
        own = self._own.get(change.key)
        if isinstance(own, KnownEntry) and change.deletes:  # by a worker that did not see yet that this one hosts it
            self._lost.add(change.key)
            return True
        return isinstance(own, SubscriptionEntry) and own.is_shared and self._overwrites(change)

    def _overwrites(self, change: Change) -> bool:
        """True if a runtime that knows nothing of other runtimes' declarations stored its own."""
        return isinstance(change.after, SubscriptionEntry) and not change.after.declarations

    def clear(self) -> None:
        """Forget what was declared, without removing it."""
        self._own.clear()
        self._lost.clear()


def _parted(
    entries: Sequence[RegistryEntry],
) -> tuple[list[SubscriptionEntry], list[DurableEntry], list[RegistryEntry]]:
    """The subscriptions and the durable topics that several runtimes may declare, and the other entries."""
    shared = [entry for entry in entries if isinstance(entry, SubscriptionEntry) and entry.is_shared]
    durable = [entry for entry in entries if isinstance(entry, DurableEntry)]
    keys = {entry.key for entry in shared} | {entry.key for entry in durable}
    return shared, durable, [entry for entry in entries if entry.key not in keys]
