"""One agent type that a runtime hosts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autogen_core import Agent

from natsrt.jetstream.consumers import START_NOW, Start
from natsrt.jetstream.registry.entries import InstanceEntry, KnownEntry, RegistryEntry, Rule, TypeEntry
from natsrt.keyed_types import KeyedOptions
from natsrt.observe.metrics import TypeCounters
from natsrt.wire.known_classes import NamedClasses
from natsrt.wire.message_classes import full_name

Factory = Callable[[], Any]

_MATCHES_CACHED = 4096
"""Number of topic types per agent type for which `HostedType.takes` caches its result."""
_SETTLES_WITHIN = 1.0
"""Seconds after a registration for which a message of an unknown type waits for its serializer.

AutoGen's ``Agent.register`` and ``ClosureAgent.register_closure`` add serializers only after the factory and the
subscriptions.
"""


@dataclass(slots=True, eq=False)
class HostedType:
    """One agent type that this runtime hosts."""

    agent_type: str
    factory: Factory | None
    """Creates an agent of the type; None if the type has only registered instances."""
    expected_class: type[Agent] | None
    """The class that the factory's agents must have; None for any class."""
    keyed: KeyedOptions | None = None
    """The options of a keyed type; None for other types."""
    decided: bool = False
    """True if the argument or the setting ``keyed`` said whether the type is keyed. Its class does not matter then."""
    takes_arguments: bool = False
    """True if the factory takes the runtime and the agent's id as arguments."""
    max_running: int | None = None
    """Number of its handlers that may run at once on this worker; None: any number."""
    start_from: Start = START_NOW
    """With which events of a durable topic the type begins if no worker has hosted it before."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the registry says about the type for programs that know what to make of it."""
    instance_class: type[Agent] | None = None
    """The class of the registered instances; None for a type with a factory."""
    live: dict[str, Agent] = field(default_factory=dict)
    """The agents that exist, by key."""
    gates: dict[str, Gate] = field(default_factory=dict)
    """The gates at which messages wait, by the key of their agent."""
    handles: NamedClasses = field(default_factory=NamedClasses)
    """The message types that its handlers accept."""
    produces: NamedClasses = field(default_factory=NamedClasses)
    """The message types that its handlers return."""
    out_of_turn: NamedClasses = field(default_factory=NamedClasses)
    """Those of `handles` whose handlers do not wait for their turn: see `natsrt.out_of_turn`."""
    handled_by: dict[type[Any], NamedClasses] = field(default_factory=dict)
    """The message types that agents of each class handle. A class that was defined again may be in use beside the later
    one; each handles the message classes that it was defined with."""
    rules: tuple[Rule, ...] = ()
    """The subscriptions that the registry lists for the type."""
    matches: dict[str, bool] = field(default_factory=dict)
    """Cached results of `takes` for the current `rules`, by topic type."""
    counters: TypeCounters = field(default_factory=TypeCounters)
    registered_at: float = field(default_factory=time.monotonic)
    """When the type was registered, by `time.monotonic`."""

    def set_rules(self, rules: Sequence[Rule]) -> None:
        """Replace `rules`."""
        self.rules = tuple(rules)
        self.matches.clear()

    def takes(self, topic_type: str) -> bool:
        """True if a subscription by topic type or prefix matches topics of this type."""
        matches = self.matches.get(topic_type)
        if matches is None:
            if len(self.matches) >= _MATCHES_CACHED:
                self.matches.clear()
            matches = self.matches[topic_type] = any(rule.matches(topic_type) for rule in self.rules)
        return matches

    def is_out_of_turn(self, type_name: str, class_name: str | None) -> bool:
        """True if a message does not wait for its turn. ``class_name``: the full name of its class; None: unknown.

        A plain message may have the full name as its ``type_name``.
        """
        if "." in type_name and class_name is None:
            return any(full_name(cls) == type_name for cls in self.out_of_turn)
        marked = self.out_of_turn.named(type_name)
        if len(marked) == len(self.handles.named(type_name)):
            return bool(marked)
        return any(full_name(cls) == class_name for cls in marked)

    def forget_unused_classes(self) -> None:
        """Drop the message types of agent classes that were defined again and have no agents any more."""
        used = {self.expected_class, *map(type, self.live.values())}
        latest = {full_name(cls): cls for cls in self.handled_by}
        for cls in list(self.handled_by):
            if cls not in used and latest[full_name(cls)] is not cls:
                del self.handled_by[cls]

    @property
    def has_instances_only(self) -> bool:
        """True if the type has no factory: only its registered instances exist."""
        return self.factory is None

    @property
    def settling(self) -> bool:
        """True as long as serializers that belong to the registration may still be added."""
        return time.monotonic() - self.registered_at < _SETTLES_WITHIN

    @property
    def settles_in(self) -> float:
        """Seconds until `settling` ends; 0.0 if it has ended."""
        return max(0.0, self.registered_at + _SETTLES_WITHIN - time.monotonic())

    def entries(self, worker_id: str) -> list[RegistryEntry]:
        """The entries of this type in the registry, as hosted by ``worker_id``."""
        handles, produces = self.handles.names, self.produces.names
        entries: list[RegistryEntry] = [
            TypeEntry(
                self.agent_type,
                worker_id,
                handles,
                produces,
                keyed=self.keyed is not None,
                instances=self.has_instances_only,
                details=self.details,
            ),
            KnownEntry(self.agent_type, handles, produces),
        ]
        if self.has_instances_only:
            entries += [InstanceEntry(self.agent_type, key, worker_id) for key in sorted(self.live)]
        return entries


class Gate:
    """Holds the messages that arrived before their agent was ready. They continue one by one in the order of arrival.

    It is in `HostedType.gates` only while a message waits or has the lock.
    """

    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock: asyncio.Lock = asyncio.Lock()
        self.users: int = 0
        """Number of messages that wait for the lock or have it."""
