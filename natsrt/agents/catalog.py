"""The agent types that this runtime hosts, and their live agents."""

from __future__ import annotations

import asyncio
import datetime
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from autogen_core import (
    Agent,
    AgentId,
    AgentInstantiationContext,
    AgentRuntime,
    ClosureAgent,
    MessageSerializer,
)

from natsrt.agents.hosted_type import Factory, HostedType
from natsrt.agents.message_types import message_types_of, shown_name
from natsrt.agents.signatures import required_parameters
from natsrt.errors import CannotSerialize, UnknownAgent
from natsrt.jetstream.consumers import START_ALL, START_NOW, Start
from natsrt.jetstream.registry.entries import checked_details
from natsrt.keyed_types import KeyedOptions, keyed_options_of
from natsrt.observe import events
from natsrt.observe.metrics import TypeCounters
from natsrt.wire.known_classes import NamedClasses
from natsrt.wire.message_classes import type_name_of
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import encode_token

logger: logging.Logger = logging.getLogger("natsrt.hosting")


class Catalog:
    """The agent types that one runtime hosts, with their factories and agents."""

    def __init__(self, runtime: AgentRuntime, serialization: Serialization) -> None:
        self._runtime = runtime
        self._serialization = serialization
        self._types: dict[str, HostedType] = {}
        self.counters: dict[str, TypeCounters] = {}
        """The counters of each hosted type."""
        self._closures: list[HostedType] = []
        """Types of AutoGen's ClosureAgent that may still be settling. The types of the messages that they handle are
        known only from the serializers that are added for them."""
        self._serializers_changed = asyncio.Event()
        """Set when serializers are added, then replaced by a new event."""

    def __iter__(self) -> Iterator[HostedType]:
        return iter(list(self._types.values()))

    def __contains__(self, agent_type: str) -> bool:
        return agent_type in self._types

    def find(self, agent_type: str) -> HostedType | None:
        """Return the hosted type with this name; None if this runtime does not host it."""
        return self._types.get(agent_type)

    # -- registering ---------------------------------------------------------------------------------------------

    def add_factory(
        self,
        agent_type: str,
        factory: Factory,
        expected_class: type[Agent] | None,
        keyed: KeyedOptions | None = None,
        *,
        decided: bool = False,
        max_running: int | None = None,
        start_from: Start = START_NOW,
        details: Mapping[str, Any] | None = None,
    ) -> HostedType:
        """Host a type whose agents ``factory`` creates. If ``keyed`` is None, the type is not keyed; if ``decided``,
        not even if the factory creates agents of a keyed class. ``max_running`` limits its handlers; None: no limit.
        ``start_from`` and ``details``: see `HostedType`.

        Raises ValueError, as AutoGen does, if the type is already hosted, or if the factory does not take 0 or 2
        arguments; and if the registry cannot keep ``details``.
        """
        if agent_type in self._types:
            raise ValueError(f"Agent with type {agent_type} already exists.")
        AgentId(agent_type, "default")  # raises if AutoGen does not accept the name
        count = _required(factory)
        if count not in (0, 2):
            raise ValueError(f"Agent factory must take 0 or 2 arguments, not {count}.")
        hosted = HostedType(
            agent_type,
            factory,
            expected_class,
            keyed,
            decided,
            takes_arguments=count == 2,
            max_running=checked_limit(max_running),
            start_from=checked_start(start_from),
            details=checked_details(details),
        )
        if expected_class is not None:
            self._register_message_types(hosted, expected_class)
        self._add(hosted)
        if expected_class is not None and issubclass(expected_class, ClosureAgent):
            self._closures.append(hosted)
        return hosted

    def add_instance(self, agent: Agent, agent_id: AgentId) -> HostedType:
        """Host an agent that already exists.

        Raises ValueError if the key cannot be part of a subject, and, as AutoGen does, if the id is in use, if the type
        has a factory, or if its other instances have another class.
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
        self._register_message_types(hosted, type(agent))
        hosted.live[agent_id.key] = agent
        self._add(hosted)
        return hosted

    def _add(self, hosted: HostedType) -> None:
        self._types[hosted.agent_type] = hosted
        self.counters[hosted.agent_type] = hosted.counters

    def remove_instance(self, agent_id: AgentId) -> None:
        """Remove a registered instance. With its last instance, the type is removed too."""
        hosted = self._types[agent_id.type]
        hosted.live.pop(agent_id.key, None)
        if not hosted.live:
            self.remove(agent_id.type)

    def remove(self, agent_type: str) -> None:
        """Stop hosting the type. Has no effect if it is not hosted."""
        self._types.pop(agent_type, None)
        self.counters.pop(agent_type, None)

    # -- message types -------------------------------------------------------------------------------------------

    def _register_message_types(self, hosted: HostedType, cls: type[Any]) -> None:
        """Add the message types of an agent class to ``hosted``, and register their serializers."""
        if cls in hosted.handled_by:
            return
        handled, produced, out_of_turn = message_types_of(cls)
        own = hosted.handled_by[cls] = NamedClasses()
        for message_type, serializers in getattr(cls, "internal_extra_handles_types", ()):
            self._serialization.add(serializers)
            own.add(type_name_of(message_type), message_type)
        for message_type in handled:
            if message_type is not object:
                try:
                    self._serialization.add_class(message_type)
                except CannotSerialize as error:  # the user may still add a serializer for it
                    logger.debug("%s handles %s: %s", cls.__qualname__, message_type, error)
            own.add(shown_name(message_type), message_type)
        for message_type in own:
            hosted.handles.add(shown_name(message_type), message_type)
        for message_type in out_of_turn:
            hosted.out_of_turn.add(shown_name(message_type), message_type)
        for message_type in produced:
            self._serialization.add_produced(message_type)
            hosted.produces.add(shown_name(message_type), message_type)
        hosted.forget_unused_classes()

    def serializers_added(self, serializers: Sequence[MessageSerializer[Any]]) -> None:
        """Continue messages that wait for these serializers. Call it after the serializers were added."""
        self._closures = [hosted for hosted in self._closures if hosted.settling]
        for hosted in self._closures:
            for serializer in serializers:
                cls = getattr(serializer, "cls", None) or self._serialization.class_of(serializer.type_name)
                if cls is not None:
                    for handled in (hosted.handles, *hosted.handled_by.values()):
                        handled.add(serializer.type_name, cls)
        self._serializers_changed.set()
        self._serializers_changed = asyncio.Event()

    async def wait_for_serializer(self, hosted: HostedType, type_name: str, class_name: str | None = None) -> None:
        """Wait until a message type is known, or the registration of ``hosted`` has settled.

        ``class_name`` is the full name of its class, None if the message does not say it.
        """
        while hosted.settling and not self._serialization.is_known(type_name, class_name, hosted.handles):
            try:
                async with asyncio.timeout(hosted.settles_in):
                    await self._serializers_changed.wait()
            except TimeoutError:
                return

    # -- agents --------------------------------------------------------------------------------------------------

    async def agent(self, hosted: HostedType, key: str) -> Agent:
        """Return the agent with this key. The factory creates it if it does not exist. Concurrent callers get the same
        agent.

        Raises `UnknownAgent` if the type has only registered instances and this is not one of them, ValueError if the
        factory returned an agent of the wrong class, and any exception of the factory.
        """
        agent = hosted.live.get(key)
        if agent is not None:
            return agent
        agent_id = AgentId(hosted.agent_type, key)
        if hosted.factory is None:
            raise UnknownAgent(str(agent_id), [f"{hosted.agent_type}/{other}" for other in sorted(hosted.live)[:20]])
        agent = await self._make(hosted, hosted.factory, agent_id)
        # While the factory was awaited, another caller may have created the agent: messages wait at the gate, but
        # get(lazy=False) does not.
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
                _check_class(hosted, agent)
            except BaseException as error:
                events.construction_failed(agent=agent_id, error=error)
                logger.error("constructing agent %s failed: %s", agent_id, type(error).__name__)
                raise
        self._register_message_types(hosted, type(agent))
        return agent

    def live_agents(self) -> Iterator[tuple[AgentId, Agent]]:
        """All agents that exist, with their ids."""
        for hosted in list(self._types.values()):
            for key, agent in list(hosted.live.items()):
                yield AgentId(hosted.agent_type, key), agent


def checked_limit(max_running: int | None) -> int | None:
    """``max_running``, if it can be the limit of an agent type. Raises ValueError."""
    if max_running is None or (type(max_running) is int and max_running >= 1):
        return max_running
    raise ValueError(f"max_running must be a whole number of at least 1, or None, not {max_running!r}")


def checked_start(start_from: Start) -> Start:
    """``start_from``, if events can be handled from there on. Raises ValueError."""
    is_sequence = type(start_from) is int and start_from >= 1
    if is_sequence or isinstance(start_from, datetime.datetime) or start_from in (START_NOW, START_ALL):
        return start_from
    raise ValueError(
        f"start_from must be {START_NOW!r}, {START_ALL!r}, a sequence of at least 1 or a datetime, not {start_from!r}"
    )


def _check_class(hosted: HostedType, agent: Agent) -> None:
    """Raise ValueError if a factory returned an agent whose class does not fit the registration."""
    expected = hosted.expected_class
    if expected is not None and not isinstance(agent, expected):
        raise ValueError(
            f"Factory registered using the wrong type: expected {expected.__name__}, got {type(agent).__name__}"
        )
    undecided = expected is None and hosted.keyed is None and not hosted.decided
    if undecided and keyed_options_of(type(agent)) is not None:
        raise ValueError(
            f"{type(agent).__name__} is a keyed class, but the type {hosted.agent_type!r} was not registered as keyed: "
            "pass expected_class or keyed to register_factory"
        )


def _required(factory: Callable[..., Any]) -> int:
    """Return the number of arguments that a factory needs. Those with defaults do not count, as AutoGen passes none.

    Raises ValueError if it needs an argument by keyword.
    """
    try:
        needed = required_parameters(factory)
    except (TypeError, ValueError):  # written in C
        return 0
    named = [parameter.name for parameter in needed if parameter.kind is parameter.KEYWORD_ONLY]
    if named:
        raise ValueError(f"Agent factory must take 0 or 2 arguments, but needs the keyword {named[0]}.")
    return len(needed)
