"""Checks the calls to counters against the stored states: calls lost or counted twice, agents that were live twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.chaos.ledger import Entry, Ledger
from benchmarks.chaos.scenario import Figure


class _Counted(NamedTuple):
    call: str
    value: int
    worker: str
    instance: str


@dataclass(frozen=True, slots=True)
class End:
    """The end of a worker process. ``moment`` is a time of the monotonic clock."""

    worker_id: str
    moment: float


class Outage(NamedTuple):
    """How long an agent was unreachable after the end of its owner, in seconds; None if there was no reply.

    ``new``: from the first call that was sent after the end to the first reply to such a call. Calls during which
    another worker ended are left out. ``any``: from the end, or from the first call that was sent after it if no call
    was in progress at the end, to the next reply.
    """

    new: float | None
    any: float | None


class History:
    """The calls to counters, and the states that were stored afterwards.

    Args:
        ledgers: The ledgers of all callers.
        stored: The names of the calls in the stored state of each counter, by key.
    """

    def __init__(self, ledgers: Iterable[Ledger], stored: Mapping[str, Sequence[str]]) -> None:
        self.ledger = Ledger.together(ledgers)
        self._stored = stored
        self._by_key: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.ledger.entries:
            self._by_key[entry.recipient.partition("/")[2]].append(entry)

    @property
    def applied(self) -> int:
        """Number of calls in the stored states."""
        return sum(map(len, self._stored.values()))

    @property
    def lost(self) -> int:
        """Number of acknowledged calls that are missing in the state of their counter."""
        return sum(
            _Counted(*entry.reply).call not in self._stored.get(key, ())
            for key, entries in self._by_key.items()
            for entry in entries
            if entry.acknowledged
        )

    @property
    def counted_twice(self) -> int:
        """Number of surplus entries of calls in the states, whether the calls were acknowledged or not."""
        counts = Counter(call for calls in self._stored.values() for call in calls)
        return sum(count - 1 for count in counts.values())

    @property
    def doubles(self) -> int:
        """Number of accepted replies that show two live instances of one agent at the same time.

        The replies are sorted by the value of the counter. Each value must occur once, and an instance must not reply
        again after another instance has replied.
        """
        found = 0
        for entries in self._by_key.values():
            replies = sorted((_Counted(*entry.reply) for entry in entries if entry.acknowledged), key=lambda r: r.value)
            followed: set[str] = set()
            for earlier, later in zip(replies, replies[1:], strict=False):
                if later.instance != earlier.instance:
                    followed.add(earlier.instance)
                found += later.value == earlier.value or later.instance in followed
        return found

    @property
    def instances(self) -> int:
        """Number of instances with accepted replies."""
        return len({entry.reply[3] for entry in self.ledger.entries if entry.acknowledged})

    def outages(self, ends: Sequence[End]) -> list[Outage]:
        """Return the outage of each counter that an ended worker owned, for each end."""
        moments = [end.moment for end in ends]
        return [self._outage(key, end.moment, moments) for end in ends for key in self._owned(end)]

    def no_reply(self, ends: Sequence[End]) -> list[float]:
        """Return for each end the seconds from the first new call to the worker's counters to the first reply.

        New calls are defined as in `Outage`. Ends without a reply are left out.
        """
        moments = [end.moment for end in ends]
        gaps = [_until_a_reply(self._new(self._owned(end), end.moment, moments)) for end in ends]
        return [gap for gap in gaps if gap is not None]

    def _owned(self, end: End) -> list[str]:
        """Return the keys of the counters whose last reply before the end came from that worker."""
        owned = []
        for key, entries in self._by_key.items():
            before = [entry for entry in entries if entry.acknowledged and entry.ended < end.moment]
            if before and _Counted(*max(before, key=lambda entry: entry.ended).reply).worker == end.worker_id:
                owned.append(key)
        return owned

    def _outage(self, key: str, moment: float, moments: Sequence[float]) -> Outage:
        met = [entry for entry in self._by_key[key] if entry.ended >= moment]
        replies = [entry.ended for entry in met if entry.acknowledged]
        began = max(moment, min((entry.sent for entry in met), default=moment))
        return Outage(
            new=_until_a_reply(self._new([key], moment, moments)), any=min(replies) - began if replies else None
        )

    def _new(self, keys: Iterable[str], moment: float, moments: Sequence[float]) -> list[Entry]:
        return [
            entry
            for key in keys
            for entry in self._by_key[key]
            if entry.sent >= moment and not any(entry.sent < other <= entry.ended for other in moments)
        ]

    def figures(self) -> list[Figure]:
        """Return the figures, with the bounds that natsrt promises."""
        return [
            *self.ledger.figures("all"),
            Figure(name="calls in the stored states", value=self.applied),
            Figure(name="acknowledged calls that are in no state", value=self.lost, at_most=0),
            Figure(name="calls that were counted more than once", value=self.counted_twice, at_most=0),
            Figure(name="replies of two instances at the same time", value=self.doubles, at_most=0),
            Figure(name="instances", value=self.instances),
        ]


def _until_a_reply(entries: Sequence[Entry]) -> float | None:
    """Return the seconds from the first of these calls to the first reply to any of them; None without a reply."""
    replies = [entry.ended for entry in entries if entry.acknowledged]
    return min(replies) - min(entry.sent for entry in entries) if replies else None
