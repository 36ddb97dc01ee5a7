"""Subscriptions that no worker has to keep alive: runtimes declared them that do not host the agent type.

Equal ones are one entry, because participants that know nothing of `SubscriptionEntry.declarations` look for one key. A
declaration counts until it is removed, also after its runtime has stopped or died. Two things keep the entry short:
declarations of runtimes that have no heartbeat are dropped if one with the same subscription id is added or removed,
as after a restart, and if there are many.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from natsrt.jetstream.registry.entries import RegistryEntry, SubscriptionEntry
from natsrt.jetstream.registry.store import RegistryStore

_LEFT_BEHIND = 16
"""Declarations of runtimes that are gone which stay in an entry; of more, the latest ones."""


class SharedSubscriptions:
    """Changes the entries that several runtimes may have declared."""

    def __init__(self, store: RegistryStore) -> None:
        self._store = store

    async def add(self, entry: SubscriptionEntry) -> int:
        """Add the declarations of ``entry`` to those that are stored. Returns the revision that contains them."""
        return await self._change(entry, adds=True)

    async def remove(self, entry: SubscriptionEntry) -> int:
        """Remove the declarations of ``entry``, and the stored entry with the last one. Returns its revision then."""
        return await self._change(entry, adds=False)

    async def _change(self, entry: SubscriptionEntry, *, adds: bool) -> int:
        async def changed(present: RegistryEntry | None) -> tuple[SubscriptionEntry, bool] | None:
            before = dict(present.declared) if isinstance(present, SubscriptionEntry) else {}
            others = {runtime: given for runtime, given in before.items() if entry.declared.get(runtime) != given}
            after = await self._shortened(others, entry.declared.values()) | (dict(entry.declared) if adds else {})
            if before == after:
                return None
            latest = next(reversed(after.values()), entry.subscription_id)
            return replace(entry, declarations=after, subscription_id=latest), not after

        return await self._store.change(entry.key, changed)

    async def _shortened(self, declarations: dict[str, str], changed: Collection[str]) -> dict[str, str]:
        """``declarations`` without those of runtimes that are gone which have an id in ``changed``, or are too many."""
        gone = await self._store.without_heartbeat(declarations)
        dropped = {runtime for runtime in gone if declarations[runtime] in changed}
        rest = [runtime for runtime in declarations if runtime in gone and runtime not in dropped]
        dropped.update(rest[:-_LEFT_BEHIND])
        return {runtime: given for runtime, given in declarations.items() if runtime not in dropped}
