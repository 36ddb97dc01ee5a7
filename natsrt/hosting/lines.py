"""The lines of the keys of one agent type and stream: each key's messages are delivered in order, one at a time.

Rules:

1. A message is delivered when all earlier ones of its key are settled: handled, given up, or gone from the stream.
   Different keys do not wait for one another.
2. A message that was not settled is delivered again in its place, after a pause. The rest of its key waits. The pause
   ends early if the message is cancelled.
3. The bytes of messages in memory are limited. Of the limit, one half is for messages that wait, of which one key takes
   a tenth of the limit at most, and the other half for messages that are being delivered. A message that finds no room
   is *set aside*: only its place is kept, and it is read again when its turn comes. So a key that is blocked, or any
   number of them, does not hold up other keys. A message waits for room only if those that are being delivered take
   all of their half.
4. A message that is here already is not taken a second time. One that was settled lately is reported again: the
   acknowledgement was lost. A copy of an older one is delivered, and the owner of its agent knows that it was handled.
5. After a take-over, the messages up to the last one that the former feeder got are *suspects*: handling one of them
   may have ended it. Before a suspect is delivered for the first time, that is written down, and it is found out how
   often it was written before. So a message that ends one worker after the other is given up some time.

The module knows no streams and no agents: what happens to a message is up to the `Deliverer`. Time is the event loop's.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, NamedTuple, Protocol, TypeVar

from autogen_core import CancellationToken

from natsrt.retry_types import RetryOptions

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_SHARE = 10
"""One key may keep this part of the limit in messages that wait: a tenth."""


class Place(Protocol):
    """Where a message is stored. It is small, and stays in memory as long as the message is not settled."""

    @property
    def sequence(self) -> int:
        """The message's sequence in the stream."""


P = TypeVar("P", bound=Place)
P_contra = TypeVar("P_contra", bound=Place, contravariant=True)
M = TypeVar("M")


class Settled(Enum):
    """How a message ended. The values are used in logs."""

    HANDLED = "handled"
    GIVEN_UP = "given up"
    GONE = "gone from the stream"


@dataclass(frozen=True, slots=True)
class Again:
    """A message is to be delivered again, ``after`` so many seconds.

    ``failed`` is True if its handler raised, and False if its owner was lost. ``token``: it is delivered again at once
    when this is cancelled; None: there is none.
    """

    after: float
    failed: bool = True
    token: CancellationToken | None = None


Outcome = Settled | Again


class Tries(NamedTuple):
    """Earlier deliveries of a message: how often its handler failed, and how often its owner was lost meanwhile.

    A suspect has failed as often as former feeders began to deliver it.
    """

    failures: int
    losses: int


class Deliverer(Protocol[P_contra, M]):
    """Does to messages what their lines decide.

    What its coroutines raise is logged, and the message is delivered again after a delay that grows. For `deliver` it
    counts as a failure, so that the message can be given up some time.
    """

    async def deliver(self, place: P_contra, message: M, tries: Tries) -> Outcome:
        """Deliver a message. Returns how it ended, or when to deliver it again.

        Whether it is given up is decided here: return `Settled.GIVEN_UP` when the dead letter is stored.
        """

    async def read(self, place: P_contra) -> M | None:
        """Read a message again that was set aside. None: the stream does not have it any more."""

    async def begin(self, place: P_contra) -> int:
        """Write down that a suspect is about to be delivered. Returns how often that was written before."""

    def settled(self, place: P_contra, outcome: Settled) -> None:
        """The message needs nothing more, and may be acknowledged.

        Called once for each message, and again for each copy of it that comes later. Must not raise.
        """


class _Entry(Generic[P, M]):
    """A message in its line. ``message`` is None while it is set aside. ``size`` is in bytes."""

    __slots__ = ("failures", "losses", "message", "place", "size", "suspect")

    def __init__(self, place: P, message: M, size: int, suspect: bool) -> None:
        self.place: P = place
        self.message: M | None = message
        self.size: int = size
        self.suspect: bool = suspect
        self.failures = self.losses = 0


class _Line(Generic[P, M]):
    """The messages of one key. ``waiting_bytes`` are the bytes of those that wait in memory."""

    __slots__ = ("delivering", "entries", "task", "waiting_bytes")

    def __init__(self) -> None:
        self.entries: deque[_Entry[P, M]] = deque()
        self.waiting_bytes = 0
        self.delivering = False
        """True while its first message is with the deliverer."""
        self.task: asyncio.Task[None] | None = None


