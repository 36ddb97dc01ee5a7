"""What is sent before there is a session to send it: before a runtime is started, and between two steps.

Rules:

1. An event waits here, and `Outbox.publish` returns at once. A call waits here until it is passed on, and then for its
   reply, as in AutoGen's `SingleThreadedAgentRuntime`.
2. The order in which messages came is kept: they join the `SendQueue` in this order, and while any of them is
   left here, later messages join them here.
3. Nothing here runs or holds an event loop. A runtime that is dropped without a start leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextvars import Context, copy_context
from copy import copy
from typing import Any, Protocol

from autogen_core import AgentId

from natsrt.agents.interventions import Interventions
from natsrt.background import BackgroundTasks
from natsrt.durable_types import covers
from natsrt.errors import CannotSerialize, UndeliveredCall
from natsrt.options import Options
from natsrt.sending.call_sender import Call
from natsrt.sending.event_sender import Event
from natsrt.transport.readiness import Readiness
from natsrt.wire.serialization import Serialization

logger: logging.Logger = logging.getLogger("natsrt.sending")

_ROUNDS = 1000
"""Maximum number of turns of the event loop for which messages that come meanwhile wait behind those that are passed
on. It only matters for a task that sends in every turn."""
_OVERHEAD = 512
"""Bytes of memory that a message takes in addition to its data."""


class WayOut(Protocol):
    """Where messages are passed to be sent."""

    def publish(self, event: Event) -> Awaitable[None]:
        """Publish an event, as `EventSender.publish`."""

    def send(self, call: Call) -> Awaitable[Any]:
        """Call an agent, as `CallSender.send`."""


class _WaitingEvent:
    """An event that waits, with the context of its publisher."""

    __slots__ = ("context", "event", "size")

    def __init__(self, event: Event, size: int) -> None:
        self.event = event
        self.size = size
        self.context: Context = copy_context()


class _WaitingCall:
    """A call that waits in the coroutine of its caller until its turn comes."""

    __slots__ = ("recipient", "size", "turn")

    def __init__(self, recipient: AgentId, size: int) -> None:
        self.recipient = recipient
        self.size = size
        self.turn: asyncio.Future[WayOut] = asyncio.get_running_loop().create_future()


class Outbox:
    """The messages of one runtime that wait until they can be passed on, at most ``max_pending_bytes``."""

    def __init__(self, options: Options, serialization: Serialization, interventions: Interventions) -> None:
        self._max_bytes = options.max_pending_bytes
        self._durable = options.durable
        self._serialization = serialization
        self._interventions = interventions
        self._waiting: dict[_WaitingEvent | _WaitingCall, None] = {}
        self._bytes = 0
        self._tasks = BackgroundTasks(logger, "an event that waited for the start was not sent")
        self.holds = False
        """True while messages must wait here although there is a session."""

    def __len__(self) -> int:
        """Return the number of messages that wait."""
        return len(self._waiting)

    # -- taking messages -----------------------------------------------------------------------------------------

    async def publish(self, event: Event) -> None:
        """Let an event wait.

        Raises `CannotSerialize` if it cannot be sent, and RuntimeError if too much waits, or if a stream is to confirm
        it, which no runtime can tell before it is started.
        """
        patterns = (pattern for topics in self._durable for pattern in topics.patterns)
        topic = event.topic
        if not self.holds and (event.due is not None or any(covers(pattern, topic.type) for pattern in patterns)):
            raise RuntimeError(
                f"an event on {topic} cannot wait for the start of this runtime: its stream is to confirm that it is "
                "stored. Call start() first"
            )
        self._add(_WaitingEvent(event, self._size(event.message)))

    async def send(self, call: Call) -> Any:
        """Let a call wait, and then make it. Raises as `publish` and `CallSender.send` do."""
        waiting = _WaitingCall(call.recipient, self._size(call.message))
        self._add(waiting)
        if call.token is not None:
            call.token.link_future(waiting.turn)
        try:
            way_out = await waiting.turn
        finally:
            self._remove(waiting)
        return await way_out.send(call)

    def _size(self, message: Any) -> int:
        """The bytes that a message takes while it waits. Raises `CannotSerialize` if it cannot be sent."""
        try:
            return len(self._serialization.encode(message).payload) + _OVERHEAD
        except CannotSerialize:
            if not self._interventions.handlers:  # they may replace it
                raise
            return _OVERHEAD

    def _add(self, waiting: _WaitingEvent | _WaitingCall) -> None:
        if self._bytes + waiting.size > self._max_bytes:
            raise RuntimeError(
                f"{len(self._waiting)} messages of {self._bytes} bytes wait for the start of this runtime, and no more "
                f"than {self._max_bytes} bytes may wait (max_pending_bytes): call start() first"
            )
        self._waiting[waiting] = None
        self._bytes += waiting.size

    def _remove(self, waiting: _WaitingEvent | _WaitingCall) -> None:
        if waiting in self._waiting:
            del self._waiting[waiting]
            self._bytes -= waiting.size

    # -- passing them on -----------------------------------------------------------------------------------------

    async def pass_on(self, way_out: WayOut, readiness: Readiness) -> None:
        """Pass everything that waits to ``way_out``, in order. Does not wait until it is sent.

        If the start then fails, calls fail with its error, and events wait here for the next start.
        """
        for _ in range(_ROUNDS):
            if not self._waiting:
                break
            for waiting in list(self._waiting):
                self._remove(waiting)
                if isinstance(waiting, _WaitingEvent):
                    waiting.context.run(self._tasks.spawn, self._publish(waiting, way_out, readiness))
                elif not waiting.turn.done():
                    waiting.turn.set_result(way_out)
            await asyncio.sleep(0)  # all of them join the queue of sends now

    async def sent(self) -> None:
        """Wait until the events that were passed on are sent."""
        await self._tasks.wait()

    async def _publish(self, waiting: _WaitingEvent, way_out: WayOut, readiness: Readiness) -> None:
        try:
            await way_out.publish(copy(waiting.event))  # one that is kept for the next start stays as it was given
        except Exception:
            if readiness.started:
                raise
            self._waiting[waiting] = None
            self._bytes += waiting.size

    def close(self) -> None:
        """Fail the calls that wait, and drop the events."""
        waiting, self._waiting, self._bytes = self._waiting, {}, 0
        events = sum(isinstance(one, _WaitingEvent) for one in waiting)
        if events:
            logger.warning("the runtime was closed before it was started: %d events were not sent", events)
        for one in waiting:
            if isinstance(one, _WaitingCall) and not one.turn.done() and not one.turn.get_loop().is_closed():
                agent = str(one.recipient)
                text = f"the runtime was closed before it was started: the call to {agent} was not sent"
                one.turn.set_exception(UndeliveredCall(agent, text))
