"""The parts of a streamed reply: what is sent, kept, asked for again, and given to the consumer. No I/O, no clocks.

The worker numbers its parts from 1, and sends no more than a *window* ahead of what the consumer has taken, in items
and in bytes. The caller gives parts to its consumer in their order, each once, and says from time to time how far it
is. Parts may get lost while one of the two connects again. So the worker keeps each part until the caller has it and
all before it, and the caller keeps parts that arrive early and asks for exactly those that are missing.

What the caller says (`Progress`) is complete each time. So it does no harm if it is lost, late or repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Window(NamedTuple):
    """How far a worker may be ahead of the consumer. One part may always be on its way, however large it is."""

    items: int
    size: int
    """In bytes."""


DEFAULT_WINDOW: Final = Window(256, 1 << 20)


class Progress(NamedTuple):
    """How far a caller is.

    ``consumed`` parts were taken by its consumer. It has all parts up to ``have``. ``missing`` are the numbers of the
    first and the last part of the first gap, or of all that may be lost; None if it misses none, as far as it knows.
    """

    consumed: int = 0
    have: int = 0
    missing: tuple[int, int] | None = None


@dataclass(slots=True)
class _Kept:
    body: bytes
    sent_at: float


@dataclass(slots=True)
class PartsSent:
    """The parts of one stream at its worker. Times are those of any clock, in seconds."""

    window: Window
    sent: int = 0
    """Number of parts that were sent."""
    consumed: int = 0
    """Number of parts that the consumer has taken, as far as the caller has said."""
    have: int = 0
    """The caller has all parts up to this one, as far as it has said."""
    _kept: dict[int, _Kept] = field(default_factory=dict)
    """The parts after `have`."""
    _sizes: deque[int] = field(default_factory=deque)
    """The sizes of the parts after `consumed`."""
    _size: int = 0

    @property
    def has_room(self) -> bool:
        """True if another part may be sent."""
        ahead = self.sent - self.consumed
        return not ahead or (ahead < self.window.items and self._size < self.window.size)

    @property
    def is_received(self) -> bool:
        """True if the caller has all parts."""
        return self.have >= self.sent

    def add(self, body: bytes, size: int, now: float) -> int:
        """Count a part that is sent now, and keep its ``body``. ``size`` is that of its payload. Returns its number."""
        self.sent += 1
        self._kept[self.sent] = _Kept(body, now)
        self._sizes.append(size)
        self._size += size
        return self.sent

    def told(self, progress: Progress, now: float, late: float) -> Iterator[int]:
        """Take in how far the caller is. Returns the numbers of the parts that are to be sent again, in their order.

        These are the missing ones. If the caller misses none, but does not have parts that were sent more than ``late``
        seconds ago, it is these.
        """
        have = min(max(self.have, progress.have), self.sent)
        for number in range(self.have + 1, have + 1):
            del self._kept[number]
        self.have = have
        for _ in range(min(max(self.consumed, progress.consumed), have) - self.consumed):
            self._size -= self._sizes.popleft()
            self.consumed += 1
        first, last = progress.missing or (have + 1, self.sent)
        yield from self._again(max(first, have + 1), last, now if progress.missing is not None else now - late, now)

    def lost(self, now: float) -> Iterator[int]:
        """What was sent may be lost. Returns the numbers of all parts that the caller may not have, in their order."""
        yield from self._again(self.have + 1, self.sent, now, now)

    def _again(self, first: int, last: int, sent_until: float, now: float) -> Iterator[int]:
        for number in range(first, min(last, self.sent) + 1):
            kept = self._kept[number]
            if kept.sent_at <= sent_until:
                kept.sent_at = now
                yield number

    def sent_again(self, number: int, now: float) -> bytes | None:
        """The body of a part that is sent again now; None if the caller has it."""
        kept = self._kept.get(number)
        if kept is None:
            return None
        kept.sent_at = now
        return kept.body


@dataclass(slots=True)
class PartsReceived(Generic[T]):
    """The parts of one stream at its caller."""

    window: Window
    have: int = 0
    """All parts up to this one have arrived."""
    consumed: int = 0
    """Number of parts that were taken."""
    total: int | None = None
    """Number of all parts; None as long as that is not known."""
    _ready: deque[tuple[T, int]] = field(default_factory=deque)
    """The parts that have arrived in order and were not taken, with their sizes."""
    _early: dict[int, tuple[T, int]] = field(default_factory=dict)
    """Later parts, by their numbers."""
    _since_told: int = 0
    _size_since_told: int = 0
    _asked_to: int = 0
    """The last part that the worker was asked for, in a gap or because it may be lost; 0 if there is none."""

    @property
    def is_complete(self) -> bool:
        """True if it is known that all parts have arrived."""
        return self.total is not None and self.have >= self.total

    @property
    def has_next(self) -> bool:
        """True if `take` has something to return."""
        return bool(self._ready)

    @property
    def misses_some(self) -> bool:
        """True if it is known that parts were sent that have not arrived."""
        return bool(self._early) or (self.total is not None and self.have < self.total)

    def receive(self, number: int, item: T, size: int) -> bool:
        """Take in a part. Returns False if it had arrived before, or is too far ahead to be one that was allowed."""
        if number <= self.have or number in self._early or number > self.consumed + self.window.items:
            return False
        self._early[number] = item, size
        while (found := self._early.pop(self.have + 1, None)) is not None:
            self.have += 1
            self._ready.append(found)
        return True

    def end(self, total: int) -> None:
        """Note how many parts there are."""
        self.total = total

    def take(self) -> T:
        """The next part, in order. Raises IndexError if there is none."""
        item, size = self._ready.popleft()
        self.consumed += 1
        self._since_told += 1
        self._size_since_told += size
        return item

    def rest(self) -> Iterator[T]:
        """All parts that have arrived and were not taken. They are gone then."""
        waiting = [*self._ready, *self._early.values()]
        self._ready.clear()
        self._early.clear()
        return (item for item, _ in waiting)

    @property
    def is_news(self) -> bool:
        """True if the worker is to be told at once: half of the window was consumed, or there is a new gap.

        A gap that is being filled is not new: to ask for the rest of it whenever a part arrives would make the worker
        send n²/2 parts for a gap of n.
        """
        return (
            2 * self._since_told >= self.window.items
            or 2 * self._size_since_told >= self.window.size
            or (bool(self._early) and self.have >= self._asked_to)
        )

    def progress(self, *, some_lost: bool = False) -> Progress:
        """How far this is, to be told to the worker now. ``some_lost``: what was on its way may be lost."""
        self._since_told = self._size_since_told = 0
        missing = None
        if some_lost:
            missing = self.have + 1, self.have + self.window.items
        elif self._early:
            missing = self.have + 1, min(self._early) - 1
        elif self.total is not None and self.have < self.total:
            missing = self.have + 1, self.total
        self._asked_to = 0 if missing is None else missing[1]
        return Progress(self.consumed, self.have, missing)
