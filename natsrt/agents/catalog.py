"""The agent types that this runtime hosts, and their live agents."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from autogen_core import (
    Agent,
    AgentId,
    AgentInstantiationContext,
    AgentRuntime,
    ClosureAgent,
    MessageSerializer,
    RoutedAgent,
)

from natsrt.errors import CannotSerialize, UnknownAgent
from natsrt.jetstream.registry.entries import InstanceEntry, KnownEntry, Rule, TypeEntry
from natsrt.keyed_types import KeyedOptions, keyed_options_of
from natsrt.observe import events
from natsrt.observe.metrics import TypeCounters
from natsrt.wire.serialization import Serialization, type_name_of
from natsrt.wire.subjects import encode_token

logger = logging.getLogger("natsrt.hosting")

Factory = Callable[[], Any]

_REMEMBERED = 4096
"""Topic types whose match is remembered per agent type."""
SETTLING = 1.0
"""Seconds after a registration during which a message of an unknown type waits for its serializer.

AutoGen's ``Agent.register`` and ``ClosureAgent.register_closure`` add serializers only after the factory and the
subscriptions.
"""


@dataclass(slots=True, eq=False)
class HostedType:
    """One agent type. ``factory`` is None where it exists as registered instances only, ``keyed`` where it is not."""

    agent_type: str
    factory: Factory | None
    expected_class: type[Agent] | None
    keyed: KeyedOptions | None = None
    takes_arguments: bool = False
    """Whether the factory wants the runtime and the agent's id."""
    instance_class: type[Agent] | None = None
    live: dict[str, Agent] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    handles: dict[str, type[Any]] = field(default_factory=dict)
    produces: dict[str, type[Any]] = field(default_factory=dict)
    learned: set[type[Any]] = field(default_factory=set)
    rules: tuple[Rule, ...] = ()
    taken: dict[str, bool] = field(default_factory=dict)
    """Which topic types `rules` take, as far as they were asked for."""
    counters: TypeCounters = field(default_factory=TypeCounters)
    registered_at: float = field(default_factory=time.monotonic)

    def set_rules(self, rules: Sequence[Rule]) -> None:
        """The subscriptions in force for the type."""
        self.rules = tuple(rules)
        self.taken.clear()

    def takes(self, topic_type: str) -> bool:
        """Whether an ordinary subscription takes topics of this type."""
        taken = self.taken.get(topic_type)
        if taken is None:
            if len(self.taken) >= _REMEMBERED:
                self.taken.clear()
            taken = self.taken[topic_type] = any(rule.matches(topic_type) for rule in self.rules)
        return taken

    @property
    def has_instances_only(self) -> bool:
        return self.factory is None

    @property
    def settling(self) -> bool:
        return time.monotonic() - self.registered_at < SETTLING

    def entries(self, worker_id: str) -> list[TypeEntry | KnownEntry | InstanceEntry]:
        """What the registry is told of this type."""
        handles, produces = tuple(sorted(self.handles)), tuple(sorted(self.produces))
        entries: list[TypeEntry | KnownEntry | InstanceEntry] = [
            TypeEntry(
                self.agent_type,
                worker_id,
                handles,
                produces,
                keyed=self.keyed is not None,
                instances=self.has_instances_only,
            ),
            KnownEntry(self.agent_type, handles, produces),
        ]
        if self.has_instances_only:
            entries += [InstanceEntry(self.agent_type, key, worker_id) for key in self.live]
        return entries


class Gate:
    """Lets those pass one after the other who came while an agent was not ready, in the order they came.

    It exists only while somebody waits: `HostedType.gates`.
    """

    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


