"""The intake of messages for hosted agents: one ordered queue for all subscriptions, limited in bytes.

Only messages whose handlers have not started count towards the limit. Above the limit, messages are refused: calls are
answered "busy", so that their callers try another worker, and events are dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from functools import partial
from typing import Protocol

from nats.aio.msg import Msg

from natsrt.agents.inbound import CALL, EVENT, Inbound, Route
from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode, ServerUnreachable
from natsrt.observe.metrics import Counters
from natsrt.options import Options
from natsrt.transport.client import Sink
from natsrt.transport.connection import Connection
from natsrt.transport.stall_watch import StallWatch
from natsrt.wire import envelope

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_WARN_EVERY = 5.0
"""Minimum time between two warnings that the intake is full, in seconds."""
_STARTS_PER_TURN = 64
"""Handlers started in one turn of the event loop. This takes about a millisecond; then the socket is read again."""
_OVERHEAD = 512
"""Bytes of memory that a message takes in addition to its data."""


class Consumer(Protocol):
    """Receives the messages of an intake."""

    def start(self, inbound: Inbound) -> None:
        """Handle a message in a new task."""

    def refuse(self, inbound: Inbound) -> None:
        """Settle a message for which there is no room, without handling it."""


class Intake:
    """The ordered, bounded queue of one worker."""

    def __init__(self, connection: Connection, options: Options, counters: Counters) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._max_bytes = options.max_pending_bytes
        self._counters = counters
        self._consumer: Consumer | None = None
        self._queue: deque[Inbound] = deque()
        self._held: deque[Inbound] | None = None
        """The messages that wait for `step`; None while messages start by themselves."""
        self._scheduled = False
        self._warned_at = float("-inf")
        self._stalls = 0
        """Number of stalls of the process that are not over yet: see `_stalled`."""
        self._tasks = BackgroundTasks(logger, "waiting for the end of a stall failed")
        # Other runtimes consider a worker dead if it has sent no heartbeat for this long, and not before.
        self._stall_watch = StallWatch(options.heartbeat_ttl - options.heartbeat_interval, self._stalled)
        self.pending_bytes: int = 0
        """Bytes of the messages whose handlers have not started."""

    def feed(self, consumer: Consumer) -> None:
        """Pass the messages to ``consumer``. Must be called before the first message arrives."""
        self._consumer = consumer

    @property
    def queued(self) -> int:
        """Number of messages whose handling has not begun."""
        return len(self._queue) + len(self._held or ())

    @property
    def is_half_full(self) -> bool:
        """True if the messages whose handlers have not started take more than half of the bytes that they may take."""
        return self.pending_bytes > self._max_bytes // 2

    def watch_stalls(self) -> None:
        """Mark messages that may have waited in the socket during a stall as `Inbound.late`.

        Has no effect if already called.
        """
        self._stall_watch.start()

    async def stop(self) -> None:
        """Stop watching for stalls. Has no effect if stopped."""
        self._stall_watch.stop()
        await self._tasks.cancel()

    # -- taking in -----------------------------------------------------------------------------------------------

    def sink(self, route: Route) -> Sink:
        """Return the function to call with each message of a subscription."""
        is_copy = route.kind is EVENT and route.hosted.keyed is not None and route.custom is None
        return partial(self._take_copy if is_copy else self.take, route)

    def _take_copy(self, route: Route, message: Msg) -> None:
        """Take in an event on its topic for a keyed type, unless the publisher also sends it directly to the agent."""
        if not _is_delivered(message.data, route.hosted.agent_type):
            self.take(route, message)

    def take(self, route: Route, message: Msg) -> None:
        """Take in a message. Called in the client's read loop, so it is cheap and does not block."""
        size, now = len(message.data) + _OVERHEAD, self._loop.time()
        if message.headers is not None:
            size += sum(len(name) + len(value) for name, value in message.headers.items())
        inbound = Inbound(route, message, size, now)
        if not route.settlement.take(inbound):
            return
        if self.pending_bytes + size > self._max_bytes and not route.settlement.has_own_limit:
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
        """Stop counting a message towards the limit, because its handler starts or it has failed before that."""
        if inbound.waiting:
            inbound.waiting = False
            self.pending_bytes -= inbound.size

    def _drain(self) -> None:
        """Start some messages, and leave the rest to the next turn of the event loop.

        So messages are read into this queue before the earlier ones are handled. The server's PONG, or a question about
        calls, that arrives after a burst of messages does not wait until the whole burst is handled.
        """
        assert self._consumer is not None
        if self._held is not None:
            self._put_aside(self._held)
            return
        queue, start = self._queue, self._consumer.start
        # Above half of the limit, all messages are started at once. Messages that arrive faster than they are handled
        # then wait at the server.
        at_once = len(queue) if self.is_half_full else _STARTS_PER_TURN
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

    # -- stepping ------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Let calls and events wait for `step` from now on. Messages to natsrt itself start by themselves."""
        self._held = deque()

    def step(self) -> bool:
        """Start the oldest message that waits. Returns False if none does."""
        if not self._held:
            return False
        assert self._consumer is not None
        self._consumer.start(self._held.popleft())
        return True

    def release(self) -> None:
        """Start all that wait, and let messages start by themselves again. Has no effect if they do."""
        held, self._held = self._held, None
        if held:
            self._queue.extendleft(reversed(held))
            if not self._scheduled:
                self._scheduled = True
                self._loop.call_soon(self._drain)

    def _put_aside(self, held: deque[Inbound]) -> None:
        assert self._consumer is not None
        while self._queue:
            inbound = self._queue.popleft()
            if _is_for_an_agent(inbound):
                held.append(inbound)
            else:
                self._consumer.start(inbound)
        self._scheduled = False

    # -- stalls --------------------------------------------------------------------------------------------------

    def _stalled(self) -> None:
        """Called when the process has not run for some time: callers may have sent this worker's calls again."""
        logger.debug("calls that arrived while this worker did not run are sent back")
        self._stalls += 1
        self._tasks.spawn(self._caught_up())

    async def _caught_up(self) -> None:
        """Wait for a round trip to the server, or for the loss of the connection. Messages that arrive later were not
        in the socket during the stall."""
        try:
            with contextlib.suppress(ServerUnreachable):
                await self._connection.barrier()
        finally:
            self._stalls -= 1


def _is_for_an_agent(inbound: Inbound) -> bool:
    """True for calls and events, and False for messages to natsrt itself."""
    if inbound.kind is not CALL:
        return inbound.kind is EVENT
    try:
        body = envelope.decode(inbound.message.data)
    except CannotDecode:  # reported where the message is read
        return True
    return body is None or body.type != envelope.LOCATE


def _is_delivered(data: bytes, agent_type: str) -> bool:
    """True if the event says that its publisher also sends it directly to the keyed agent of this type."""
    if b'"keyed"' not in data:
        return False
    try:
        body = envelope.decode(data)
    except CannotDecode:  # reported where the message is read
        return False
    return body is not None and agent_type in (body.text("keyed") or "").split()
