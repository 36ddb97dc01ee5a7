"""What the registry keeps of one agent type: what `natsrt agents forget` removes. Pure values: no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from natsrt.jetstream.registry.entries import InstanceEntry, KnownEntry, RegistryEntry, SubscriptionEntry, TypeEntry
from natsrt.jetstream.registry.view import View


@dataclass(frozen=True, slots=True)
class Leftovers:
    """The entries of one agent type, by kind; ``known`` is None if the type is not known.

    ``workers`` are the live workers that host the type; while there are some, these entries are in use.
    """

    agent_type: str
    workers: tuple[str, ...]
    known: KnownEntry | None
    hosts: tuple[TypeEntry, ...]
    instances: tuple[InstanceEntry, ...]
    subscriptions: tuple[SubscriptionEntry, ...]

    def __bool__(self) -> bool:
        return self.known is not None or bool(self.keys)

    @property
    def keys(self) -> list[str]:
        """The keys of all entries, except that of what is known."""
        entries: list[RegistryEntry] = [*self.hosts, *self.instances, *self.subscriptions]
        return [entry.key for entry in entries]

    @classmethod
    def of(cls, agent_type: str, view: View, known: KnownEntry | None) -> Leftovers:
        """Those in ``view``. Entries of workers that are gone are among them."""
        hosts = view.hosts.get(agent_type, {})
        instances = view.instances.get(agent_type, {}).values()
        rules = view.declared.get(agent_type, {}).values()
        return cls(
            agent_type,
            tuple(sorted(view.live(hosts))),
            known,
            tuple(hosts.values()),
            tuple(entry for holders in instances for entry in holders.values()),
            tuple(entry for declarers in rules for entry in declarers.values()),
        )
