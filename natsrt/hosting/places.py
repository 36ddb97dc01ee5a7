"""The limits of handlers that run at once (``max_running``): of one worker, and of one agent type on it.

A handler takes a *place* in each limit that applies to it, and keeps it until it ends. Rules:

1. A message for which there is no place waits, in order with the other waiting messages of its agent type.
2. A handler that awaits a call keeps its place. But if all handlers of a full limit await calls, a call that one of
   them waits for, directly or through other handlers, takes a place beyond the limit. Without this rule it would wait
   for itself. One such call takes a place at a time, until its handler awaits a call too.
3. Handlers of several limits can wait for one another in a circle. If all handlers of a full limit have awaited calls
   for `_CIRCLE_AFTER` seconds, a call that waits there and that a handler with a place anywhere waits for, takes a
   place beyond the limit.

A call shows who waits for it by its chain (see `natsrt.agents.chain`), in which handlers with places have ids of their
own. There is no I/O here.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Awaitable, Iterable, Sequence
from typing import Final, TypeVar

from nats.nuid import NUID

from natsrt.agents.chain import Caller, Chain
from natsrt.agents.hosted_type import HostedType

T = TypeVar("T")

PLACE_MARK: Final = "place:"
"""Start of the ids of handlers that have a place."""
_CIRCLE_AFTER = 1.0
"""Seconds for which all handlers of a limit must have awaited calls before a circle is assumed."""
_SOON = 0.1
"""Seconds between two looks at least."""


class Limit:
    """At most ``maximum`` handlers at once, apart from those that rules 2 and 3 let in."""

    __slots__ = ("active", "holders", "maximum", "stuck_since")

    def __init__(self, maximum: int) -> None:
        self.maximum: int = maximum
        self.holders: dict[str, Place] = {}
        """The handlers that have a place, by their ids."""
        self.active: int = 0
        """Number of them that do not await a call."""
        self.stuck_since: float = math.inf
        """When the last of them began to await a call. Infinity if one of them does not."""

    @property
    def has_room(self) -> bool:
        return len(self.holders) < self.maximum

    def add(self, place: Place) -> None:
        """The handler has a place from now on."""
        self.holders[place.handler_id] = place
        self.active += 1
        self.stuck_since = math.inf

    def discard(self, place: Place, now: float) -> None:
        """The handler has ended."""
        if self.holders.pop(place.handler_id, None) is not None and not place.awaited:
            self._change(-1, now)

    def awaits(self, place: Place, now: float) -> None:
        """The handler begins to await a call, or no longer awaits any, as it says."""
        if place.handler_id in self.holders:
            self._change(-1 if place.awaited else 1, now)

    def _change(self, by: int, now: float) -> None:
        self.active += by
        self.stuck_since = math.inf if self.active else min(self.stuck_since, now)

    def lets_in(self, chain: Chain, now: float) -> bool:
        """True if a call with this chain may enter although there is no room."""
        if self.stuck_since == math.inf:
            return False
        if any(part in self.holders for part in chain):
            return True
        return now - self.stuck_since >= _CIRCLE_AFTER and any(part.startswith(PLACE_MARK) for part in chain)


class Place:
    """The place of one handler in its limits, or its wait for one. It is a `Caller` while the handler runs."""

    __slots__ = ("_outer", "_places", "awaited", "chain", "handler_id", "limits", "number", "turn")

    def __init__(self, places: Places, number: int, handler_id: str, limits: Sequence[Limit], chain: Chain) -> None:
        self._places = places
        self.number: int = number
        self.handler_id: str = handler_id
        self.limits: Sequence[Limit] = limits
        self.chain: Chain = chain
        """The chain of its message, if the message is a call; empty for an event."""
        self.awaited: int = 0
        """Number of calls that it awaits."""
        self.turn: asyncio.Future[None] | None = None
        """Done when it has entered; None if it did not have to wait."""
        self._outer: Caller | None = None

    def inside(self, outer: Caller | None) -> Place:
        """The same place, for a handler whose calls ``outer`` makes. None: nothing else has to know of its calls."""
        self._outer = outer
        return self

    async def call(self, work: Awaitable[T]) -> T:
        """Await ``work``, which makes a call for the handler. Returns its result."""
        self.awaited += 1
        if self.awaited == 1:
            self._places.awaits(self)
        try:
            return await (work if self._outer is None else self._outer.call(work))
        finally:
            self.awaited -= 1
            if self.awaited == 0:
                self._places.awaits(self)

    async def until_last(self) -> None:
        """Part of `Caller`."""
        if self._outer is not None:
            await self._outer.until_last()

    def refuse(self, error: Exception) -> None:
        """Let `Places.enter` raise ``error``. Has no effect if it does not wait any more."""
        if self.turn is not None and not self.turn.done():
            self.turn.set_exception(error)


class Places:
    """The places of one worker. ``max_running`` is the limit of the whole worker; None: it has none."""

    def __init__(self, max_running: int | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker = None if max_running is None else Limit(max_running)
        self._types: dict[str, Limit] = {}
        self._queues: dict[str, deque[Place]] = {}
        """The places that are waited for, by agent type, in order."""
        self._id_prefix = f"{PLACE_MARK}{NUID().next().decode()[-8:]}"
        self._numbers = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self.limits_all: bool = self._worker is not None
        """True if every handler of this worker needs a place."""

    @property
    def waiting(self) -> int:
        """Number of messages that wait for a place."""
        return sum(map(len, self._queues.values()))

    def place(self, hosted: HostedType, chain: Chain) -> Place:
        """A place for the handler of a message with this chain, for `enter`."""
        limits = [] if self._worker is None else [self._worker]
        if hosted.max_running is not None:
            limit = self._types.setdefault(hosted.agent_type, Limit(hosted.max_running))
            limit.maximum = hosted.max_running
            limits.append(limit)
        number = next(self._numbers)
        return Place(self, number, f"{self._id_prefix}{number:x}", limits, chain)

    async def enter(self, place: Place, agent_type: str) -> None:
        """Wait until the handler may start; then `leave` must follow. Raises the error that was given to `refuse`."""
        queue = self._queues.get(agent_type)
        if queue is None and all(limit.has_room for limit in place.limits):
            self._hold(place)
            return
        turn = place.turn = self._loop.create_future()
        if queue is None:
            queue = self._queues[agent_type] = deque()
        queue.append(place)
        self._admit()
        try:
            await turn
        except BaseException:
            if place.handler_id in place.limits[0].holders:  # it had entered before it was cancelled
                self.leave(place)
            else:
                self._remove(place, agent_type)
                self._admit()  # it may have been the first
            raise

    def leave(self, place: Place) -> None:
        """The handler has ended."""
        for limit in place.limits:
            limit.discard(place, self._loop.time())
        if self._queues:
            self._admit()

    def awaits(self, place: Place) -> None:
        """The handler begins to await a call, or no longer awaits any."""
        for limit in place.limits:
            limit.awaits(place, self._loop.time())
        if self._queues:
            self._admit()

    def _hold(self, place: Place) -> None:
        for limit in place.limits:
            limit.add(place)

    def _remove(self, place: Place, agent_type: str) -> None:
        queue = self._queues.get(agent_type)
        if queue is not None and place in queue:
            queue.remove(place)
            if not queue:
                del self._queues[agent_type]

    def _admit(self) -> None:
        """Let everything in that may enter now."""
        while (found := self._next()) is not None:
            agent_type, place = found
            self._remove(place, agent_type)
            if place.turn is not None and not place.turn.done():
                self._hold(place)
                place.turn.set_result(None)
        self._look_later()

    def _next(self) -> tuple[str, Place] | None:
        first: tuple[str, Place] | None = None
        for agent_type, queue in self._queues.items():
            if all(limit.has_room for limit in queue[0].limits) and (
                first is None or queue[0].number < first[1].number
            ):
                first = agent_type, queue[0]
        return first if first is not None else self._next_beyond()

    def _next_beyond(self) -> tuple[str, Place] | None:
        """The first call that may enter beyond a limit."""
        now = self._loop.time()
        for agent_type, queue in self._queues.items():
            if all(limit.has_room or limit.stuck_since < math.inf for limit in queue[0].limits):
                for place in queue:
                    if place.chain and all(limit.has_room or limit.lets_in(place.chain, now) for limit in place.limits):
                        return agent_type, place
        return None

    def _look_later(self) -> None:
        """Look again when rule 3 may apply."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        stuck = [limit.stuck_since for limit in self._waited_for() if limit.stuck_since < math.inf]
        if stuck:
            self._timer = self._loop.call_at(max(min(stuck) + _CIRCLE_AFTER, self._loop.time() + _SOON), self._admit)

    def _waited_for(self) -> Iterable[Limit]:
        """The full limits at which calls wait that belong to handlers with places."""
        for queue in self._queues.values():
            if any(part.startswith(PLACE_MARK) for place in queue for part in place.chain):
                yield from (limit for limit in queue[0].limits if not limit.has_room)
