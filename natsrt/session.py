"""One life of a runtime, from start to stop: its parts, started in one order and stopped in the reverse."""

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
from natsrt.errors import NatsrtError
from natsrt.membership import Membership
from natsrt.observe.health import Health
from natsrt.observe.metrics import Counters
from natsrt.observe.services import Services, service_name
from natsrt.observe.telemetry import telemetry_for
from natsrt.version import VERSION

logger = logging.getLogger("natsrt.hosting")

_HAND_OVER_WITHIN = 10.0
"""Seconds that agents may take to be stored and released after their handlers have ended. Writes to JetStream fail for
up to 7.5 s while a cluster elects a leader."""
_HEARD_WITHIN = 0.2
"""Seconds until other runtimes have heard that a worker stops. It listens for the agents that it owns for so long,
because a tap hides from senders that nobody listens any more."""
_SENT_WITHIN = 1.0
"""Seconds for which a stop lets events wait until the owners of their agents are known."""
_LONGEST_PAUSE = 0.02
"""Seconds between two looks of `Session.wait_idle` at most."""


class Session:
    """One life of a runtime. Cannot be started again after it was stopped."""

    def __init__(self, program: Program, tracer_provider: TracerProvider | None) -> None:
        options = self._options = program.options
        self._program = program
        self.name = options.name or socket.gethostname() or "worker"
        self.worker_id = f"{service_name(self.name)[:60]}-{NUID().next().decode()[-10:]}"
        self.counters = Counters(program.catalog.counters)
        telemetry = telemetry_for(tracer_provider, self.worker_id)
        self.network = Network(options, self.worker_id)
        self.outgoing = Outgoing(program, self.network, counters=self.counters, telemetry=telemetry)
        self.incoming = Incoming(
            program,
            self.network,
            self.outgoing,
            worker_id=self.worker_id,
            counters=self.counters,
            telemetry=telemetry,
        )
        self._services = Services(
            self.network.connection,
            subjects=self.network.subjects,
            name=self.name,
            worker_id=self.worker_id,
            version=VERSION,
            metadata={"worker_id": self.worker_id, "namespace": options.namespace, "pid": str(os.getpid())},
            endpoints=self.incoming.subscriptions,
        )
        self.membership = Membership(
            program, self.network, self.incoming, self._services, name=self.name, worker_id=self.worker_id
        )
        # What the runtime and its tools use. `send_message` passes here for every message: attributes, no properties.
        self.connection = self.network.connection
        self.registry = self.network.registry
        self.calls = self.network.calls
        self.records = self.network.records
        self.sender = self.outgoing.sender
        self.intake = self.incoming.intake
        self.dispatch = self.incoming.dispatch
        self.ownership = self.incoming.ownership
        self.operations = self.incoming.operations
        self._stack = AsyncExitStack()
        self._began = time.monotonic()
        self._stopping = False
        self._drain_timeout = options.drain_timeout
        self._abort = asyncio.Event()

    # -- lifecycle -----------------------------------------------------------------------------------------------

    def _parts(self) -> tuple[tuple[Callable[[], Awaitable[None]] | None, Callable[[], Awaitable[None]]], ...]:
        """What starts and how it stops: started from the top to the bottom, stopped from the bottom to the top.

        None: `Membership` starts it, as soon as this process hosts something. A stop must be harmless for a part that
        was not started, or only half.
        """
        network, incoming = self.network, self.incoming
        return (
            (network.connection.open, network.connection.close),
            (network.inbox.start, network.inbox.stop),
            (network.cancellations.start, network.cancellations.stop),
            (network.calls.start, network.calls.stop),
            (network.registry.open, network.registry.close),
            (None, incoming.call_log.stop),
            (None, incoming.peer_answers.stop),
            (None, self.outgoing.delivery.stop),
            (None, incoming.ownership.stop),
            (None, incoming.deadlocks.stop),
            (None, self._services.stop),
            (None, incoming.intake.stop),
            (self.membership.start, self.membership.stop),
            (None, self._finish_handlers),
            (incoming.subscriptions.start, incoming.subscriptions.stop),
            (self.membership.confirm, self._announce_stop),
        )

    async def start(self, abort: asyncio.Event) -> None:
        """Connect, read the registry, serve what is hosted. Leaves nothing behind when it fails.

        A start that fails late finishes the messages that it took by then, as `stop` does, until ``abort`` is set.
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
                logger.exception("%s: undoing a start that failed", self.worker_id)
            readiness.fail(error if isinstance(error, Exception) else RuntimeError("the start was cancelled"))
            raise
        readiness.succeed()

    async def stop(self, drain_timeout: float) -> None:
        """Stop taking messages, finish what was taken within ``drain_timeout`` seconds, leave the registry, disconnect.

        Every part is stopped, whatever another one raises; what one raised is raised at the end.
        """
        self._stopping = True
        self._drain_timeout = drain_timeout
        try:
            await self._stack.aclose()
        finally:
            self.network.readiness.started = False
        logger.info("%s: stopped", self.worker_id)

    async def _announce_stop(self) -> None:
        """The first step of a stop: send what waits, while this worker can still take what is for itself."""
        await self.outgoing.delivery.finish(_SENT_WITHIN)
        logger.info("%s: stops taking messages", self.worker_id)
        await self.membership.drain()

    async def _finish_handlers(self) -> None:
        """The step of a stop after the last message was taken in: handlers end, and agents go to other workers."""
        incoming = self.incoming
        incoming.call_log.accept_all()
        logger.info("%s: finishes %d handlers", self.worker_id, incoming.dispatch.running)
        incoming.ownership.begin_drain()
        if incoming.ownership.owns_some and self.network.connection.connected:
            await asyncio.sleep(_HEARD_WITHIN)
        handing_over = asyncio.ensure_future(incoming.ownership.drain())
        try:
            await incoming.dispatch.finish(self._drain_timeout, self._abort)
            # Handlers have ended, so what is left is a matter of writing.
            await asyncio.wait({handing_over}, timeout=_HAND_OVER_WITHIN)
            if not handing_over.done():
                logger.warning("%s: agents that were not handed over wait until others claim them", self.worker_id)
        finally:
            handing_over.cancel()
            await asyncio.gather(handing_over, return_exceptions=True)
        await self.outgoing.delivery.finish(_SENT_WITHIN)

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether this runtime is connected, in step with the registry, and serves what it hosts."""
        return not self._obstacles()

    def _obstacles(self) -> tuple[str, ...]:
        """Why it is not ready, a sentence each; empty if it is."""
        if self._stopping:
            running = self.incoming.dispatch.running
            return (f"It is draining: it takes no new messages, and finishes {running} handlers.",)
        starting = () if self.network.readiness.started else ("Its start is not complete.",)
        if not self.connection.connected:
            return (*starting, f"It is not connected to {', '.join(self._options.safe_servers)}; it keeps trying.")
        return starting if self.registry.synced else (*starting, "It is not in step with the registry.")

    def health(self) -> Health:
        """The health of a started runtime."""
        obstacles, counters = self._obstacles(), self.counters
        connection, registry, intake = self.connection, self.registry, self.intake
        return Health(
            live=True,
            ready=not obstacles,
            reasons=obstacles,
            worker_id=self.worker_id,
            uptime_seconds=time.monotonic() - self._began,
            draining=self._stopping,
            server=connection.server if connection.connected else None,
            connected=connection.connected,
            reconnects=connection.reconnects,
            in_step=registry.synced,
            workers=len(registry.view.workers),
            agents={hosted.agent_type: len(hosted.live) for hosted in self._program.catalog},
            messages_handled=counters.messages_handled,
            messages_failed=counters.messages_failed,
            handlers_running=self.dispatch.running,
            messages_queued=intake.queued,
            pending_bytes=intake.pending_bytes,
            max_pending_bytes=self._options.max_pending_bytes,
            dropped_events=counters.dropped_events,
            undelivered_events=counters.undelivered_events,
            undecodable=self.undecodable,
            unknown_payloads=counters.unknown_payloads,
            refused_replies=counters.refused_replies,
            state_conflicts=counters.state_conflicts,
            calls_pending=self.calls.pending,
            sends_under_way=self.sender.under_way,
        )

    @property
    def undecodable(self) -> int:
        """Messages that could not be read, on any subject."""
        return self.counters.undecodable + self.connection.undecodable

    @property
    def idle(self) -> bool:
        """Whether nothing is queued, running or awaited here."""
        return not (self.intake.queued or self.dispatch.running or self.sender.under_way)

    async def wait_idle(self) -> None:
        """Return when a full round trip through the server finds nothing queued, running or awaited here."""
        pause = 0.001
        while True:
            if not self.idle:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            pause = 0.001
            seen = (self.counters.taken_in, self.counters.sent)
            try:
                await self.connection.barrier()
            except NatsrtError:
                await self.connection.wait_connected(self._options.offline_timeout)
                continue
            await asyncio.sleep(0)
            if self.idle and seen == (self.counters.taken_in, self.counters.sent):
                return

    # -- what the runtime uses -----------------------------------------------------------------------------------

    async def control(self, agent: AgentId, operation: str, data: Any = None) -> Any:
        """A control operation on an agent of another worker, or, if it is keyed, wherever it lives."""
        subjects = self.network.subjects
        if self.registry.is_keyed(agent.type):
            owner = (await self.outgoing.locator.locate(agent)).worker_id
            return await self.sender.control(agent, subjects.control_at(agent.type, owner), operation, data)
        holders = self.registry.view.instance_holders(agent.type, agent.key)
        subject = subjects.control(agent.type, agent.key if holders else None)
        return await self.sender.control(agent, subject, operation, data)

    def exempt(self, task: asyncio.Task[Any] | None, chain: tuple[str, ...]) -> None:
        """Do not let a stop wait for ``task``, if it is a handler's, nor for the handlers of ``chain``.

        They wait for the stop themselves.
        """
        self.dispatch.exempt(task)
        self.ownership.exempt(chain)

    @property
    def event_error(self) -> BaseException | None:
        """The first error of an event's handler; None if there was none or ``ignore_unhandled_exceptions`` is on."""
        return self.incoming.events.first_error
