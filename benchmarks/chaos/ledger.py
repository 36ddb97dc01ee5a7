"""Records every call of a caller: when it was sent, and when and how it ended."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.chaos.scenario import Figure, under
from natsrt import errors

ACKNOWLEDGED = "acknowledged"
PENDING = "pending"
"""Outcome of a call that had not ended when the load was stopped and the time limit had passed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One call. Times are seconds of the monotonic clock, which all processes of a machine share."""

    recipient: str
    sent: float
    ended: float
    outcome: str
    """`ACKNOWLEDGED`, `PENDING`, or the name of the error class."""
    reply: Any = None
    """The recorded part of the reply, as JSON values; the text of the error of a call that failed; otherwise None."""

    @property
    def acknowledged(self) -> bool:
        return self.outcome == ACKNOWLEDGED


class Ledger:
    """The calls of one or more callers."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = list(entries)

    @classmethod
    def from_json(cls, rows: Iterable[Iterable[Any]]) -> Self:
        """Create a ledger from the result of `to_json`."""
        return cls(Entry(*row) for row in rows)

    def to_json(self) -> list[list[Any]]:
        """Return the entries as plain values."""
        return [[e.recipient, e.sent, e.ended, e.outcome, e.reply] for e in self.entries]

    @classmethod
    def together(cls, ledgers: Iterable[Ledger]) -> Self:
        """Return one ledger with the entries of all of these ledgers."""
        return cls(entry for ledger in ledgers for entry in ledger.entries)

    def where(self, wanted: Callable[[Entry], bool]) -> Ledger:
        """Return a ledger with the entries for which ``wanted`` returns true."""
        return Ledger(entry for entry in self.entries if wanted(entry))

    @property
    def acknowledged(self) -> int:
        """Number of calls that were answered with a reply."""
        return sum(entry.acknowledged for entry in self.entries)

    @property
    def errors(self) -> Mapping[str, int]:
        """Number of calls without a reply, by outcome: the name of the error class, or `PENDING`."""
        return Counter(entry.outcome for entry in self.entries if not entry.acknowledged)

    @property
    def texts(self) -> list[str]:
        """The texts of the first three errors, with the recipients and durations of their calls."""
        failed = (entry for entry in self.entries if not entry.acknowledged)
        return [f"{e.recipient} after {e.ended - e.sent:.2f} s: {e.reply}" for e in itertools.islice(failed, 3)]

    @property
    def untyped(self) -> int:
        """Number of calls that ended neither with a reply nor with an error of natsrt, or did not end."""
        return sum(count for outcome, count in self.errors.items() if outcome not in errors.__all__)

    @property
    def slowest(self) -> float:
        """Duration of the longest call in seconds, whatever its outcome."""
        return max((entry.ended - entry.sent for entry in self.entries), default=0.0)

    @property
    def longest_gap(self) -> float:
        """The longest time without an acknowledged call, in seconds."""
        if not self.entries:
            return 0.0
        moments = sorted(entry.ended for entry in self.entries if entry.acknowledged)
        moments = [min(e.sent for e in self.entries), *moments, max(e.ended for e in self.entries)]
        return max(later - earlier for earlier, later in zip(moments, moments[1:], strict=False))

    def figures(self, of: str) -> list[Figure]:
        """Return the figures of these calls under the heading ``of``.

        The only promise is that every call ends with a reply or an error of natsrt.
        """
        figures = [
            Figure(name="calls sent", value=len(self.entries)),
            Figure(name="calls acknowledged", value=self.acknowledged),
            Figure(name="calls that failed, by error", value=self.errors),
            Figure(name="the first errors", value=self.texts),
            Figure(name="calls without an end, or with an untyped error", value=self.untyped, at_most=0),
            Figure(name="slowest call", value=self.slowest, unit="s"),
            Figure(name="longest time without any reply", value=self.longest_gap, unit="s"),
        ]
        return under(of, figures)
