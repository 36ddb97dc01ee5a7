"""Where messages for hosted agents come in: one ordered queue over all subscriptions, bounded in bytes.

Only messages whose handlers have not started count towards the bound; a running handler holds its own memory. Above the
bound, messages are refused: calls are answered "busy" and their callers try elsewhere, events are counted. Nothing is
dropped in silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from functools import partial
from typing import Protocol

from nats.aio.msg import Msg

from natsrt.agents.inbound import EVENT, Inbound, Route
from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode
from natsrt.observe.metrics import Counters
from natsrt.options import Options
from natsrt.transport.client import Sink
from natsrt.transport.connection import Connection
from natsrt.transport.stall_watch import StallWatch
from natsrt.wire import envelope

logger = logging.getLogger("natsrt.hosting")

_WARN_EVERY = 5.0
"""Seconds between two warnings that the intake is full."""
_STARTS_PER_TURN = 64
"""Handlers started in one turn of the event loop: about a millisecond's work, after which the socket is read again."""
_OVERHEAD = 512
"""Bytes that a message takes beside its data."""


class Consumer(Protocol):
    """What the intake gives its messages to."""

    def start(self, inbound: Inbound) -> None:
        """Handle a message, in a task of its own."""

    def refuse(self, inbound: Inbound) -> None:
        """There is no room for a message: settle it without handling it."""


class Intake:
    """The ordered, bounded queue of one worker."""

    def __init__(self, connection: Connection, options: Options, counters: Counters) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._max_bytes = options.max_pending_bytes
        self._counters = counters
        self._consumer: Consumer | None = None
        self._queue: deque[Inbound] = deque()
        self._scheduled = False
        self._warned_at = float("-inf")
        self._stalls = 0
        """How many stalls of the process are not over yet: see `_stalled`."""
        self._tasks = BackgroundTasks(logger, "the end of a stall could not be found")
        # Other runtimes take a worker for dead when its heartbeats have been missing for this long, and not before.
        self._stall_watch = StallWatch(options.heartbeat_ttl - options.heartbeat_interval, self._stalled)
        self.pending_bytes = 0
        """Bytes of the messages whose handlers have not started."""

    def feed(self, consumer: Consumer) -> None:
        """Give the messages to ``consumer``. Needed before the first one."""
        self._consumer = consumer

    @property
    def queued(self) -> int:
        """Messages that nobody has begun to handle."""
        return len(self._queue)

    def watch_stalls(self) -> None:
        """Mark messages that may have waited in the socket during a stall as `Inbound.late`. Harmless when it does."""
        self._stall_watch.start()

    async def stop(self) -> None:
        """Stop watching for stalls. Harmless when stopped."""
        self._stall_watch.stop()
        await self._tasks.cancel()

    # -- taking in -----------------------------------------------------------------------------------------------

    def sink(self, route: Route) -> Sink:
        """What takes in the messages of a subscription."""
        is_copy = route.kind is EVENT and route.hosted.keyed is not None and route.custom is None
        return partial(self._take_copy if is_copy else self.take, route)

    def _take_copy(self, route: Route, message: Msg) -> None:
        """Take in an event on its topic for a keyed type, unless its publisher has sent it to the agent itself."""
        if not _is_delivered(message.data, route.hosted.agent_type):
            self.take(route, message)

    def take(self, route: Route, message: Msg) -> None:
        """Take in a message. Runs in the client's read loop: cheap, never waits."""
        size, now = len(message.data) + _OVERHEAD, self._loop.time()
        inbound = Inbound(route, message, size, now)
        route.settlement.take(inbound)
        if self.pending_bytes + size > self._max_bytes:
            self._overflow(inbound, now)
            return
        if self._stalls:
            inbound.late = True
        self._counters.taken_in += 1
        self.pending_bytes += size
        self._queue.append(inbound)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def started(self, inbound: Inbound) -> None:
        """A message's handler starts, or it failed before: it no longer counts towards the bound."""
        if inbound.waiting:
            inbound.waiting = False
            self.pending_bytes -= inbound.size

    def _drain(self) -> None:
        """Start some messages, and leave the rest to the next turn of the event loop.

        So reading runs ahead of handling, into this bounded queue: what comes behind a burst of messages, such as the
        server's PONG and questions about calls, does not wait until the whole burst is handled.
        """
        assert self._consumer is not None
        queue, start = self._queue, self._consumer.start
        # From half of the bound on, everything is started: what cannot be handled as fast as it comes then waits at the
        # server instead.
        at_once = len(queue) if self.pending_bytes > self._max_bytes // 2 else _STARTS_PER_TURN
        for _ in range(min(len(queue), at_once)):
            start(queue.popleft())
        self._scheduled = bool(queue)
        if queue:
            self._loop.call_soon(self._drain)

    def _overflow(self, inbound: Inbound, now: float) -> None:
        if not inbound.settlement.refuse_unread(inbound):
            assert self._consumer is not None
            self._consumer.refuse(inbound)
        if now - self._warned_at > _WARN_EVERY:
            self._warned_at = now
            logger.warning(
                "the intake is full: %d bytes of messages wait to be started; calls are answered busy, "
                "%d events were dropped so far",
                self.pending_bytes,
                self._counters.dropped_events,
            )

    # -- stalls --------------------------------------------------------------------------------------------------

    def _stalled(self) -> None:
        """The process stood still. Others may have taken this worker for dead and sent its calls again."""
        logger.warning("this worker stood still for some seconds; calls that came in meanwhile are sent back")
        self._stalls += 1
        self._tasks.spawn(self._caught_up())

    async def _caught_up(self) -> None:
        """Wait for a round trip through the server: what arrives after it was not in the socket during the stall."""
        try:
            await self._connection.barrier()
        finally:
            self._stalls -= 1


def _is_delivered(data: bytes, agent_type: str) -> bool:
    """Whether an event's publisher says that it sends the event to the keyed agent of this type itself."""
    if b'"keyed"' not in data:
        return False
    try:
        body = envelope.decode(data)
    except CannotDecode:  # reported where the message is read
        return False
    return body is not None and agent_type in (body.text("keyed") or "").split()