class _Room:
    """Room for ``most`` bytes, given in the order in which it was asked for. Anything fits where nothing is."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def _fits(self, size: int) -> bool:
        return not self.used or self.used + size <= self._most

    async def enter(self, size: int) -> None:
        """Wait for room for ``size`` bytes. `leave` must follow, unless this raises."""
        if not self._waiting and self._fits(size):
            self.used += size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.leave(size)
            else:
                turn.cancel()
                self._advance()
            raise

    def leave(self, size: int) -> None:
        self.used -= size
        self._advance()

    def _advance(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self.used += size
                turn.set_result(None)


class Lines(Generic[P, M]):
    """The lines of one agent type and stream.

    Args:
        deliverer: Delivers the messages.
        max_bytes: Maximum bytes of messages in memory. One larger message may be delivered at a time.
        most: Maximum number of messages that are not settled, set aside or not: see `room`.
        retries: The delays of messages whose deliverer has raised.
        suspects_to: The last sequence that the former feeder got; 0: there are no suspects.
    """

    def __init__(
        self,
        deliverer: Deliverer[P, M],
        *,
        max_bytes: int,
        most: int,
        retries: RetryOptions,
        suspects_to: int = 0,
    ) -> None:
        self._deliverer = deliverer
        self._most = most
        self._retries = retries
        self._suspects_to = suspects_to
        self._lines: dict[str, _Line[P, M]] = {}
        self._held: dict[int, P] = {}
        """The places of the messages that are not settled, by sequence."""
        self._settled: OrderedDict[int, Settled] = OrderedDict()
        """How the last messages ended, by sequence: as many as may be held."""
        self._waiting_room = max_bytes // 2
        self._share = max_bytes // _SHARE
        self._waiting_bytes = 0
        self._delivering = _Room(max_bytes - self._waiting_room)
        self._stopping = False

    @property
    def room(self) -> int:
        """Number of messages that may be taken now."""
        return max(0, self._most - len(self._held))

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the messages in memory."""
        return self._waiting_bytes + self._delivering.used

    def held(self) -> Iterator[P]:
        """Yield the places of the messages that are not settled, for which the server must wait longer."""
        yield from self._held.values()

    # -- taking --------------------------------------------------------------------------------------------------

    def take(self, key: str, place: P, message: M, size: int) -> bool:
        """Put a message of ``size`` bytes into the line of its key. Messages of a key come in order of their sequences.

        Returns False if it is not taken: it is here or was settled already, or the lines were stopped.
        """
        if self._stopping or self._is_copy(place):
            return False
        entry = _Entry(place, message, size, place.sequence <= self._suspects_to)
        self._held[place.sequence] = place
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        line.entries.append(entry)
        self._keep(line, entry)
        if line.task is None:
            line.task = asyncio.get_running_loop().create_task(self._run(key, line))
        return True

    def _is_copy(self, place: P) -> bool:
        outcome = self._settled.get(place.sequence)
        if outcome is not None:
            self._deliverer.settled(place, outcome)
            return True
        if place.sequence not in self._held:
            return False
        self._held[place.sequence] = place  # how it is acknowledged may have changed
        return True

    def _keep(self, line: _Line[P, M], entry: _Entry[P, M]) -> None:
        """Let a message wait in memory, or set it aside."""
        if self._has_room(line, entry.size):
            self._waiting_bytes += entry.size
            line.waiting_bytes += entry.size
        else:
            entry.message = None

    def _has_room(self, line: _Line[P, M], size: int) -> bool:
        return line.waiting_bytes + size <= self._share and self._waiting_bytes + size <= self._waiting_room

    def _take_out(self, line: _Line[P, M], entry: _Entry[P, M]) -> M | None:
        """The message, which does not wait any more; None if it was set aside."""
        message, entry.message = entry.message, None
        if message is not None:
            self._waiting_bytes -= entry.size
            line.waiting_bytes -= entry.size
        return message

    # -- delivering ----------------------------------------------------------------------------------------------

    async def _run(self, key: str, line: _Line[P, M]) -> None:
        """Deliver the messages of a key, until none is left or the lines are stopped."""
        while line.entries and not self._stopping:
            entry = line.entries[0]
            outcome = await self._try(line, entry)
            if isinstance(outcome, Settled):
                line.entries.popleft()
                self._settle(self._held[entry.place.sequence], outcome)
                continue
            if outcome.failed:
                entry.failures += 1
            else:
                entry.losses += 1
            if not self._stopping:
                await _pause(outcome)
        if not line.entries:
            del self._lines[key]

    async def _try(self, line: _Line[P, M], entry: _Entry[P, M]) -> Outcome:
        """Deliver a message once. If it is to be delivered again, it waits in memory, or is set aside."""
        await self._delivering.enter(entry.size)
        try:
            message = self._take_out(line, entry)
            line.delivering = True
            outcome, message = await self._deliver(entry, message)
        finally:
            line.delivering = False
            self._delivering.leave(entry.size)
        if message is not None and not isinstance(outcome, Settled):
            entry.message = message
            self._keep(line, entry)
        return outcome

    async def _deliver(self, entry: _Entry[P, M], message: M | None) -> tuple[Outcome, M | None]:
        """Deliver a message, which is None if it must be read again. Returns the outcome, and the message if it is
        known by now."""
        place, begun = entry.place, False
        try:
            if message is None and (message := await self._deliverer.read(place)) is None:
                return Settled.GONE, None
            if entry.suspect:
                entry.failures = await self._deliverer.begin(place)
                entry.suspect = False
            begun = True
            return await self._deliverer.deliver(place, message, Tries(entry.failures, entry.losses)), message
        except Exception:
            after = self._retries.delay(1 + (entry.failures if begun else entry.losses))
            logger.exception("delivering the message %d of a stream failed; again in %g s", place.sequence, after)
            return Again(after, failed=begun), message

    def _settle(self, place: P, outcome: Settled) -> None:
        del self._held[place.sequence]
        self._settled[place.sequence] = outcome
        if len(self._settled) > self._most:
            self._settled.popitem(last=False)
        self._deliverer.settled(place, outcome)

    # -- stopping ------------------------------------------------------------------------------------------------

    async def stop(self, within: float = 0.0) -> list[P]:
        """Begin no more deliveries, and wait at most ``within`` seconds for those that are under way.

        Returns the places of the messages that are not settled, in the order of their sequences. Those whose delivery
        was broken off may have been handled.
        """
        self._stopping = True
        tasks = [line.task for line in self._lines.values() if line.task is not None]
        for line in self._lines.values():
            if line.task is not None and not line.delivering:
                line.task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=within)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        self._lines.clear()
        return [self._held[sequence] for sequence in sorted(self._held)]


async def _pause(again: Again) -> None:
    """Wait until a message is delivered again."""
    if again.token is None:
        await asyncio.sleep(again.after)
        return
    cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    again.token.link_future(cancelled)
    await asyncio.wait({cancelled}, timeout=again.after)
