"""What the calls of counters and their stored states tell: was anything lost, counted twice, or alive twice?"""

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
    """The end of a worker process, at a moment of the monotonic clock."""

    worker_id: str
    moment: float


class Outage(NamedTuple):
    """How long an agent was out of reach, in seconds; None where nobody called, or it did not reply any more.

    ``new``: from the first call that was sent after the end of its owner to the first reply to such a call; calls that
    met the end of another worker on their way are left out. ``any``: from the first call that was under way at the end,
    or sent after it, to the next reply.
    """

    new: float | None
    any: float | None


class History:
    """The calls of counters, from the ledgers of their callers, and the stored states after them.

    ``stored``: the names of the calls in the state of each counter, by its key.
    """

    def __init__(self, ledgers: Iterable[Ledger], stored: Mapping[str, Sequence[str]]) -> None:
        self.ledger = Ledger.together(ledgers)
        self._stored = stored
        self._by_key: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.ledger.entries:
            self._by_key[entry.recipient.partition("/")[2]].append(entry)

    @property
    def applied(self) -> int:
        """Calls in the stored states."""
        return sum(map(len, self._stored.values()))

    @property
    def lost(self) -> int:
        """Acknowledged calls that are not in the state of their counter."""
        return sum(
            _Counted(*entry.reply).call not in self._stored.get(key, ())
            for key, entries in self._by_key.items()
            for entry in entries
            if entry.acknowledged
        )

    @property
    def counted_twice(self) -> int:
        """How much more often than once calls are in the states, acknowledged or not."""
        counts = Counter(call for calls in self._stored.values() for call in calls)
        return sum(count - 1 for count in counts.values())

    @property
    def doubles(self) -> int:
        """Accepted replies that two instances of one agent gave at the same time.

        In the order of the values that they brought the counter to, each value comes once, and an instance that was
        followed by another gives no reply any more.
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
        """Instances that gave replies which were accepted."""
        return len({entry.reply[3] for entry in self.ledger.entries if entry.acknowledged})

    def outages(self, ends: Sequence[End]) -> list[Outage]:
        """For each end of a worker and each counter that it owned: how long that was out of reach."""
        moments = [end.moment for end in ends]
        return [self._outage(key, end.moment, moments) for end in ends for key in self._owned(end)]

    def no_reply(self, ends: Sequence[End]) -> list[float]:
        """For each end of a worker: seconds from the first new call to its counters to the first reply to any of them.

        New calls are those of `Outage`. An end without a reply is left out.
        """
        moments = [end.moment for end in ends]
        gaps = [_until_a_reply(self._new(self._owned(end), end.moment, moments)) for end in ends]
        return [gap for gap in gaps if gap is not None]

    def _owned(self, end: End) -> list[str]:
        """The counters whose last reply before the end came from that worker."""
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
        """What there is to say, and what natsrt promises about it."""
        return [
            *self.ledger.figures("all"),
            Figure(name="calls in the stored states", value=self.applied),
            Figure(name="acknowledged calls that are in no state", value=self.lost, at_most=0),
            Figure(name="calls that were counted more than once", value=self.counted_twice, at_most=0),
            Figure(name="replies of two instances at the same time", value=self.doubles, at_most=0),
            Figure(name="instances", value=self.instances),
        ]


def _until_a_reply(entries: Sequence[Entry]) -> float | None:
    """Seconds from the first of these calls to the first reply to any of them; None without one."""
    replies = [entry.ended for entry in entries if entry.acknowledged]
    return min(replies) - min(entry.sent for entry in entries) if replies else None
