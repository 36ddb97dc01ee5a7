"""Subscriptions that no worker has to keep alive: runtimes declared them that do not host the agent type.

Equal ones are one entry, because participants that know nothing of `SubscriptionEntry.declarations` look for one key. A
declaration counts until it is removed, also after its runtime has stopped or died. Two things keep the entry short:
declarations of runtimes that have no heartbeat are dropped if one with the same subscription id is added or removed,
as after a restart, and if there are many.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection
from dataclasses import replace

from natsrt.errors import RegistryUnavailable
from natsrt.jetstream.registry.entries import SubscriptionEntry
from natsrt.jetstream.registry.store import RegistryStore
from natsrt.jetstream.requests import WRITE

_LEFT_BEHIND = 16
"""Declarations of runtimes that are gone which stay in an entry; of more, the latest ones."""
_LONGEST_PAUSE = 0.02
"""Seconds at most until the next attempt, if another runtime changed the entry first."""
_RETRY_FOR = 10.0
"""Seconds for which a change is tried that other runtimes precede."""


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
        until = asyncio.get_running_loop().time() + _RETRY_FOR
        while True:
            revision, present = await self._store.present(entry.key)
            before = dict(present.declared) if isinstance(present, SubscriptionEntry) else {}
            others = {runtime: given for runtime, given in before.items() if entry.declared.get(runtime) != given}
            after = await self._shortened(others, entry.declared.values()) | (dict(entry.declared) if adds else {})
            if before == after:
                return revision
            latest = next(reversed(after.values()), entry.subscription_id)
            new = replace(entry, declarations=after, subscription_id=latest)
            written = await self._store.replace(new, revision, gone=not after)
            if written is not None:
                return written
            if asyncio.get_running_loop().time() > until:
                raise RegistryUnavailable(WRITE, f"other runtimes always change {entry.key} first")
            await asyncio.sleep(random.uniform(0, _LONGEST_PAUSE))

    async def _shortened(self, declarations: dict[str, str], changed: Collection[str]) -> dict[str, str]:
        """``declarations`` without those of runtimes that are gone which have an id in ``changed``, or are too many."""
        gone = await self._store.without_heartbeat(declarations)
        dropped = {runtime for runtime in gone if declarations[runtime] in changed}
        rest = [runtime for runtime in declarations if runtime in gone and runtime not in dropped]
        dropped.update(rest[:-_LEFT_BEHIND])
        return {runtime: given for runtime, given in declarations.items() if runtime not in dropped}
