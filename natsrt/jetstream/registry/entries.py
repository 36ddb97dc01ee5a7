"""What the registry stores, and the view that a runtime keeps of it. Pure values: no I/O.

Keys of the bucket (each part is a token as in `natsrt.wire.subjects`):

======================================================= =============================================================
``r.worker.<worker_id>``                                a live worker; while it is missing, its other entries count
                                                        for nothing
``r.type.<agent type>.<worker_id>``                     the worker hosts the type
``r.instance.<agent type>.<key>.<worker_id>``           the worker hosts this one registered instance
``r.subscription.<agent type>.<pattern>.<declarer>``    a subscription; the declarer is a worker id, or ``-`` for a
                                                        runtime that does not host the type
``r.known.<agent type>``                                what the type handles; outlives its workers
``hb.<worker_id>``                                      the worker's heartbeat: outside the feed, expires by itself
======================================================= =============================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson
from autogen_core import AgentId, Subscription, TypePrefixSubscription, TypeSubscription
from pydantic import TypeAdapter, ValidationError

from natsrt.errors import CannotDecode
from natsrt.wire.subjects import Subjects, encode_token, plain_prefix

FEED: Final = "r"
HEARTBEAT: Final = "hb"
NOBODY: Final = "-"
"""The declarer of a subscription that no worker has to keep alive."""

RuleKind = Literal["type", "prefix", "custom"]


@dataclass(frozen=True, slots=True)
class WorkerEntry:
    """A worker process. ``started`` is in seconds since the epoch; one that is ``draining`` takes nothing new."""

    worker_id: str
    name: str
    hostname: str
    pid: int
    started: float
    version: str
    draining: bool = False

    @property
    def key(self) -> str:
        return f"{FEED}.worker.{self.worker_id}"


@dataclass(frozen=True, slots=True)
class TypeEntry:
    """An agent type on a worker. ``instances``: it exists as registered instances only."""

    agent_type: str
    worker_id: str
    handles: tuple[str, ...] = ()
    produces: tuple[str, ...] = ()
    keyed: bool = False
    instances: bool = False

    @property
    def key(self) -> str:
        return f"{FEED}.type.{encode_token(self.agent_type)}.{self.worker_id}"


@dataclass(frozen=True, slots=True)
class InstanceEntry:
    """A registered agent instance on a worker."""

    agent_type: str
    agent_key: str
    worker_id: str

    @property
    def key(self) -> str:
        return f"{FEED}.instance.{encode_token(self.agent_type)}.{encode_token(self.agent_key)}.{self.worker_id}"


@dataclass(frozen=True, slots=True)
class KnownEntry:
    """What an agent type handles, so that "known, but nobody alive" can be told from "unknown"."""

    agent_type: str
    handles: tuple[str, ...] = ()
    produces: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{FEED}.known.{encode_token(self.agent_type)}"


@dataclass(frozen=True, slots=True)
class SubscriptionEntry:
    """A subscription of an agent type. ``subscription_id`` is the id under which it can be removed."""

    agent_type: str
    kind: RuleKind
    pattern: str
    declarer: str
    subscription_id: str

    @property
    def rule(self) -> Rule:
        return Rule(self.agent_type, self.kind, self.pattern)

    @property
    def key(self) -> str:
        return f"{FEED}.subscription.{encode_token(self.agent_type)}.{self.rule.digest}.{self.declarer}"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a subscription says, whoever declared it: which topics go to the agent type."""

    agent_type: str
    kind: RuleKind
    pattern: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.kind}\0{self.pattern}".encode("utf-8", "surrogatepass")).hexdigest()[:24]

    def matches(self, topic_type: str) -> bool:
        """Whether the rule takes topics of this type. A custom rule is decided by its Subscription object instead."""
        if self.kind == "type":
            return topic_type == self.pattern
        return self.kind == "prefix" and topic_type.startswith(self.pattern)

    def subject(self, subjects: Subjects, key: str | None = None) -> str:
        """The NATS subject to subscribe to, for the whole type or for one instance's ``key``.

        Raises ValueError for a rule that no subject can express: an impossible prefix, or one that is too long.
        """
        if self.kind == "custom":
            return subjects.everything
        if self.kind == "prefix":
            return subjects.prefix_filter(self.pattern).subject
        if key is None:
            return subjects.type_filter(self.pattern).subject
        return subjects.instance_type_filter(self.pattern, key).subject

    @classmethod
    def of(cls, subscription: Subscription) -> Rule:
        """The rule of any Subscription.

        Raises ValueError for a prefix that no topic can have, and for a custom class without an ``agent_type``.
        """
        agent_type = getattr(subscription, "agent_type", None)
        if not isinstance(agent_type, str):
            raise ValueError(
                f"{type(subscription).__qualname__} needs an attribute agent_type: the type whose workers serve it"
            )
        if isinstance(subscription, TypeSubscription) and _standard(subscription, TypeSubscription):
            return cls(agent_type, "type", subscription.topic_type)
        if isinstance(subscription, TypePrefixSubscription) and _standard(subscription, TypePrefixSubscription):
            return cls(agent_type, "prefix", plain_prefix(subscription.topic_type_prefix))
        own = type(subscription)
        return cls(agent_type, "custom", f"{own.__module__}.{own.__qualname__}:{subscription.id}")


