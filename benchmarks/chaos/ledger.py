"""Every call of a caller: when it was sent, when and how it ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.chaos.scenario import Figure, under
from natsrt import errors

ACKNOWLEDGED = "acknowledged"
PENDING = "pending"
"""A call that had not ended when the ledger was closed, though it had the time."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One call. Times are seconds of the system's monotonic clock, which all processes of a machine share."""

    recipient: str
    sent: float
    ended: float
    outcome: str
    """`ACKNOWLEDGED`, `PENDING`, or the name of the error's class."""
    reply: Any = None
    """What of the reply is worth keeping, as JSON; None for calls without one."""

    @property
    def acknowledged(self) -> bool:
        return self.outcome == ACKNOWLEDGED


class Ledger:
    """The calls of one caller, or of several together."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = list(entries)

    @classmethod
    def from_json(cls, rows: Iterable[Iterable[Any]]) -> Self:
        """What `to_json` made."""
        return cls(Entry(*row) for row in rows)

    def to_json(self) -> list[list[Any]]:
        """Plain values."""
        return [[e.recipient, e.sent, e.ended, e.outcome, e.reply] for e in self.entries]

    @classmethod
    def together(cls, ledgers: Iterable[Ledger]) -> Self:
        """All entries of all of them."""
        return cls(entry for ledger in ledgers for entry in ledger.entries)

    def where(self, wanted: Callable[[Entry], bool]) -> Ledger:
        """Some of the entries."""
        return Ledger(entry for entry in self.entries if wanted(entry))

    @property
    def acknowledged(self) -> int:
        """Calls that got their reply."""
        return sum(entry.acknowledged for entry in self.entries)

    @property
    def errors(self) -> Mapping[str, int]:
        """Calls without a reply, by the class of the error."""
        return Counter(entry.outcome for entry in self.entries if not entry.acknowledged)

    @property
    def untyped(self) -> int:
        """Calls that ended neither in a reply nor in an error of natsrt's own, or not at all."""
        return sum(count for outcome, count in self.errors.items() if outcome not in errors.__all__)

    @property
    def slowest(self) -> float:
        """Seconds of the call that took longest, whatever its end."""
        return max((entry.ended - entry.sent for entry in self.entries), default=0.0)

    @property
    def longest_gap(self) -> float:
        """The longest time in seconds in which no call of this ledger was acknowledged."""
        if not self.entries:
            return 0.0
        moments = sorted(entry.ended for entry in self.entries if entry.acknowledged)
        moments = [min(e.sent for e in self.entries), *moments, max(e.ended for e in self.entries)]
        return max(later - earlier for earlier, later in zip(moments, moments[1:], strict=False))

    def figures(self, of: str) -> list[Figure]:
        """What there is to say about these calls, the heading ``of`` before it; that each has an end is a promise."""
        figures = [
            Figure(name="calls sent", value=len(self.entries)),
            Figure(name="calls acknowledged", value=self.acknowledged),
            Figure(name="calls that failed, by error", value=self.errors),
            Figure(name="calls without an end, or with an untyped error", value=self.untyped, at_most=0),
            Figure(name="slowest call", value=self.slowest, unit="s"),
            Figure(name="longest time without any reply", value=self.longest_gap, unit="s"),
        ]
        return under(of, figures)
