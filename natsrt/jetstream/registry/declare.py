"""The entries that this runtime declares: storing them, deleting them, and storing them again after they were lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from natsrt.jetstream.registry.bucket import RegistryBucket
from natsrt.jetstream.registry.entries import NOBODY, KnownEntry, RegistryEntry, SubscriptionEntry, WorkerEntry
from natsrt.jetstream.registry.follow import Follower

_WRITES_AT_ONCE = 256
"""Entries that are stored at a time."""


class OwnEntries:
    """What this runtime has in the registry.

    A write returns when this runtime's view contains it, and so everything that was committed before it. Each method
    that waits raises as `RegistryBucket` and `Follower.shown` do.
    """

    def __init__(self, bucket: RegistryBucket, follower: Follower) -> None:
        self._bucket = bucket
        self._follower = follower
        self._entries: dict[str, RegistryEntry] = {}
        self.worker: WorkerEntry | None = None
        """This worker; None while this runtime is no worker."""

    async def join(self, worker: WorkerEntry) -> None:
        """Become a worker: send the first heartbeat, and store the worker's own entry."""
        self.worker = worker
        await self._bucket.beat(worker.worker_id)
        await self.declare([worker])

    async def drain(self) -> None:
        """Announce that this worker takes no new messages, and only finishes those that it has."""
        if self.worker is not None:
            self.worker = replace(self.worker, draining=True)
            await self.declare([self.worker])

    async def leave(self) -> None:
        """Stop being a worker, and delete what it declared. Harmless where this runtime is no worker."""
        worker, self.worker = self.worker, None
        self._entries.clear()
        if worker is not None:
            await self._bucket.remove_worker(worker.worker_id, in_order=True)

    async def declare(self, entries: Sequence[RegistryEntry]) -> None:
        """Store ``entries`` as this runtime's own."""
        revision = 0
        for start in range(0, len(entries), _WRITES_AT_ONCE):
            revision = max(revision, await self._bucket.put(entries[start : start + _WRITES_AT_ONCE]))
        await self._follower.shown(revision)
        for entry in entries:
            self._entries[entry.key] = entry

    async def withdraw(self, keys: Sequence[str]) -> None:
        """Delete entries, whether they are this runtime's own or not."""
        for key in keys:
            self._entries.pop(key, None)
        await self._follower.shown(await self._bucket.delete(keys))

    async def restore(self) -> None:
        """Store the own entries again that the view lacks or has otherwise. The worker's own entry is first."""
        view = self._follower.view
        missing = [
            entry for key, entry in self._entries.items() if key not in view.entries or view.entries[key][1] != entry
        ]
        if self.worker is not None:
            await self._bucket.beat(self.worker.worker_id)
        await self.declare(sorted(missing, key=lambda entry: not isinstance(entry, WorkerEntry)))

    async def refresh_known(self) -> None:
        """Store the `KnownEntry` entries again, before they expire."""
        await self.declare([entry for entry in self._entries.values() if isinstance(entry, KnownEntry)])

    def give_up(self, key: str) -> SubscriptionEntry | None:
        """Drop a subscription without a declarer that another runtime has deleted, as any runtime may.

        Returns it; None if ``key`` is no such subscription. Other own entries stay: `restore` stores them again.
        """
        entry = self._entries.get(key)
        if isinstance(entry, SubscriptionEntry) and entry.declarer == NOBODY:
            del self._entries[key]
            return entry
        return None
