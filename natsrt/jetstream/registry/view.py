"""The registry as one runtime sees it. Pure values: no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from autogen_core import AgentId

from natsrt.durable_types import covers
from natsrt.jetstream.registry.entries import (
    NOBODY,
    DurableEntry,
    InstanceEntry,
    KnownEntry,
    RegistryEntry,
    Rule,
    SubscriptionEntry,
    TypeEntry,
    WorkerEntry,
)

_REMEMBERED = 32_768
"""Topic types whose takers, or streams, are remembered; some megabytes each."""


class Takers(NamedTuple):
    """Agent types that take events of one topic type, each in alphabetical order."""

    keyed: tuple[str, ...]
    """Keyed types."""
    instances: tuple[str, ...]
    """Types that exist as registered instances only."""


NO_TAKERS: Final = Takers((), ())


@dataclass(slots=True)
class View:
    """The registry as one runtime sees it: a snapshot, then every change in the stream's order."""

    applied: int = 0
    """The stream sequence up to which the view is complete."""
    entries: dict[str, tuple[int, RegistryEntry]] = field(default_factory=dict)
    workers: dict[str, WorkerEntry] = field(default_factory=dict)
    hosts: dict[str, dict[str, TypeEntry]] = field(default_factory=dict)
    instances: dict[str, dict[str, dict[str, InstanceEntry]]] = field(default_factory=dict)
    declared: dict[str, dict[Rule, dict[str, SubscriptionEntry]]] = field(default_factory=dict)
    of_worker: dict[str, set[str]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why entries count for nothing, by key: they lack a field, for example."""
    inboxes: dict[str, str] = field(default_factory=dict)
    """The live workers by the starts of their reply subjects, as far as they say them."""
    keyed: set[str] = field(default_factory=set)
    """The agent types whose workers say that they are keyed."""
    durable: Mapping[str, DurableEntry] = field(default_factory=dict)
    """The durable topics, by the names of their streams. Each change replaces the mapping."""
    _streams: dict[str, str | None] = field(default_factory=dict)
    """What `durable_stream` returned since the durable topics last changed."""
    _takers: dict[str, Takers] = field(default_factory=dict)
    """What `takers` returned since the last change."""

    def saw(self, revision: int) -> None:
        """A change was seen, whether it can be read or not."""
        self.applied = max(self.applied, revision)
        self._takers.clear()

    def put(self, key: str, revision: int, entry: RegistryEntry) -> set[str]:
        """Apply one change; an older revision changes nothing. Returns the agent types whose subscriptions changed.

        What is known of types is not kept: they may be many, and only a call that finds no worker asks for one.
        """
        self.saw(revision)
        self.unreadable.pop(key, None)
        present = self.entries.get(key)
        if isinstance(entry, KnownEntry) or (present is not None and present[0] >= revision):
            return set()
        self.entries[key] = (revision, entry)
        match entry:
            case WorkerEntry():
                self.workers[entry.worker_id] = entry
                if entry.inbox:
                    self.inboxes[entry.inbox] = entry.worker_id
                return self._types_of(entry.worker_id) if present is None else set()
            case TypeEntry():
                self.hosts.setdefault(entry.agent_type, {})[entry.worker_id] = entry
                if len(self.hosts[entry.agent_type]) == 1 or entry.keyed != (entry.agent_type in self.keyed):
                    self._decide_keyed(entry.agent_type)
                self.of_worker.setdefault(entry.worker_id, set()).add(key)
            case InstanceEntry():
                keys = self.instances.setdefault(entry.agent_type, {})
                keys.setdefault(entry.agent_key, {})[entry.worker_id] = entry
                self.of_worker.setdefault(entry.worker_id, set()).add(key)
            case SubscriptionEntry():
                rules = self.declared.setdefault(entry.agent_type, {})
                rules.setdefault(entry.rule, {})[entry.declarer] = entry
                if not entry.is_shared:
                    self.of_worker.setdefault(entry.declarer, set()).add(key)
                return {entry.agent_type}
            case DurableEntry():
                self._set_durable({**self.durable, entry.stream: entry})
        return set()

    def delete(self, key: str, revision: int) -> set[str]:
        """Apply a deletion. A worker's takes everything it declared along."""
        self.saw(revision)
        self.unreadable.pop(key, None)
        present = self.entries.get(key)
        if present is None or present[0] >= revision:
            return set()
        entry = self.entries.pop(key)[1]
        match entry:
            case WorkerEntry():
                self.workers.pop(entry.worker_id, None)
                self.inboxes.pop(entry.inbox, None)
                touched: set[str] = set()
                for other in list(self.of_worker.get(entry.worker_id, ())):
                    touched |= self.delete(other, revision)
                self.of_worker.pop(entry.worker_id, None)
                return touched
            case TypeEntry():
                _remove(self.hosts, entry.agent_type, entry.worker_id)
                self._decide_keyed(entry.agent_type)
                self._disown(entry.worker_id, key)
            case InstanceEntry():
                keys = self.instances.get(entry.agent_type, {})
                _remove(keys, entry.agent_key, entry.worker_id)
                if not keys:
                    self.instances.pop(entry.agent_type, None)
                self._disown(entry.worker_id, key)
            case SubscriptionEntry():
                rules = self.declared.get(entry.agent_type, {})
                _remove(rules, entry.rule, entry.declarer)
                if not rules:
                    self.declared.pop(entry.agent_type, None)
                self._disown(entry.declarer, key)
                return {entry.agent_type}
            case DurableEntry():
                self._set_durable({stream: other for stream, other in self.durable.items() if stream != entry.stream})
        return set()

    def _set_durable(self, durable: Mapping[str, DurableEntry]) -> None:
        self.durable = durable
        self._streams.clear()

    def _disown(self, worker_id: str, key: str) -> None:
        owned = self.of_worker.get(worker_id)
        if owned is not None:
            owned.discard(key)

    def _decide_keyed(self, agent_type: str) -> None:
        """Find out whether a type is keyed. If its workers differ, the first one is right, and the others withdraw."""
        hosting = self.hosts.get(agent_type, {}).values()
        keyed = any(entry.keyed for entry in hosting)
        if keyed and not all(entry.keyed for entry in hosting):
            keyed = min(hosting, key=lambda entry: self.revision_of(entry.key)).keyed
        (self.keyed.add if keyed else self.keyed.discard)(agent_type)

    def _types_of(self, worker_id: str) -> set[str]:
        types = set()
        for key in self.of_worker.get(worker_id, ()):
            entry = self.entries[key][1]
            if isinstance(entry, SubscriptionEntry):
                types.add(entry.agent_type)
        return types

    # -- questions -----------------------------------------------------------------------------------------------

    def live(self, worker_ids: Iterable[str]) -> list[str]:
        return [worker_id for worker_id in worker_ids if worker_id in self.workers]

    def stays(self, worker_id: str) -> bool:
        """Whether the worker is live, and takes new messages."""
        worker = self.workers.get(worker_id)
        return worker is not None and not worker.draining

    def workers_hosting(self, agent_type: str) -> list[str]:
        """The workers that host the type and take new messages for it, be it by factory or by instances."""
        return [worker_id for worker_id in self.hosts.get(agent_type, ()) if self.stays(worker_id)]

    def details(self, agent_type: str) -> Mapping[str, Any] | None:
        """The details of the type; None if no live worker hosts it. If its workers differ, those of the last entry."""
        hosting = [entry for entry in self.hosts.get(agent_type, {}).values() if entry.worker_id in self.workers]
        if not hosting:
            return None
        return max(hosting, key=lambda entry: (self.stays(entry.worker_id), self.revision_of(entry.key))).details

    def workers_of(self, agent: AgentId) -> list[str]:
        """The live workers that may have messages for this one agent, draining ones too."""
        holders = self.instance_holders(agent.type, agent.key)
        return holders or [
            worker_id
            for worker_id, entry in self.hosts.get(agent.type, {}).items()
            if worker_id in self.workers and not entry.instances
        ]

    def takers_of(self, agent: AgentId) -> list[str]:
        """Those of `workers_of` that take new messages."""
        return [worker_id for worker_id in self.workers_of(agent) if self.stays(worker_id)]

    def all_understand(self, feature: str) -> bool:
        """True if every live worker says that it understands ``feature``."""
        return all(feature in worker.features for worker in self.workers.values())

    def understands(self, worker_id: str, feature: str) -> bool:
        """True if a worker is live and says that it understands ``feature``."""
        worker = self.workers.get(worker_id)
        return worker is not None and feature in worker.features

    def instance_holders(self, agent_type: str, key: str) -> list[str]:
        keys = self.instances.get(agent_type)
        return self.live(keys.get(key, ())) if keys else []

    def rules(self, agent_type: str) -> list[Rule]:
        """The subscriptions in force for the type: those with a live declarer, or with none needed."""
        return [
            rule
            for rule, declarers in self.declared.get(agent_type, {}).items()
            if NOBODY in declarers or not self.workers.keys().isdisjoint(declarers)
        ]

    def durable_stream(self, topic_type: str) -> str | None:
        """The stream that stores the events on topics of this type; None if they are not durable."""
        if not self.durable:
            return None
        try:
            return self._streams[topic_type]
        except KeyError:
            pass
        if len(self._streams) >= _REMEMBERED:
            self._streams.clear()
        stream = next(
            (
                entry.stream
                for entry in self.durable.values()
                if any(covers(pattern, topic_type) for pattern in entry.patterns)
            ),
            None,
        )
        self._streams[topic_type] = stream
        return stream

    def types_taking(self, patterns: Collection[str]) -> set[str]:
        """The agent types with an ordinary subscription that may take topics of these durable patterns."""
        return {
            agent_type
            for agent_type in self.declared
            for rule in self.rules(agent_type)
            for pattern in patterns
            if rule.kind != "custom" and (rule.matches(pattern) or covers(pattern, rule.pattern))
        }

    def takers(self, topic_type: str) -> Takers:
        """The types that take topics of this type by an ordinary subscription, as far as a publisher must know them."""
        if not self.keyed and not self.instances:
            return NO_TAKERS
        takers = self._takers.get(topic_type)
        if takers is None:
            if len(self._takers) >= _REMEMBERED:
                self._takers.clear()
            only_instances = (agent_type for agent_type in self.instances if self._has_instances_only(agent_type))
            takers = Takers(self._taking(topic_type, self.keyed), self._taking(topic_type, only_instances))
            if takers == NO_TAKERS:
                takers = NO_TAKERS  # publishers compare with `is`
            self._takers[topic_type] = takers
        return takers

    def _taking(self, topic_type: str, agent_types: Iterable[str]) -> tuple[str, ...]:
        """Those of ``agent_types`` to which an ordinary subscription gives topics of this type."""
        return tuple(
            agent_type
            for agent_type in sorted(agent_types)
            if any(rule.matches(topic_type) for rule in self.rules(agent_type))
        )

    def _has_instances_only(self, agent_type: str) -> bool:
        """Whether live workers host the type, and all of them as registered instances."""
        hosts = self.hosts.get(agent_type, {})
        live = self.live(hosts)
        return bool(live) and all(hosts[worker_id].instances for worker_id in live)

    def revision_of(self, key: str) -> int:
        """The revision of an entry; 0 if it is not there."""
        present = self.entries.get(key)
        return present[0] if present is not None else 0

    def entry(self, key: str) -> RegistryEntry | None:
        """The entry with this key; None if it is not there."""
        present = self.entries.get(key)
        return present[1] if present is not None else None

    def subscriptions(self) -> Iterator[SubscriptionEntry]:
        for rules in self.declared.values():
            for declarers in rules.values():
                yield from declarers.values()


def _remove(outer: dict[Any, dict[str, Any]], first: Any, second: str) -> None:
    inner = outer.get(first)
    if inner is not None:
        inner.pop(second, None)
        if not inner:
            outer.pop(first, None)
