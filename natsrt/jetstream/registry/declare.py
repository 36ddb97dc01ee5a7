"""What one runtime declares in the registry: itself as a worker, its types, instances and subscriptions.

A write returns when this runtime's own view contains it, and so everything that was committed before it. What was
declared is stored again whenever it vanishes: a worker that was frozen, or cut off, may have been removed meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from natsrt.jetstream.registry.entries import NOBODY, KnownEntry, RegistryEntry, SubscriptionEntry, WorkerEntry
from natsrt.jetstream.registry.follow import Follower
from natsrt.jetstream.registry.store import RegistryStore


class Declared:
    """The entries of one runtime."""

    def __init__(self, store: RegistryStore, follower: Follower) -> None:
        self._store = store
        self._follower = follower
        self._own: dict[str, RegistryEntry] = {}
        self.worker: WorkerEntry | None = None
        """This runtime as a worker; None while it is none."""

    async def join(self, worker: WorkerEntry) -> None:
        """Become a worker."""
        self.worker = worker
        await self._store.beat(worker.worker_id)
        await self.declare([worker])

    async def drain(self) -> None:
        """Announce that this worker takes no new messages: it finishes what it has."""
        if self.worker is not None:
            self.worker = replace(self.worker, draining=True)
            await self.declare([self.worker])

    async def leave(self) -> None:
        """Stop being a worker: what it declared is removed."""
        worker, self.worker = self.worker, None
        self._own.clear()
        if worker is not None:
            await self._store.remove_worker(worker.worker_id, in_order=True)

    async def declare(self, entries: Sequence[RegistryEntry]) -> None:
        """Store entries as this runtime's own."""
        revision = await self._store.write(entries)
        if revision:
            await self._follower.shown(revision)
        for entry in entries:
            self._own[entry.key] = entry

    async def withdraw(self, keys: Sequence[str]) -> None:
        """Delete entries."""
        for key in keys:
            self._own.pop(key, None)
        revision = await self._store.delete(keys)
        if revision:
            await self._follower.shown(revision)

    async def confirm_known(self) -> None:
        """Store again what this runtime's types handle, which would be forgotten otherwise."""
        await self.declare([entry for entry in self._own.values() if isinstance(entry, KnownEntry)])

    async def restore(self) -> None:
        """Store again what is missing in the view, the worker itself first."""
        entries = self._follower.view.entries
        missing = [entry for key, entry in self._own.items() if key not in entries or entries[key][1] != entry]
        if self.worker is not None:
            await self._store.beat(self.worker.worker_id)
        await self.declare(sorted(missing, key=lambda entry: not isinstance(entry, WorkerEntry)))

    def forget_removed(self, key: str) -> SubscriptionEntry | None:
        """Another runtime may have removed a subscription that nobody has to keep alive. Returns it if it was declared
        here, and does not declare it again; None for every other entry."""
        own = self._own.get(key)
        if isinstance(own, SubscriptionEntry) and own.declarer == NOBODY:
            del self._own[key]
            return own
        return None

    def clear(self) -> None:
        """Forget what was declared, without removing it."""
        self._own.clear()
