"""Where messages for hosted agents come in: one ordered stream over all subscriptions, bounded in bytes.

Only messages that were not started count towards the bound; a handler that runs holds its own memory. Above it calls
are answered "busy" (their callers try elsewhere) and events are counted and shown: nothing is dropped in silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from autogen_core import CancellationToken, Subscription
from nats.aio.msg import Msg

from natsrt.errors import CannotDecode
from natsrt.hosting.catalog import HostedType
from natsrt.hosting.fates import Fates, Pending
from natsrt.transport.client import Sink
from natsrt.wire import envelope

logger = logging.getLogger("natsrt.hosting")

_WARN_EVERY = 5.0
_STARTS_PER_TURN = 64
_OVERHEAD = 512
"""Bytes that a message takes beside its data."""


class Kind(Enum):
    CALL = "call"
    EVENT = "event"
    CONTROL = "control"
    LOCATE = "question where an agent lives"


CALL, EVENT, CONTROL, LOCATE = Kind
"""Its members by short names: to look one up in the class takes a tenth of a microsecond."""
_ENVELOPES = {CALL: envelope.CALL, EVENT: envelope.EVENT, CONTROL: envelope.CONTROL}


@dataclass(frozen=True, slots=True)
class Route:
    """What a subscription is for. The subject it stands on decides this, never a body.

    ``key`` is set for the subjects of one registered instance. ``custom`` is the Subscription object that decides the
    events of its own subscription.
    """

    kind: Kind
    hosted: HostedType
    key: str | None = None
    custom: Subscription | None = None
    name: str = field(init=False)
    """Whom the route leads to, for messages and as the name of tasks."""
    expects: str = field(init=False)
    """The type of the envelopes that come this way."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "expects", _ENVELOPES[self.kind])
        agent_type = self.hosted.agent_type
        object.__setattr__(self, "name", agent_type if self.key is None else f"{agent_type}/{self.key}")


class Entry:
    """One message on its way to its handlers."""

    __slots__ = ("arrived", "kind", "late", "message", "pending", "route", "size", "task", "token", "visit", "waiting")

    def __init__(self, route: Route, message: Msg, size: int, arrived: float, pending: Pending | None) -> None:
        self.route = route
        self.kind = route.kind
        """What it is. Where calls come, keyed agents are sent events, and their types questions: the body tells."""
        self.message = message
        self.size = size
        self.arrived = arrived
        self.pending = pending
        """The call's fate; None for an event, and for a call without a reply subject."""
        self.task: asyncio.Task[None] | None = None
        """The task that serves it; None before and after that."""
        self.visit = ""
        """The visit that it is of its keyed agent. Empty for other agents, and before its turn is asked for."""
        self.token: CancellationToken | None = None
        """The token of its handler, once that runs."""
        self.waiting = True
        """Whether it still counts towards the bound."""
        self.late = False
        """Whether it may have waited at the socket while the process stood still."""


class Intake:
    """The ordered, bounded queue of one worker."""

    def __init__(
        self, fates: Fates, max_bytes: int, *, start: Callable[[Entry], None], refuse: Callable[[Entry], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._fates = fates
        self._max_bytes = max_bytes
        self._start = start
        self._refuse = refuse
        self._queue: deque[Entry] = deque()
        self._scheduled = False
        self._warned_at = float("-inf")
        self._late = 0
        self.pending_bytes = 0
        self.taken = 0
        """Messages taken in since the start."""
        self.dropped_events = 0
        """Events dropped because the intake was full."""

    @property
    def queued(self) -> int:
        return len(self._queue)

    def sink(self, route: Route) -> Sink:
        is_copy = route.kind is EVENT and route.hosted.keyed is not None and route.custom is None
        return partial(self._take_copy if is_copy else self.take, route)

    def _take_copy(self, route: Route, message: Msg) -> None:
        """An event on its topic, for a keyed type: most publishers have sent it to the agent itself, too."""
        if not _is_delivered(message.data, route.hosted.agent_type):
            self.take(route, message)

    def take(self, route: Route, message: Msg) -> None:
        """Runs in the client's read loop: cheap, never waits."""
        size, now = len(message.data) + _OVERHEAD, self._loop.time()
        pending = self._fates.begin(message.reply, now) if message.reply and route.kind is not EVENT else None
        entry = Entry(route, message, size, now, pending)
        if self.pending_bytes + size > self._max_bytes:
            self._overflow(entry, now)
            return
        if self._late:
            entry.late = True
        self.taken += 1
        self.pending_bytes += size
        self._queue.append(entry)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    async def stood_still(self, caught_up: Callable[[], Awaitable[None]]) -> None:
        """The process stood still. What is taken in until ``caught_up`` has ended is `Entry.late`."""
        self._late += 1
        try:
            await caught_up()
        finally:
            self._late -= 1

    def started(self, entry: Entry) -> None:
        """The entry's handler starts, or it failed before: it no longer counts."""
        if entry.waiting:
            entry.waiting = False
            self.pending_bytes -= entry.size

    def _drain(self) -> None:
        """Start some entries, and leave the rest to the next turn of the event loop.

        So reading runs ahead of handling into this bounded queue, and what comes behind a burst of messages (the
        server's PONG, questions about calls) does not wait until all of them are handled.
        """
        queue = self._queue
        # Half full, nothing is left over: what cannot be handled as fast as it comes then waits at the server.
        at_once = len(queue) if self.pending_bytes > self._max_bytes // 2 else _STARTS_PER_TURN
        for _ in range(min(len(queue), at_once)):
            self._start(queue.popleft())
        self._scheduled = bool(queue)
        if queue:
            self._loop.call_soon(self._drain)

    def drop(self, entry: Entry) -> None:
        """Count an event that is not handled because the intake is full."""
        self.dropped_events += 1
        entry.route.hosted.statistics.errors += 1
        entry.route.hosted.statistics.last_error = "dropped: the intake is full"

    def _overflow(self, entry: Entry, now: float) -> None:
        if entry.route.kind is EVENT and entry.route.hosted.keyed is None:
            self.drop(entry)
        else:  # what it is, and whether it is for an agent here, its body says
            self._refuse(entry)
        if now - self._warned_at > _WARN_EVERY:
            self._warned_at = now
            logger.warning(
                "the intake is full: %d bytes of messages wait to be started; calls are answered busy, "
                "%d events were dropped so far",
                self.pending_bytes,
                self.dropped_events,
            )


def _is_delivered(data: bytes, agent_type: str) -> bool:
    """Whether an event says that its publisher sends it to the keyed agent of this type."""
    if b'"keyed"' not in data:
        return False
    try:
        body = envelope.decode(data)
    except CannotDecode:  # whoever reads it next reports that
        return False
    return body is not None and agent_type in (body.text("keyed") or "").split()
