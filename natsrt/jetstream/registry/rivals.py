"""What excludes one another: entries that two workers must not both have. Pure values: no I/O.

The workers of a type are one queue group. So they must agree whether it is keyed, and whether it has a factory or
registered instances; and an instance has one worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from natsrt.jetstream.registry.entries import InstanceEntry, RegistryEntry, TypeEntry
from natsrt.jetstream.registry.view import View


@dataclass(frozen=True, slots=True)
class Rival:
    """An entry of another worker which excludes one of this worker."""

    worker_id: str
    """The other worker."""
    reason: str
    """Why both cannot be, as a sentence."""
    came_first: bool
    """True if the other entry was stored before the own one, or if the own one is not stored."""
    yields: bool
    """True if the other entry will be withdrawn: a third worker's, which came before it, excludes it."""


def rivals(view: View, entries: Sequence[RegistryEntry]) -> list[Rival]:
    """Return what excludes ``entries`` of one worker, in their order. They need not be stored."""
    return [rival for entry in entries for rival in _rivals_of(view, entry)]


def _rivals_of(view: View, own: RegistryEntry) -> list[Rival]:
    others: list[TypeEntry | InstanceEntry]
    if isinstance(own, TypeEntry):
        hosting = view.hosts.get(own.agent_type, {})
        others = [hosting[worker_id] for worker_id in view.workers_hosting(own.agent_type)]
    elif isinstance(own, InstanceEntry):
        holding = view.instances.get(own.agent_type, {}).get(own.agent_key, {})
        others = [holding[worker_id] for worker_id in view.live(holding)]
    else:
        return []
    since, found = view.revision_of(own.key), []
    for there in others:
        reason = _conflict(own, there)
        if reason is not None:
            there_since = view.revision_of(there.key)
            before_it = [other for other in others if view.revision_of(other.key) < there_since]
            yields = any(_conflict(there, other) is not None for other in before_it)
            found.append(Rival(there.worker_id, reason, not since or there_since < since, yields))
    return found


def _conflict(here: TypeEntry | InstanceEntry, there: TypeEntry | InstanceEntry) -> str | None:
    """Why one worker cannot have ``here`` while another one has ``there``; None if both can be."""
    if here.worker_id == there.worker_id:
        return None
    if isinstance(there, InstanceEntry):
        return f"Agent with id {here.agent_type}/{there.agent_key} already exists on worker {there.worker_id}."
    if isinstance(here, InstanceEntry):
        return None
    if here.instances != there.instances:
        return (
            f"Agent factories and agent instances cannot be registered to the same type: {here.agent_type!r} has "
            f"{'instances' if there.instances else 'a factory'} on worker {there.worker_id}."
        )
    if here.keyed != there.keyed:
        is_there, is_here = ("keyed", "not keyed") if there.keyed else ("not keyed", "keyed")
        return (
            f"The agent type {here.agent_type!r} is {is_there} on worker {there.worker_id}, so it cannot be {is_here} "
            "here."
        )
    return None
