"""Everything of a runtime that lives between start and stop: connection, registry view, calls, and the hosting side.

A process becomes a *worker* when it hosts its first agent type: it joins the registry, listens on its own subject and
shows itself as a NATS service. A runtime that only calls and publishes never does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from autogen_core import AgentId, AgentRuntime, Subscription
from nats.nuid import NUID
from opentelemetry.trace import TracerProvider

from natsrt.errors import NatsrtError, SubscriptionNotServed
from natsrt.hosting.asking import Answering, Asking
from natsrt.hosting.catalog import Catalog, HostedType
from natsrt.hosting.deadlocks import Deadlocks
from natsrt.hosting.declarations import Declarations
from natsrt.hosting.dispatch import Dispatch
from natsrt.hosting.fates import Fates
from natsrt.hosting.interventions import Interventions
from natsrt.hosting.keyed import Keyed
from natsrt.hosting.owning import Owning
from natsrt.hosting.pulse import Pulse
from natsrt.hosting.reading import Reading
from natsrt.hosting.replies import Replies
from natsrt.hosting.sending import Sending
from natsrt.hosting.serving import Serving
from natsrt.jetstream.agents import AgentRecords
from natsrt.jetstream.entries import NOBODY, Entry, InstanceEntry, KnownEntry, Rule, SubscriptionEntry, WorkerEntry
from natsrt.jetstream.registry import Registry
from natsrt.observe.health import Health
from natsrt.observe.services import Endpoint, Services, service_name
from natsrt.observe.telemetry import telemetry_for
from natsrt.options import Options
from natsrt.transport.calls import Calls
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.connection import Connection, Interest
from natsrt.version import VERSION
from natsrt.wire.failures import ErrorTypes
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects

logger = logging.getLogger("natsrt.hosting")

_HAND_OVER_WITHIN = 10.0
"""Seconds that agents may take to be stored and released after their handlers have ended."""
_HEARD_WITHIN = 0.2
"""Seconds until other runtimes have heard that a worker stops: so long it listens for the agents that it owns, because
a tap hides from senders that nobody listens any more."""
_SENT_WITHIN = 1.0
"""Seconds for which events may wait until the owners of their agents are known, while this worker stops."""


class Worker:
    """One life of a runtime, from start to stop."""

    def __init__(
        self,
        runtime: AgentRuntime,
        options: Options,
        *,
        catalog: Catalog,
        serialization: Serialization,
        interventions: Interventions,
        error_types: ErrorTypes,
        subscriptions: Declarations,
        tracer_provider: TracerProvider | None,
    ) -> None:
        self.name = options.name or socket.gethostname() or "worker"
        self.worker_id = f"{service_name(self.name)[:60]}-{NUID().next().decode()[-10:]}"
        self._options = options
        self._subjects = Subjects(options.namespace)
        self._catalog = catalog
        self._declarations = subscriptions
        self.connection = Connection(options, client_name=f"natsrt {self.worker_id}")
        self.cancellations = Cancellations(self.connection, self._subjects.cancel)
        self.registry = Registry(
            self.connection,
            self._subjects,
            options,
            on_rules_changed=self._rules_changed,
            on_removed=self._declarations.removed_by_others,
            on_evicted=self._evicted,
            ask_worker=lambda worker_id: self._asking.alive(worker_id),
        )
        self.calls = Calls(self.connection, options, self.registry)
        self._asking = Asking(self.calls, self._subjects)
        self.records = AgentRecords(self.connection, self._subjects, options)
        self.sending = Sending(
            connection=self.connection,
            subjects=self._subjects,
            options=options,
            calls=self.calls,
            registry=self.registry,
            serialization=serialization,
            cancellations=self.cancellations,
            interventions=interventions,
            replies=Replies(serialization, error_types, catalog.produced_here),
            ready=self._wait_ready,
            is_ready=lambda: self._started and self.connection.connected,
        )
        self._deadlocks = Deadlocks(
            active=lambda: self.dispatch.active,
            awaited=self.calls.awaited,
            others=lambda: self.registry.view.workers.keys() - {self.worker_id},
            ask=self._asking.links,
        )
        self.owning = Owning(
            connection=self.connection,
            options=options,
            worker_id=self.worker_id,
            catalog=catalog,
            registry=self.registry,
            calls=self.calls,
            records=self.records,
            listen=lambda hosted, key: self._serving.listen(hosted, key),
            ask=self._asking.grip,
            locate=self.sending.passing.locate,
            deadlocks=self._deadlocks,
        )
        self.keyed = Keyed(self.owning, catalog)
        self._fates = Fates(options, self.worker_id, self.connection.publish)
        self.dispatch = Dispatch(
            connection=self.connection,
            subjects=self._subjects,
            options=options,
            worker_id=self.worker_id,
            catalog=catalog,
            serialization=serialization,
            reading=Reading(
                subjects=self._subjects,
                catalog=catalog,
                serialization=serialization,
                cancellations=self.cancellations,
                interventions=interventions,
                infer_types=options.infer_types,
                custom_of=subscriptions.custom,
            ),
            fates=self._fates,
            keyed=self.keyed,
            sending=self.sending,
        )
        self._serving = Serving(
            self.connection,
            self._subjects,
            catalog,
            self.dispatch.intake,
            worker_id=self.worker_id,
            rules_of=lambda agent_type: self.registry.view.rules(agent_type),
            custom_of=subscriptions.custom,
        )
        self._answering = Answering(
            connection=self.connection,
            subjects=self._subjects,
            fates=self._fates,
            owning=self.owning,
            deadlocks=self._deadlocks,
            serve=self._serve,
            refuse=self.dispatch.answer_error,
            spawn=self._spawn,
        )
        self._services = Services(
            self.connection,
            name=self.name,
            worker_id=self.worker_id,
            version=VERSION,
            metadata={"worker_id": self.worker_id, "namespace": options.namespace, "pid": str(os.getpid())},
            endpoints=self._endpoints,
            spawn=self._spawn,
            is_reserved=self._subjects.is_reserved,
        )
        telemetry = telemetry_for(tracer_provider, self.worker_id)
        self.dispatch.telemetry = self.sending.telemetry = telemetry
        # The registry takes a worker for dead when its heartbeats have ended for so long, and not before.
        self._pulse = Pulse(options.heartbeat_ttl - options.heartbeat_interval, self._stood_still)
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the start has ended, for those who wait for it: with its failure, if it failed."""
        self._began = time.monotonic()
        self._started = False
        self._stopping = False
        self._interest: Interest | None = None
        self._joined = False
        self._tasks: set[asyncio.Task[None]] = set()

    # -- lifecycle -----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether this runtime is connected, in step with the registry, and serves what it hosts."""
        return not self._obstacles()

    def _obstacles(self) -> tuple[str, ...]:
        """Why it is not ready, a sentence each; none if it is."""
        if self._stopping:
            return (f"It is draining: it takes no new messages, and finishes {self.dispatch.running} handlers.",)
        starting = () if self._started else ("Its start is not complete.",)
        if not self.connection.connected:
            return (*starting, f"It is not connected to {', '.join(self._options.safe_servers)}; it keeps trying.")
        return starting if self.registry.synced else (*starting, "It is not in step with the registry.")

    def health(self) -> Health:
        """What there is to say about this life of the runtime."""
        obstacles, intake = self._obstacles(), self.dispatch.intake
        statistics = [hosted.statistics for hosted in self._catalog]
        return Health(
            live=True,
            ready=not obstacles,
            reasons=obstacles,
            worker_id=self.worker_id,
            uptime_seconds=time.monotonic() - self._began,
            draining=self._stopping,
            server=self.connection.server if self.connection.connected else None,
            connected=self.connection.connected,
            reconnects=self.connection.reconnects,
            in_step=self.registry.synced,
            workers=len(self.registry.view.workers),
            agents={hosted.agent_type: len(hosted.live) for hosted in self._catalog},
            messages_handled=sum(one.requests for one in statistics),
            messages_failed=sum(one.errors for one in statistics),
            handlers_running=self.dispatch.running,
            messages_queued=intake.queued,
            pending_bytes=intake.pending_bytes,
            max_pending_bytes=self._options.max_pending_bytes,
            dropped_events=intake.dropped_events,
            undelivered_events=self.sending.passing.undelivered,
            undecodable=self.undecodable,
            unknown_payloads=self.dispatch.unknown_payloads,
            calls_pending=self.calls.pending,
            sends_under_way=self.sending.under_way,
        )

    async def start(self, abort: asyncio.Event) -> None:
        """Connect, read the registry, serve what is hosted. Leaves nothing behind when it fails.

        A start that fails late finishes what it took by then, as `stop` does, until ``abort``.
        """
        try:
            await self.connection.open()
            await self.cancellations.start()
            await self.calls.start()
            await self.registry.open()
            self._refuse_mixtures()
            if any(True for _ in self._catalog):
                await self._join()
            if any(hosted.keyed for hosted in self._catalog):
                await self.owning.start()
            entries = [self._entry(subscription) for subscription in self._declarations]
            await self._declare(entries)
            await self._withdraw(self._declarations.unowned.difference(entry.key for entry in entries))
            await self._serving.start()
            await self._confirm_at_start(entries)
            await self.connection.barrier()
        except BaseException as error:
            await self._serving.stop()
            await self.dispatch.finish(self._options.drain_timeout, abort)  # what was taken by then
            await self._tear_down()
            failure = error if isinstance(error, Exception) else RuntimeError("the start was cancelled")
            self._outcome.set_exception(failure)
            self._outcome.exception()  # whoever waits gets it; nobody has to
            raise
        self._started = True
        self._outcome.set_result(None)

    async def stop(self, drain_timeout: float, abort: asyncio.Event) -> None:
        """Stop taking messages, finish what was taken, leave the registry, close. Bounded by ``drain_timeout``."""
        self._stopping = True
        try:
            await self.sending.passing.finish(_SENT_WITHIN)  # while this worker can still take what is for itself
            logger.info("%s: stops taking messages", self.worker_id)
            if self._joined and self.connection.connected:
                try:
                    await self.registry.drain()
                except NatsrtError as error:
                    logger.warning("other runtimes do not learn that this worker stops: %s", error)
            await self._serving.stop()
            self._fates.accept_all()
            logger.info("%s: finishes %d handlers", self.worker_id, self.dispatch.running)
            self.owning.draining = True
            if self.owning.owns_some and self.connection.connected:
                await asyncio.sleep(_HEARD_WITHIN)
            handing_over = asyncio.ensure_future(self.owning.drain())
            await self.dispatch.finish(drain_timeout, abort)
            await self._hand_over(handing_over)
            await self.sending.passing.finish(_SENT_WITHIN)
            if self._joined and self.connection.connected:
                try:
                    await self.registry.leave()
                except NatsrtError as error:
                    logger.warning("this worker's entries stay until others remove them: %s", error)
        finally:  # whatever happens, nothing of this life goes on
            await self._tear_down()
        logger.info("%s: stopped", self.worker_id)

    async def _hand_over(self, handing_over: asyncio.Future[None]) -> None:
        """Wait until nobody here owns an agent any more: handlers have ended, so this is a matter of writing."""
        await asyncio.wait({handing_over}, timeout=_HAND_OVER_WITHIN)
        if not handing_over.done():
            logger.warning("%s: agents that could not be handed over are left to whoever finds them", self.worker_id)
            handing_over.cancel()
        await asyncio.gather(handing_over, return_exceptions=True)

    async def _tear_down(self) -> None:
        self._started = False
        self._pulse.stop()
        await self._deadlocks.stop()
        await self.owning.stop()
        await self.sending.passing.stop()
        await self._services.stop()
        await self._fates.stop()
        await self.calls.stop()
        await self.cancellations.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.registry.close()
        if self._interest is not None:
            await self.connection.unsubscribe(self._interest)
            self._interest = None
        await self.connection.close()

    def _refuse_mixtures(self) -> None:
        """A type is keyed on all workers or on none: members of one queue group must agree who has an agent."""
        for hosted in self._catalog:
            self.refuse_mixture(hosted.agent_type, hosted.keyed is not None)

    def refuse_mixture(self, agent_type: str, keyed: bool) -> None:
        """Raises ValueError where other workers host the type, and hold it for keyed, or not, otherwise than here."""
        view = self.registry.view
        others = [worker_id for worker_id in view.workers_hosting(agent_type) if worker_id != self.worker_id]
        if any(view.hosts[agent_type][worker_id].keyed != keyed for worker_id in others):
            there, here = ("not keyed", "keyed") if keyed else ("keyed", "not keyed")
            raise ValueError(
                f"The agent type {agent_type!r} is {there} on worker {others[0]}, so it cannot be {here} here."
            )

    async def _join(self) -> None:
        """Become a worker, once."""
        if self._joined:
            return
        self._joined = True
        self._pulse.start()
        self._interest = await self.connection.subscribe(
            self._subjects.worker(self.worker_id), self._answering.on_question
        )
        await self._services.start()
        await self.connection.barrier()
        await self.registry.join(
            WorkerEntry(self.worker_id, self.name, socket.gethostname(), os.getpid(), time.time(), VERSION)
        )
        await self.registry.declare([entry for hosted in self._catalog for entry in hosted.entries(self.worker_id)])

    async def _wait_ready(self, begun: float) -> None:
        """For a send that began at ``begun``: ``offline_timeout`` counts from then, its time in line too."""
        await asyncio.shield(self._outcome)
        await self.connection.wait_connected(self._options.offline_timeout, begun)

    @property
    def undecodable(self) -> int:
        """Messages that could not be read, on whatever subject they came."""
        return self.dispatch.undecodable + self.connection.undecodable

    @property
    def idle(self) -> bool:
        """Nothing queued, running or awaited here."""
        return not (self.dispatch.intake.queued or self.dispatch.running or self.sending.under_way)

    async def wait_idle(self) -> None:
        """Return when a full round trip through the server finds nothing queued, running or awaited here."""
        pause = 0.001
        while True:
            if not self.idle:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.02)
                continue
            pause = 0.001
            seen = (self.dispatch.intake.taken, self.sending.sent)
            try:
                await self.connection.barrier()
            except NatsrtError:
                await self.connection.wait_connected(self._options.offline_timeout)
                continue
            await asyncio.sleep(0)
            if self.idle and seen == (self.dispatch.intake.taken, self.sending.sent):
                return

    # -- agent types and subscriptions ---------------------------------------------------------------------------

    async def host(self, hosted: HostedType) -> None:
        """A type, or another instance of it, was registered while running."""
        await self._join()
        if hosted.keyed is not None:
            await self.owning.start()
        await self.registry.declare(hosted.entries(self.worker_id))
        moved = self._declarations.of(hosted.agent_type)
        if moved:  # added before the type was hosted: from now on this worker declares them
            await self._declare([self._entry(s) for s in moved])
            await self._withdraw([self._entry(s, NOBODY).key for s in moved])
        await self._serving.serve(hosted.agent_type)

    async def abandon(self, hosted: HostedType, key: str | None = None, *, ended: Sequence[Subscription] = ()) -> None:
        """Stop hosting a type, or with ``key`` one instance of it. What it handles stays known.

        With the type end the subscriptions in ``ended``; what else this runtime added for it belongs to nobody then.
        """
        entries: list[Entry] = [e for e in hosted.entries(self.worker_id) if not isinstance(e, KnownEntry)]
        left: Sequence[Subscription] = ()
        if key is not None and len(hosted.live) > 1:
            entries = [e for e in entries if isinstance(e, InstanceEntry) and e.agent_key == key]
        else:
            await self._serving.end(hosted.agent_type)
            self.owning.leave(hosted.agent_type)
            left = self._declarations.of(hosted.agent_type)
            entries += [self._entry(subscription, self.worker_id) for subscription in (*ended, *left)]
        try:
            await self._declare([self._entry(subscription, NOBODY) for subscription in left])
            await self._withdraw([entry.key for entry in entries])
        except NatsrtError as error:
            logger.warning("entries of %s stay behind: %s", hosted.agent_type, error)

    async def subscribe(self, subscription: Subscription) -> None:
        """Store a subscription, and return when every live worker of its agent type serves it.

        Raises `SubscriptionNotServed` after ``subscription_timeout`` seconds.
        """
        entry = self._entry(subscription)
        await self._declare([entry])
        await self._confirm(entry.agent_type)

    async def forget(self, subscription: Subscription) -> None:
        """Undo a `subscribe` that did not come to its end, as far as the registry can be reached."""
        try:
            await self._withdraw([self._entry(subscription).key])
        except NatsrtError as error:
            logger.warning("a subscription that was not completed stays behind: %s", error)

    async def unsubscribe(self, subscription: Subscription, *, stored: Callable[[Subscription], None]) -> None:
        """Remove a subscription of this runtime, and return when every live worker knows.

        ``stored`` is called once the registry has removed it: from then on it is gone, whatever follows.
        """
        entry = self._entry(subscription)
        await self._withdraw([entry.key])
        stored(subscription)
        await self._confirm(entry.agent_type)

    async def unsubscribe_foreign(self, subscription_id: str) -> bool:
        """Remove a subscription that a runtime without the agent type added. False if there is none of this id."""
        for entry in list(self.registry.view.subscriptions()):
            if entry.subscription_id == subscription_id and entry.declarer == NOBODY:
                await self._withdraw([entry.key])
                await self._confirm(entry.agent_type)
                return True
        return False

    def _entry(self, subscription: Subscription, declarer: str | None = None) -> SubscriptionEntry:
        rule = Rule.of(subscription)
        if declarer is None:
            declarer = self.worker_id if rule.agent_type in self._catalog else NOBODY
        return SubscriptionEntry(rule.agent_type, rule.kind, rule.pattern, declarer, subscription.id)

    async def _declare(self, entries: Sequence[SubscriptionEntry]) -> None:
        self._declarations.unowned.update(entry.key for entry in entries if entry.declarer == NOBODY)
        await self.registry.declare(entries)

    async def _withdraw(self, keys: Collection[str]) -> None:
        await self.registry.withdraw(list(keys))
        self._declarations.unowned.difference_update(keys)

    async def _confirm(self, agent_type: str) -> None:
        """Serve the type as the view now says, and return when every live worker of it does."""
        await self._serving.serve(agent_type)
        others = [w for w in self.registry.view.workers_hosting(agent_type) if w != self.worker_id]
        revision = self.registry.view.applied
        answers = await asyncio.gather(*(self._serves(worker_id, agent_type, revision) for worker_id in others))
        silent = [worker_id for worker_id, serves in zip(others, answers, strict=True) if not serves]
        if silent:
            raise SubscriptionNotServed(agent_type, silent, self._options.subscription_timeout)

    async def _serves(self, worker_id: str, agent_type: str, revision: int) -> bool:
        """Whether a worker says that it serves what it is told, or is not there to serve anything."""
        if await self._asking.serves(worker_id, agent_type, revision, self._options.subscription_timeout):
            return True
        if worker_id not in self.registry.view.workers:
            return True
        if await self.calls.listens(self._subjects.worker(worker_id)):
            return False
        self.registry.suspect(worker_id)  # dead, or reconnecting: it serves what the registry says when it is back
        return True

    async def _confirm_at_start(self, entries: Sequence[SubscriptionEntry]) -> None:
        confirmations = (self._confirm(agent_type) for agent_type in {entry.agent_type for entry in entries})
        for outcome in await asyncio.gather(*confirmations, return_exceptions=True):
            if isinstance(outcome, SubscriptionNotServed):  # a frozen neighbour must not keep this worker from starting
                logger.warning("%s", outcome)
            elif outcome is not None:
                raise outcome

    async def _serve(self, agent_type: str, revision: int) -> None:
        """Another worker asks for it: serve the type as the registry says at ``revision``."""
        await asyncio.shield(self._outcome)
        await self.registry.shown(revision)
        await self._serving.serve(agent_type)

    def _stood_still(self) -> None:
        """Others may have taken this worker for dead: what waits at its socket may have been sent again."""
        logger.warning("%s: stood still for some seconds; calls that came in meanwhile are sent back", self.worker_id)
        self._spawn(self.dispatch.intake.stood_still(self.connection.barrier))

    def _evicted(self) -> None:
        """Another runtime took this worker for dead."""
        self.owning.doubt()

    def _rules_changed(self, agent_type: str) -> None:
        self._serving.rules_changed(agent_type)

    # -- small things --------------------------------------------------------------------------------------------

    async def control(self, agent: AgentId, operation: str, data: Any = None) -> Any:
        """A control operation on an agent of another worker, or, if it is keyed, wherever it lives."""
        if self.registry.is_keyed(agent.type):
            owner = (await self.sending.passing.locate(agent)).worker_id
            return await self.sending.control(agent, self._subjects.control_at(agent.type, owner), operation, data)
        holders = self.registry.view.instance_holders(agent.type, agent.key)
        subject = self._subjects.control(agent.type, agent.key if holders else None)
        return await self.sending.control(agent, subject, operation, data)

    def _endpoints(self) -> list[Endpoint]:
        endpoints = []
        for hosted in self._catalog:
            statistics = hosted.statistics
            endpoints.append(
                Endpoint(
                    name=service_name(hosted.agent_type),
                    subject=self._subjects.agent(hosted.agent_type),
                    queue_group=self._subjects.queue(hosted.agent_type),
                    metadata={
                        "agent_type": hosted.agent_type,
                        "handles": ", ".join(sorted(hosted.handles)),
                        "live_agents": str(len(hosted.live)),
                    },
                    requests=statistics.requests,
                    errors=statistics.errors,
                    busy_ns=statistics.busy_ns,
                    last_error=statistics.last_error,
                )
            )
        return endpoints

    def _spawn(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except NatsrtError as error:
                logger.warning("%s", error)
            except Exception:
                logger.exception("answering a message to this worker failed")

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
