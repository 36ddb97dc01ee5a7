"""One run of a runtime, from start to stop. Its parts are started in one order and stopped in the reverse order."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from autogen_core import AgentId
from nats.nuid import NUID
from opentelemetry.trace import TracerProvider

from natsrt.assembly import Incoming, Network, Outgoing, Program
from natsrt.background import end_tasks
from natsrt.errors import UndeliveredCall
from natsrt.hosting.dispatch import Dispatch
from natsrt.hosting.intake import Intake
from natsrt.jetstream.agent_records import AgentRecords
from natsrt.jetstream.dead_letter_box import DeadLetterBox
from natsrt.jetstream.registry.registry import Registry
from natsrt.keyed.operations import KeyedOperations
from natsrt.keyed.ownership import Ownership
from natsrt.membership import Membership
from natsrt.observe.event_errors import EventErrors
from natsrt.observe.health import Counts, Health
from natsrt.observe.metrics import Counters
from natsrt.observe.services import Services, service_name
from natsrt.observe.telemetry import telemetry_for
from natsrt.sending.arrivals import Arrivals
from natsrt.transport.calls import Calls
from natsrt.transport.connection import Connection
from natsrt.transport.peers import alive_within
from natsrt.transport.plain import PlainMessages
from natsrt.version import VERSION

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_HAND_OVER_WITHIN = 10.0
"""Maximum time to store and release agents after their handlers have ended, in seconds. Writes to JetStream fail for up
to 7.5 s while a cluster elects a leader."""
_HEARD_WITHIN = 0.2
"""Seconds until all other runtimes have been told that a worker stops. For that time the worker stays subscribed for
the agents that it owns. Otherwise senders might not notice that an agent's subject has no subscriber, because a tap
prevents the "no responders" message."""
_SENT_WITHIN = 1.0
"""Seconds for which a stop lets events wait for the owners of their agents before this worker drains, and at least once
its handlers have ended."""
_LONGEST_PAUSE = 0.02
"""Maximum time between two checks in `Session.wait_idle`, in seconds."""


class Session:
    """One run of a runtime. It cannot be started again after it was stopped."""

    def __init__(
        self, program: Program, tracer_provider: TracerProvider | None, network: type[Network] = Network
    ) -> None:
        options = self._options = program.options
        self._program = program
        self.name: str = options.name or socket.gethostname() or "worker"
        self.worker_id: str = f"{service_name(self.name)[:60]}-{NUID().next().decode()[-10:]}"
        self.counters: Counters = Counters(program.catalog.counters)
        telemetry = telemetry_for(tracer_provider, self.worker_id)
        self.network: Network = network(options, self.worker_id)
        self.event_errors: EventErrors = EventErrors(options)
        self.outgoing: Outgoing = Outgoing(
            program, self.network, counters=self.counters, event_errors=self.event_errors, telemetry=telemetry
        )
        self.incoming: Incoming = Incoming(
            program,
            self.network,
            self.outgoing,
            worker_id=self.worker_id,
            counters=self.counters,
            event_errors=self.event_errors,
            telemetry=telemetry,
        )
        self.plain: PlainMessages = PlainMessages(
            self.network.connection, self.network.inbox, options, program.plain, self.incoming.reply_subjects
        )
        self._services = Services(
            self.network.connection,
            replies=self.incoming.reply_subjects,
            name=self.name,
            worker_id=self.worker_id,
            version=VERSION,
            metadata={"worker_id": self.worker_id, "namespace": options.namespace, "pid": str(os.getpid())},
            endpoints=self.incoming.subscriptions,
        )
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        """The event loop in which everything of this session runs."""
        self.membership: Membership = Membership(
            program, self.network, self.incoming, self._services, name=self.name, worker_id=self.worker_id
        )
        # Used by the runtime and its tools. These are attributes, not properties, because `send_message` reads them for
        # every message.
        self.connection: Connection = self.network.connection
        self.registry: Registry = self.network.registry
        self.calls: Calls = self.network.calls
        self.records: AgentRecords = self.network.records
        self.dead_letters: DeadLetterBox = self.network.dead_letter_box
        self.arrivals: Arrivals = self.outgoing.arrivals
        self.intake: Intake = self.incoming.intake
        self.dispatch: Dispatch = self.incoming.dispatch
        self.ownership: Ownership = self.incoming.ownership
        self.operations: KeyedOperations = self.incoming.operations
        self._stack = AsyncExitStack()
        self._began = time.monotonic()
        self._stopping = False
        self._drain_timeout = options.drain_timeout
        self._drain_until = 0.0
        """When ``drain_timeout`` seconds since the begin of the stop are over, by the event loop's clock."""
        self._abort = asyncio.Event()
        self.cut_short: int = 0
        """Number of handlers that the stop has cancelled."""

    # -- lifecycle -----------------------------------------------------------------------------------------------

    def _parts(self) -> tuple[tuple[Callable[[], Awaitable[None]] | None, Callable[[], Awaitable[None]]], ...]:
        """The parts, each as its start and stop functions. They are started from top to bottom and stopped from bottom
        to top.

        None as the start function: the part is started elsewhere (several by `Membership`, when this process hosts its
        first agent type), or needs no start. A stop function must have no effect if its part was not started, and must
        work if the start was incomplete.
        """
        network, incoming = self.network, self.incoming
        return (
            (network.connection.open, network.connection.close),
            (network.inbox.start, network.inbox.stop),
            (network.cancellations.start, network.cancellations.stop),
            (network.calls.start, network.calls.stop),
            (self._open_registry, network.registry.close),
            (None, network.blobs.stop),
            (None, network.tasks.stop),
            (None, incoming.call_log.stop),
            (None, incoming.streams.stop),
            (None, incoming.peer_answers.stop),
            (incoming.view_answers.start, incoming.view_answers.stop),
            (incoming.blob_answers.start, incoming.blob_answers.stop),
            (None, self.outgoing.delivery.stop),
            (None, self.outgoing.publisher.stop),
            (None, self.outgoing.tickets.stop),
            (None, self.outgoing.streams.stop),
            (None, incoming.ownership.stop),
            (None, incoming.deadlocks.stop),
            (None, self._services.stop),
            (None, incoming.intake.stop),
            (self.membership.start, self.membership.stop),
            (None, incoming.durable.close),
            (None, self._finish_handlers),
            (incoming.subscriptions.start, incoming.subscriptions.stop),
            (self.membership.confirm, self._announce_stop),
            (None, self.outgoing.arrivals.stop),
            (self.plain.start, self._finish_plain),
        )

    async def _open_registry(self) -> None:
        await self.registry.open()
        await self.network.streams.open()

    async def start(self, abort: asyncio.Event) -> None:
        """Connect, read the registry, and serve the hosted agent types. If the start fails, it is undone completely.

        If messages have been accepted before the start fails, they are finished as in `stop`, until ``abort`` is set.
        """
        self._abort = abort
        readiness = self.network.readiness
        try:
            for start, stop in self._parts():
                self._stack.push_async_callback(stop)
                if start is not None:
                    await start()
        except BaseException as error:
            try:
                await self._stack.aclose()
            except Exception:
                logger.exception("%s: a failed start could not be undone completely", self.worker_id)
            readiness.fail(error if isinstance(error, Exception) else RuntimeError("the start was cancelled"))
            raise
        readiness.succeed()

    async def stop(self, drain_timeout: float) -> None:
        """Stop accepting messages, finish the accepted ones within ``drain_timeout`` seconds, leave the registry, and
        disconnect. Events that wait for the owners of their agents are sent within this time, too.

        Every part is stopped, even if another one raises. The exception is raised at the end.
        """
        self._stopping = True
        self._drain_timeout = drain_timeout
        self._drain_until = self.loop.time() + drain_timeout
        try:
            await self._stack.aclose()
        finally:
            self.network.readiness.started = False
        logger.info("%s: stopped", self.worker_id)

    async def _finish_plain(self) -> None:
        """The first step of a stop: take no more plain messages, and finish those that may need agents of this worker.

        What is left of ``drain_timeout`` is for the agents' handlers.
        """
        began = self.loop.time()
        self.cut_short = await self.plain.stop(self._drain_timeout, self._abort)
        self._drain_timeout = max(0.0, self._drain_timeout - (self.loop.time() - began))

    async def _announce_stop(self) -> None:
        """The second step of a stop: send the waiting events while this worker still accepts those for its agents."""
        await self.outgoing.delivery.finish(min(_SENT_WITHIN, self._drain_timeout), self._abort)
        logger.info("%s: accepting no more messages", self.worker_id)
        await self.membership.drain()

    async def _finish_handlers(self) -> None:
        """The step of a stop after the last message was accepted: wait for the handlers, and release the agents."""
        incoming = self.incoming
        incoming.call_log.accept_all()
        logger.info("%s: finishing %d handlers", self.worker_id, incoming.dispatch.running)
        incoming.ownership.begin_drain()
        if incoming.ownership.owns_some and self.network.connection.connected:
            await asyncio.sleep(_HEARD_WITHIN + self.connection.rtt.allowance)
        handing_over = asyncio.ensure_future(incoming.ownership.drain())
        try:
            self.cut_short += await incoming.dispatch.finish(self._drain_timeout, self._abort)
            # The handlers have ended, so only writing the agents' states and records remains.
            await asyncio.wait({handing_over}, timeout=_HAND_OVER_WITHIN)
            if not handing_over.done():
                logger.warning(
                    "%s: some agents were not released, and remain until other workers claim them",
                    self.worker_id,
                )
        finally:
            await end_tasks(handing_over)
        await self.outgoing.delivery.finish(max(_SENT_WITHIN, self._drain_until - self.loop.time()), self._abort)

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """True if this runtime is started, connected, in step with the registry, and not stopping."""
        return not self._obstacles()

    def _obstacles(self) -> tuple[str, ...]:
        """The reasons why it is not ready, one sentence each; empty if it is ready."""
        if self._stopping:
            running = self.incoming.dispatch.running
            return (f"It is draining: it accepts no new messages, and finishes {running} handlers.",)
        starting = () if self.network.readiness.started else ("Its start is not complete.",)
        if not self.connection.connected:
            servers = ", ".join(self._options.safe_servers)
            told = f"It is not connected to {servers}; it keeps trying. {self.connection.why_refused}"
            return (*starting, told.rstrip())
        if refusals := self.connection.refusals:
            more = f", and {len(refusals) - 1} more" if len(refusals) > 1 else ""
            said = f"The server refuses a subscription to {refusals[0].subject!r}{more}"
            starting = (*starting, f"{said}: it says {self.connection.server_error!r}.")
        if conflict := self.registry.conflict:
            starting = (*starting, conflict)
        if problem := self.records.problem:
            starting = (*starting, f"{problem[0].upper()}{problem[1:]}.")
        if self.registry.synced:
            return starting
        return (*starting, f"It is not in step with the registry. {self.registry.problem}".rstrip())

    @property
    def _jetstream_full(self) -> str | None:
        now = self.loop.time()
        full = self.records.full(now) or self.registry.full(now)
        return None if full is None else str(full)

    def health(self) -> Health:
        """Return the health of a started runtime."""
        obstacles = self._obstacles()
        connection, registry, intake = self.connection, self.registry, self.intake
        waiting = self.incoming.places.waiting
        return Health(
            live=True,
            ready=not obstacles,
            reasons=obstacles,
            worker_id=self.worker_id,
            uptime_seconds=time.monotonic() - self._began,
            draining=self._stopping,
            server=connection.server if connection.connected else None,
            connected=connection.connected,
            server_error=connection.server_error,
            jetstream_full=self._jetstream_full,
            dead_letters_kept=self.dead_letters.measured,
            retries_waiting=self.incoming.durable.retries_waiting,
            tasks_waiting=self.incoming.durable.tasks_waiting,
            jetstream_usage=registry.usage | self.records.usage,
            in_step=registry.synced,
            workers=len(registry.view.workers),
            foreign_registry=str(registry.foreign) if registry.foreign is not None else None,
            agents={hosted.agent_type: len(hosted.live) for hosted in self._program.catalog},
            handlers_running=self.dispatch.running - waiting,
            messages_queued=intake.queued + waiting,
            pending_bytes=intake.pending_bytes,
            max_pending_bytes=self._options.max_pending_bytes,
            calls_pending=self.calls.pending,
            sends_under_way=self.outgoing.under_way,
            **self.counts(),
        )

    def counts(self) -> Counts:
        """Return what was counted since the start of this session. They stay after its end."""
        counters = self.counters
        return Counts(
            reconnects=self.connection.reconnects,
            messages_handled=counters.messages_handled,
            messages_failed=counters.messages_failed,
            dropped_events=counters.dropped_events,
            undelivered_events=counters.undelivered_events,
            undecodable=self.undecodable,
            unknown_payloads=counters.unknown_payloads,
            refused_replies=counters.refused_replies,
            state_conflicts=counters.state_conflicts,
            redelivered=counters.redelivered,
            dead_letters=counters.dead_letters,
        )

    @property
    def undecodable(self) -> int:
        """Number of messages that could not be read, on any subject."""
        return self.counters.undecodable + self.connection.undecodable

    @property
    def idle(self) -> bool:
        """True if nothing is queued, running or awaited in this runtime."""
        return not (self.intake.queued or self.dispatch.running or self.outgoing.under_way or self.plain.handling)

    async def is_idle(self) -> bool:
        """True if nothing is queued, running or awaited here, both before and after a round trip to the server, and no
        stream has an event of a durable topic that waits to be pulled by an agent type of this runtime.

        Waits for the connection if it is lost. Raises `ServerUnreachable` after ``offline_timeout`` seconds.
        """
        if not self.idle:
            return False
        seen = (self.counters.taken_in, self.counters.sent)
        await self.connection.round_trip(self._options.offline_timeout)
        await asyncio.sleep(0)
        waiting = await self.incoming.durable.has_waiting()
        return not waiting and self.idle and seen == (self.counters.taken_in, self.counters.sent)

    async def wait_idle(self) -> None:
        """Wait until `is_idle` is true. Raises as it does."""
        pause = 0.001
        while not await self.is_idle():
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    # -- used by the runtime -------------------------------------------------------------------------------------

    async def control(self, agent: AgentId, operation: str, data: Any = None) -> Any:
        """Carry out a control operation on an agent of another worker, or on a keyed agent of any worker."""
        subjects = self.network.subjects
        if self.registry.is_keyed(agent.type):
            owner = (await self.outgoing.locator.locate(agent)).worker_id
            return await self.outgoing.calls.control(agent, subjects.control_at(agent.type, owner), operation, data)
        holders = self.registry.view.instance_holders(agent.type, agent.key)
        subject = subjects.control(agent.type, agent.key if holders else None)
        if not await self.network.peers.has_listener(subject):
            await self._check_control(agent, subject)
        return await self.outgoing.calls.control(agent, subject, operation, data)

    async def _check_control(self, agent: AgentId, subject: str) -> None:
        """Raise `UndeliveredCall` if the agent's workers are there, though nobody listens on its control subject."""
        workers = self.registry.view.takers_of(agent)
        for worker_id in workers:
            if not await self.network.peers.alive(worker_id, alive_within(self._options)):
                return  # it may be reconnecting, or gone: the call finds out
        if workers and not await self.network.peers.has_listener(subject):
            raise UndeliveredCall(
                str(agent),
                f"worker {', '.join(workers)} does not answer control messages for {agent} (metadata, state): "
                f"it is alive, but nobody listens on {subject}",
            )

    def exempt(self, task: asyncio.Task[Any] | None, chain: tuple[str, ...]) -> None:
        """Do not let a stop wait for ``task``, if it is the task of a handler, or for the handlers in ``chain``.

        They wait for the stop themselves.
        """
        self.dispatch.exempt(task)
        self.plain.exempt(task)
        self.ownership.exempt(chain)

    def take_event_error(self) -> BaseException | None:
        """Return the first error of an event, once; None if there was none, or if they are ignored."""
        return self.event_errors.take()
