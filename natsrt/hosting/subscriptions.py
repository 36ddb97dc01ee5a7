"""The NATS subscriptions of a worker: for each hosted type its calls, its control subject and its events.

Events of durable topics come from streams: see `natsrt.hosting.durable`.

Subscriptions belong to the agent type. Every worker that hosts the type serves all of them, because the members of a
queue group must have the same filters. The NATS subscriptions of a type are derived from the registry's view.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autogen_core import Subscription

from natsrt.agents.catalog import Catalog
from natsrt.agents.declarations import Declarations
from natsrt.agents.hosted_type import HostedType
from natsrt.agents.inbound import CALL, CONTROL, EVENT, Route
from natsrt.background import BackgroundTasks, all_of
from natsrt.errors import ConfigurationError, NatsrtError, PermissionDenied, StreamUnavailable
from natsrt.hosting.core_copies import CoreCopies
from natsrt.hosting.durable import DurableConsumers
from natsrt.hosting.intake import Intake
from natsrt.hosting.settlements import EventSettlement, ReplySettlement
from natsrt.jetstream.registry.entries import DurableEntry, Rule
from natsrt.jetstream.registry.registry import Registry, RegistryListener
from natsrt.observe.services import ServiceEndpoint, service_name
from natsrt.transport.connection import Connection, Interest
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_CONNECTED_WITHIN = 10.0
"""Seconds to wait for a lost connection before a change of the subscriptions fails."""
_AGAIN = 5.0
"""Seconds after which it is tried again to pull from a stream that could not be used."""
_AT_ONCE = 32
"""Agent types whose consumers are made or read at a time. One after the other would cost round trips for each type."""
SubjectAndGroup = tuple[str, str]
"""The subject and the queue group of a NATS subscription."""


@dataclass(slots=True)
class _Served:
    """The NATS subscriptions of one agent type."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    interests: dict[SubjectAndGroup, Interest] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    """The rules from which `interests` were derived."""
    beside: _Beside | None = None
    """The other values from which `interests` were derived; None before the first subscription."""
    changes: int = 0
    """How often `interests` changed."""
    told: tuple[int, int] | None = None
    """Values of ``changes`` and of the connection's reconnects when the server was last known to have all
    subscriptions; None before that."""


@dataclass(frozen=True, slots=True)
class _Beside:
    """The values, other than its rules, on which the NATS subscriptions of a type depend.

    ``keys`` are the keys of its registered instances, or one None for the whole type. ``custom`` are the ids of the
    subscriptions that only this process can evaluate. ``durable`` are the durable topics, by stream.
    """

    keys: tuple[str | None, ...]
    custom: tuple[str, ...]
    durable: Mapping[str, DurableEntry]


class Subscriptions(RegistryListener):
    """The NATS subscriptions of this worker."""

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        catalog: Catalog,
        declarations: Declarations,
        registry: Registry,
        intake: Intake,
        replies: ReplySettlement,
        events: EventSettlement,
        durable: DurableConsumers,
        worker_id: str,
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._catalog = catalog
        self._intake = intake
        self._worker_id = worker_id
        self._declarations = declarations
        self._registry = registry
        self._replies = replies
        self._events = events
        self._copies = CoreCopies(subjects, registry)
        self._durable = durable
        self._served: dict[str, _Served] = {}
        self._tasks = BackgroundTasks(logger, "following the registry's subscriptions failed")
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._active = False
        self._settled = asyncio.Event()
        """Set when the types that were hosted before the start are served, or never will be."""
        registry.add_listener(self)

    async def start(self) -> None:
        """Serve every hosted type."""
        self._active = True
        await all_of(map(self._apply, list(self._catalog)))
        await self._tell(list(self._served.values()))
        self._settled.set()

    async def stop(self) -> None:
        """End all subscriptions, and pull no more.

        When this returns, every message that the server sent for them has been taken in.
        """
        self._active = False
        self._settled.set()
        await self._tasks.cancel()
        interests = [i for served in self._served.values() for i in served.interests.values()]
        self._served.clear()
        unsubscribing = (self._connection.unsubscribe(interest) for interest in interests)
        await asyncio.gather(self._durable.stop(), *unsubscribing)

    async def serve(self, agent_type: str) -> None:
        """Subscribe for the type according to the current view. Returns when the server has the subscriptions."""
        hosted = self._catalog.find(agent_type)
        if hosted is not None and self._active:
            await self._tell([await self._apply(hosted)])

    async def serve_at(self, agent_type: str, revision: int) -> None:
        """Do what `serve` does, once this runtime's own types are served and its view has reached ``revision``.

        Used for a request of another worker. It does not wait for the end of this runtime's start, because the start
        waits for other workers in turn: see `natsrt.membership.Membership.confirm`. Returns at once if this runtime
        stops or its start has failed, because it takes no messages then.

        Raises `RegistryUnavailable` if the view does not reach ``revision``.
        """
        await self._settled.wait()
        if not self._active:
            return
        await self._registry.shown(revision)
        await self.serve(agent_type)

    async def end(self, agent_type: str) -> None:
        """Stop serving a type that is no longer hosted."""
        served = self._served.pop(agent_type, None)
        if served is not None:
            async with served.lock:
                for interest in served.interests.values():
                    await self._connection.unsubscribe(interest)
                served.interests.clear()
                await self._durable.end(agent_type)

    async def listen(self, hosted: HostedType, key: str) -> Interest:
        """Subscribe to the subject of one keyed agent, which this worker owns."""
        subjects, agent_type = self._subjects, hosted.agent_type
        return await self._connection.subscribe(
            subjects.instance(agent_type, key),
            self._intake.sink(Route(CALL, hosted, self._replies, key)),
            queue=subjects.queue(agent_type, key),
        )

    def rules_changed(self, agent_type: str) -> None:
        """Called when the type's subscriptions in the registry's view have changed."""
        hosted = self._catalog.find(agent_type)
        if hosted is None:
            return
        hosted.set_rules(self._rules(agent_type))
        if self._active:
            self._tasks.spawn(self._follow(agent_type))

    def durable_changed(self) -> None:
        """Called when other topics are durable: no type is subscribed to those, whose events come from streams."""
        self._copies.update()
        self._events.copies = self._copies if self._copies.exist else None
        if self._active:
            for hosted in self._catalog:
                self._tasks.spawn(self._follow(hosted.agent_type))

    def _rules(self, agent_type: str) -> Sequence[Rule]:
        """The rules of the view, then those that this runtime added and others have removed, because they took this
        worker for dead. It declares them again, and meanwhile no event that it gets is dropped."""
        rules = dict.fromkeys(self._registry.view.rules(agent_type))
        return tuple(rules | dict.fromkeys(self._declarations.rules(agent_type)))

    async def _follow(self, agent_type: str) -> None:
        while self._active and (hosted := self._catalog.find(agent_type)) is not None:
            try:
                await self._apply(hosted)
            except (StreamUnavailable, PermissionDenied) as error:
                logger.warning("serving %s: %s; it is tried again", agent_type, error)
                await asyncio.sleep(_AGAIN)
                continue
            except ConfigurationError as error:
                logger.error("%s", error)
            except NatsrtError as error:  # reconnecting; a new view is read afterwards, which calls this again
                logger.debug("serving %s: %s", agent_type, error)
            except Exception:
                logger.exception("serving agent type %s failed", agent_type)
            return

    async def _tell(self, served: Collection[_Served]) -> None:
        """Wait until the server has their subscriptions: one round trip, or nothing if none has changed.

        A new connection gets them by itself. Raises `SubscriptionRefused` or `PermissionDenied` if the server has
        refused one.
        """
        states = [(one, (one.changes, self._connection.reconnects)) for one in served]
        if any(one.told != state for one, state in states):
            await self._connection.round_trip(_CONNECTED_WITHIN)
            for one, state in states:
                one.told = state
        for one in served:
            for interest in one.interests.values():
                interest.check()

    async def _apply(self, hosted: HostedType) -> _Served:
        """Change the NATS subscriptions of a type according to the view."""
        served = self._served.setdefault(hosted.agent_type, _Served())
        async with served.lock:
            hosted.set_rules(self._rules(hosted.agent_type))
            rules = hosted.rules
            custom = self._declarations.custom(hosted.agent_type)
            keys = tuple(hosted.live) if hosted.has_instances_only else (None,)
            durable = self._registry.view.durable
            beside = _Beside(keys, tuple(subscription.id for subscription in custom), durable)
            # A view lists new rules last. If only the new ones are processed, the cost of adding a rule does not grow
            # with the number of rules.
            old = len(served.rules)
            only_more = served.beside == beside and rules[:old] == served.rules
            wanted = dict(self._wanted(hosted, keys, rules[old:] if only_more else rules, custom))
            for place, route in wanted.items():
                if place not in served.interests:
                    served.changes += 1
                    served.interests[place] = await self._connection.subscribe(
                        place[0], self._intake.sink(route), queue=place[1]
                    )
            for place in () if only_more else [p for p in served.interests if p not in wanted]:
                served.changes += 1
                await self._connection.unsubscribe(served.interests.pop(place))
            served.rules, served.beside = rules, beside
            async with self._at_once:
                await self._durable.apply(hosted)
        return served

    def _wanted(
        self,
        hosted: HostedType,
        keys: Sequence[str | None],
        rules: Sequence[Rule],
        custom: Sequence[Subscription],
    ) -> Iterator[tuple[SubjectAndGroup, Route]]:
        subjects, agent_type = self._subjects, hosted.agent_type
        for key in keys:
            queue = subjects.queue(agent_type, key)
            calls = subjects.agent(agent_type) if key is None else subjects.instance(agent_type, key)
            yield (calls, queue), Route(CALL, hosted, self._replies, key)
            yield (subjects.control(agent_type, key), queue), Route(CONTROL, hosted, self._replies, key)
            if hosted.keyed is not None:
                yield (subjects.control_at(agent_type, self._worker_id), ""), Route(CONTROL, hosted, self._replies)
            event = Route(EVENT, hosted, self._events, key)
            for rule in rules:
                if rule.kind != "custom" and not self._copies.take_all(rule):
                    try:
                        place = (rule.subject(subjects, key), queue)
                    except ValueError as error:  # added by another runtime; the type's other subscriptions must work
                        logger.error("a subscription of agent type %s cannot be served: %s", agent_type, error)
                    else:
                        yield place, event
        for subscription in custom:
            # A separate queue group: workers without an equal subscription object cannot evaluate it.
            for key in keys:
                queue = f"{subjects.queue(agent_type, key)}.custom.{Rule.of(subscription).digest}"
                yield (subjects.everything, queue), Route(EVENT, hosted, self._events, key, custom=subscription)

    # -- as a NATS service ---------------------------------------------------------------------------------------

    def endpoints(self) -> list[ServiceEndpoint]:
        """Return each hosted type as an endpoint of this worker's service."""
        return [
            ServiceEndpoint(
                name=service_name(hosted.agent_type),
                subject=self._subjects.agent(hosted.agent_type),
                queue_group=self._subjects.queue(hosted.agent_type),
                metadata={
                    "agent_type": hosted.agent_type,
                    "handles": ", ".join(hosted.handles.names),
                    "live_agents": str(len(hosted.live)),
                },
                counters=hosted.counters,
            )
            for hosted in self._catalog
        ]