class Catalog:
    """Factories, instances and live agents of one runtime."""

    def __init__(self, runtime: AgentRuntime, serialization: Serialization) -> None:
        self._runtime = runtime
        self._serialization = serialization
        self._types: dict[str, HostedType] = {}
        self.counters: dict[str, TypeCounters] = {}
        """The counters of each hosted type."""
        self._closures: list[HostedType] = []
        """Types of AutoGen's ClosureAgent that may be settling: what they handle shows in their serializers alone."""
        self._serializers_changed = asyncio.Event()

    def __iter__(self) -> Iterator[HostedType]:
        return iter(list(self._types.values()))

    def __contains__(self, agent_type: str) -> bool:
        return agent_type in self._types

    def find(self, agent_type: str) -> HostedType | None:
        return self._types.get(agent_type)

    # -- registering ---------------------------------------------------------------------------------------------

    def add_factory(
        self, agent_type: str, factory: Factory, expected_class: type[Agent] | None, keyed: KeyedOptions | None = None
    ) -> HostedType:
        """Raises ValueError where the type exists already (as AutoGen does), or the factory takes arguments."""
        if agent_type in self._types:
            raise ValueError(f"Agent with type {agent_type} already exists.")
        AgentId(agent_type, "default")  # AutoGen's own check of the name
        count = len(inspect.signature(factory).parameters)
        if count not in (0, 2):
            raise ValueError(f"Agent factory must take 0 or 2 arguments, not {count}.")
        hosted = HostedType(agent_type, factory, expected_class, keyed, takes_arguments=count == 2)
        if expected_class is not None:
            self._learn(hosted, expected_class)
        self._add(hosted)
        if expected_class is not None and issubclass(expected_class, ClosureAgent):
            self._closures.append(hosted)
        return hosted

    def add_instance(self, agent: Agent, agent_id: AgentId) -> HostedType:
        """Raises ValueError for a taken id, a type with a factory, or another class of instance (AutoGen's rules).

        Also for a key that no subject can carry.
        """
        encode_token(agent_id.key)
        hosted = self._types.get(agent_id.type)
        if hosted is not None:
            if agent_id.key in hosted.live and hosted.has_instances_only:
                raise ValueError(f"Agent with id {agent_id} already exists.")
            if not hosted.has_instances_only:
                raise ValueError("Agent factories and agent instances cannot be registered to the same type.")
            if hosted.instance_class is not type(agent):
                raise ValueError("Agent instances must be the same object type.")
        else:
            hosted = HostedType(agent_id.type, None, None, instance_class=type(agent))
        self._learn(hosted, type(agent))
        hosted.live[agent_id.key] = agent
        self._add(hosted)
        return hosted

    def _add(self, hosted: HostedType) -> None:
        self._types[hosted.agent_type] = hosted
        self.counters[hosted.agent_type] = hosted.counters

    def remove_instance(self, agent_id: AgentId) -> None:
        hosted = self._types[agent_id.type]
        hosted.live.pop(agent_id.key, None)
        if not hosted.live:
            self.remove(agent_id.type)

    def remove(self, agent_type: str) -> None:
        self._types.pop(agent_type, None)
        self.counters.pop(agent_type, None)

    # -- message types -------------------------------------------------------------------------------------------

    def _learn(self, hosted: HostedType, cls: type[Any]) -> None:
        """Register the serializers of what ``cls`` handles and produces, or, where two classes clash, none of them."""
        if cls in hosted.learned:
            return
        handled, produced = message_types(cls)
        self._serialization.refuse_clashes(message_type for message_type in handled if message_type is not object)
        for message_type, serializers in getattr(cls, "internal_extra_handles_types", ()):
            self._serialization.add(serializers)
            hosted.handles[type_name_of(message_type)] = message_type
        for message_type in handled:
            if message_type is not object:
                try:
                    self._serialization.add_class(message_type)
                except CannotSerialize as error:  # a serializer of the user's own may follow
                    logger.debug("%s handles %s: %s", cls.__qualname__, message_type, error)
            hosted.handles[_shown_name(message_type)] = message_type
        for message_type in produced:
            hosted.produces[_shown_name(message_type)] = message_type
        hosted.learned.add(cls)

    def serializers_added(self, serializers: Sequence[MessageSerializer[Any]]) -> None:
        """Wake the messages that wait for them."""
        self._closures = [hosted for hosted in self._closures if hosted.settling]
        for hosted in self._closures:
            for serializer in serializers:
                cls = self._serialization.class_of(serializer.type_name)
                if cls is not None:
                    hosted.handles.setdefault(serializer.type_name, cls)
        self._serializers_changed.set()
        self._serializers_changed = asyncio.Event()

    async def wait_for_serializer(self, hosted: HostedType, type_name: str) -> None:
        """Return when ``type_name`` is known, or the registration of ``hosted`` has settled."""
        while not self._serialization.is_known(type_name) and hosted.settling:
            try:
                async with asyncio.timeout(max(0.0, hosted.registered_at + SETTLING - time.monotonic())):
                    await self._serializers_changed.wait()
            except TimeoutError:
                return

    def produced_here(self) -> Iterable[type[Any]]:
        """What the handlers of all hosted types produce."""
        for hosted in self._types.values():
            yield from hosted.produces.values()

    # -- agents --------------------------------------------------------------------------------------------------

    async def agent(self, hosted: HostedType, key: str) -> Agent:
        """The live agent, made by the factory if it is not there yet. Concurrent callers get the same one.

        Raises `UnknownAgent` for an unregistered id of a type with instances only, and whatever the factory raises.
        """
        agent = hosted.live.get(key)
        if agent is not None:
            return agent
        agent_id = AgentId(hosted.agent_type, key)
        if hosted.factory is None:
            raise UnknownAgent(str(agent_id), [f"{hosted.agent_type}/{other}" for other in sorted(hosted.live)[:20]])
        agent = await self._make(hosted, hosted.factory, agent_id)
        # A factory that waits lets others in: the gate keeps messages apart, but get(lazy=False) has none.
        return hosted.live.setdefault(key, agent)

    async def _make(self, hosted: HostedType, factory: Factory, agent_id: AgentId) -> Agent:
        with AgentInstantiationContext.populate_context((self._runtime, agent_id)):
            try:
                if hosted.takes_arguments:
                    warnings.warn(
                        "Agent factories that take two arguments are deprecated: use AgentInstantiationContext.",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    made = cast(Callable[[AgentRuntime, AgentId], Any], factory)(self._runtime, agent_id)
                else:
                    made = factory()
                agent = cast(Agent, await made if inspect.isawaitable(made) else made)
                expected = hosted.expected_class
                if expected is not None and not isinstance(agent, expected):
                    raise ValueError(
                        "Factory registered using the wrong type: "
                        f"expected {expected.__name__}, got {type(agent).__name__}"
                    )
                if expected is None and hosted.keyed is None and keyed_options_of(type(agent)) is not None:
                    raise ValueError(
                        f"{type(agent).__name__} is a keyed class, but the type {hosted.agent_type!r} was registered "
                        "without saying so: give expected_class or keyed to register_factory"
                    )
            except BaseException as error:
                events.construction_failed(agent=agent_id, error=error)
                logger.error("constructing agent %s failed: %s", agent_id, type(error).__name__)
                raise
        self._learn(hosted, type(agent))
        return agent

    def live_agents(self) -> Iterator[tuple[AgentId, Agent]]:
        for hosted in list(self._types.values()):
            for key, agent in list(hosted.live.items()):
                yield AgentId(hosted.agent_type, key), agent


def message_types(cls: type[Any]) -> tuple[list[type[Any]], list[type[Any]]]:
    """What the handlers of a `RoutedAgent` class take and return. ``object`` stands for Any."""
    handled: list[type[Any]] = []
    produced: list[type[Any]] = []
    if issubclass(cls, RoutedAgent):
        for name in dir(cls):
            handler = getattr(cls, name, None)
            if getattr(handler, "is_message_handler", False):
                handled += [_plain(t) for t in handler.target_types]  # type: ignore[union-attr]
                produced += [_plain(t) for t in handler.produces_types]  # type: ignore[union-attr]
    return list(dict.fromkeys(handled)), list(dict.fromkeys(produced))


def _plain(message_type: Any) -> type[Any]:
    """AutoGen marks Any by a class of its own, which is not public."""
    is_any = getattr(message_type, "__name__", "") == "AnyType" and message_type.__module__.startswith("autogen_core.")
    return object if is_any else message_type


def _shown_name(message_type: type[Any]) -> str:
    return "Any" if message_type is object else type_name_of(message_type)