def _standard(subscription: Subscription, cls: type[Any]) -> bool:
    own = type(subscription)
    return own.is_match is cls.is_match and own.map_to_agent is cls.map_to_agent


RegistryEntry = WorkerEntry | TypeEntry | InstanceEntry | KnownEntry | SubscriptionEntry

_READERS: dict[str, TypeAdapter[Any]] = {
    "worker": TypeAdapter(WorkerEntry),
    "type": TypeAdapter(TypeEntry),
    "instance": TypeAdapter(InstanceEntry),
    "known": TypeAdapter(KnownEntry),
    "subscription": TypeAdapter(SubscriptionEntry),
}


def encode_entry(entry: RegistryEntry) -> bytes:
    return orjson.dumps(entry)


def decode_entry(key: str, value: bytes) -> RegistryEntry:
    """The entry under ``key``. Unknown fields are ignored, so that a newer runtime can add some."""
    kind = key.split(".", 2)[1] if "." in key else ""
    reader = _READERS.get(kind)
    if reader is None:
        raise CannotDecode("a registry entry", f"unknown kind of key {key!r}")
    try:
        entry: RegistryEntry = reader.validate_json(value)
        if entry.key != key:
            raise ValueError(f"its fields belong under {entry.key!r}")
    except ValidationError as error:
        raise CannotDecode(f"the registry entry {key!r}", error.errors()[0]["msg"], value) from None
    except ValueError as error:
        raise CannotDecode(f"the registry entry {key!r}", str(error), value) from None
    return entry


