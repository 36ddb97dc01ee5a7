"""The durable topics of a namespace: runtimes declare them together, and must agree on them.

Each stream has one entry, which several runtimes extend by patterns. They never remove one, since events on its topics
may be stored, and not handled yet: an operator does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from natsrt.durable_types import overlaps
from natsrt.errors import DurableConflict
from natsrt.jetstream.registry.entries import DurableEntry, RegistryEntry
from natsrt.jetstream.registry.store import RegistryStore

_POLICY = tuple(field.name for field in fields(DurableEntry) if field.name not in ("stream", "patterns", "name"))


def check_agreement(declared: Mapping[str, DurableEntry], own: DurableEntry) -> None:
    """Raise `DurableConflict` if ``own`` contradicts what is declared already, by stream."""
    present = declared.get(own.stream)
    if present is not None:
        for setting in _POLICY:
            there, here = getattr(present, setting), getattr(own, setting)
            if there != here:
                raise DurableConflict(
                    own.stream,
                    f"the stream {own.stream} ({', '.join(present.patterns)}) is declared with {setting} {_said(there)}"
                    f", and {', '.join(own.patterns)} here with {_said(here)}: use the same in all runtimes, or give "
                    "these topics another name",
                )
    patterns = [(pattern, entry) for entry in (own, *declared.values()) for pattern in entry.patterns]
    for pair in overlaps(patterns):
        mine, theirs = pair if pair[0][1] is own else pair[::-1]
        if mine[1] is not own or theirs[1] is own or (mine[0] == theirs[0] and theirs[1].stream == own.stream):
            continue
        stream = theirs[1].stream
        raise DurableConflict(
            stream,
            f"{mine[0]!r} (for the stream {own.stream}) overlaps {theirs[0]!r}, which is declared for the stream "
            f"{stream}: use the same in all runtimes",
        )


def _said(value: object) -> str:
    return "none" if value is None else f"{value:.15g}" if isinstance(value, float) else str(value)


class SharedTopics:
    """Changes the entries of durable topics."""

    def __init__(self, store: RegistryStore) -> None:
        self._store = store

    async def add(self, entry: DurableEntry) -> int:
        """Add the patterns of ``entry`` to those that are stored. Returns the revision that contains them.

        Raises `DurableConflict` if another policy, or an overlapping pattern, is stored for the stream.
        """

        async def added(present: RegistryEntry | None) -> tuple[DurableEntry, bool] | None:
            if not isinstance(present, DurableEntry):
                return entry, False
            check_agreement({present.stream: present}, entry)
            if present.includes(entry):
                return None
            return replace(entry, patterns=tuple(dict.fromkeys((*present.patterns, *entry.patterns)))), False

        return await self._store.change(entry.key, added)

    async def remove(self, stream: str, pattern: str) -> int:
        """Remove a pattern from those that are stored for a stream, and the entry with its last one. Returns the
        revision of which that is true.
        """

        async def removed(present: RegistryEntry | None) -> tuple[DurableEntry, bool] | None:
            if not isinstance(present, DurableEntry) or pattern not in present.patterns:
                return None
            left = tuple(other for other in present.patterns if other != pattern)
            return replace(present, patterns=left), not left

        return await self._store.change(DurableEntry(stream, ()).key, removed)