@dataclass(slots=True)
class View:
    """The registry as one runtime sees it: a snapshot, then every change in the stream's order."""

    applied: int = 0
    """The stream sequence up to which the view is complete."""
    entries: dict[str, tuple[int, RegistryEntry]] = field(default_factory=dict)
    workers: dict[str, WorkerEntry] = field(default_factory=dict)
    hosts: dict[str, dict[str, TypeEntry]] = field(default_factory=dict)
    instances: dict[str, dict[str, dict[str, InstanceEntry]]] = field(default_factory=dict)
    known: dict[str, KnownEntry] = field(default_factory=dict)
    declared: dict[str, dict[Rule, dict[str, SubscriptionEntry]]] = field(default_factory=dict)
    of_worker: dict[str, set[str]] = field(default_factory=dict)
    keyed: set[str] = field(default_factory=set)
    """The agent types whose workers say that they are keyed."""

    def put(self, key: str, revision: int, entry: RegistryEntry) -> set[str]:
        """Apply one change; an older revision changes nothing. Returns the agent types whose subscriptions changed."""
        self.applied = max(self.applied, revision)
        present = self.entries.get(key)
        if present is not None and present[0] >= revision:
            return set()
        self.entries[key] = (revision, entry)
        match entry:
            case WorkerEntry():
                self.workers[entry.worker_id] = entry
                return self._types_of(entry.worker_id) if present is None else set()
            case TypeEntry():
                self.hosts.setdefault(entry.agent_type, {})[entry.worker_id] = entry
                (self.keyed.add if entry.keyed else self.keyed.discard)(entry.agent_type)
                self.of_worker.setdefault(entry.worker_id, set()).add(key)
            case InstanceEntry():
                keys = self.instances.setdefault(entry.agent_type, {})
                keys.setdefault(entry.agent_key, {})[entry.worker_id] = entry
                self.of_worker.setdefault(entry.worker_id, set()).add(key)
            case KnownEntry():
                self.known[entry.agent_type] = entry
            case SubscriptionEntry():
                rules = self.declared.setdefault(entry.agent_type, {})
                rules.setdefault(entry.rule, {})[entry.declarer] = entry
                if entry.declarer != NOBODY:
                    self.of_worker.setdefault(entry.declarer, set()).add(key)
                return {entry.agent_type}
        return set()

    def delete(self, key: str, revision: int) -> set[str]:
        """Apply a deletion. A worker's takes everything it declared along."""
        self.applied = max(self.applied, revision)
        present = self.entries.get(key)
        if present is None or present[0] >= revision:
            return set()
        entry = self.entries.pop(key)[1]
        match entry:
            case WorkerEntry():
                self.workers.pop(entry.worker_id, None)
                touched: set[str] = set()
                for other in list(self.of_worker.get(entry.worker_id, ())):
                    touched |= self.delete(other, revision)
                self.of_worker.pop(entry.worker_id, None)
                return touched
            case TypeEntry():
                _remove(self.hosts, entry.agent_type, entry.worker_id)
                if entry.agent_type not in self.hosts:
                    self.keyed.discard(entry.agent_type)
                self._disown(entry.worker_id, key)
            case InstanceEntry():
                keys = self.instances.get(entry.agent_type, {})
                _remove(keys, entry.agent_key, entry.worker_id)
                if not keys:
                    self.instances.pop(entry.agent_type, None)
                self._disown(entry.worker_id, key)
            case KnownEntry():
                self.known.pop(entry.agent_type, None)
            case SubscriptionEntry():
                rules = self.declared.get(entry.agent_type, {})
                _remove(rules, entry.rule, entry.declarer)
                if not rules:
                    self.declared.pop(entry.agent_type, None)
                self._disown(entry.declarer, key)
                return {entry.agent_type}
        return set()

    def _disown(self, worker_id: str, key: str) -> None:
        owned = self.of_worker.get(worker_id)
        if owned is not None:
            owned.discard(key)

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

    def instance_holders(self, agent_type: str, key: str) -> list[str]:
        keys = self.instances.get(agent_type)
        return self.live(keys.get(key, ())) if keys else []

    def is_known(self, agent_type: str) -> bool:
        return agent_type in self.known or bool(self.hosts.get(agent_type))

    def rules(self, agent_type: str) -> list[Rule]:
        """The subscriptions in force for the type: those with a live declarer, or with none needed."""
        return [
            rule
            for rule, declarers in self.declared.get(agent_type, {}).items()
            if NOBODY in declarers or not self.workers.keys().isdisjoint(declarers)
        ]

    def keyed_takers(self, topic_type: str) -> tuple[str, ...]:
        """The keyed types that an ordinary subscription gives topics of this type to."""
        return tuple(
            agent_type
            for agent_type in sorted(self.keyed)
            if any(rule.matches(topic_type) for rule in self.rules(agent_type))
        )

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
