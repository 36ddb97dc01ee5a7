"""The calls that a worker does not handle, because another copy of each was or will be sent.

A call is lost on its way, or seems to be: its bytes may wait in a connection or a server that stalls, and arrive
minutes later. So the caller sends it again only after every worker of the type has promised not to handle the lost copy
(decision 35). A worker that starts later learns the promises from the others before it takes messages.

A promise is kept, whatever others ask for: where there is no room, none is given. The former copies that a call names
are kept as long as there is room for them, apart from the promises.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

import orjson

REMEMBERED_FOR: Final = 900.0
"""Seconds for which a promise is kept. A connection on which nothing is acknowledged ends before that: Linux gives up
after about 15 minutes, and nats-server after a few."""
_AT_MOST = 50_000
"""Maximum number of promises, which then take about 10 MB with ids as natsrt makes them. Few calls are ever lost."""
_NAMED_AT_MOST = 10_000
"""Maximum number of former copies that calls have named. The oldest are dropped first."""

_AGE_BYTES = 32
"""Bytes of JSON that an age takes at most, with what is around it."""


class WithdrawnCalls:
    """Call ids, each with the time from which it counts by the event loop's clock."""

    def __init__(self) -> None:
        self._promised: OrderedDict[str, float] = OrderedDict()
        self._named: OrderedDict[str, float] = OrderedDict()

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._promised or call_id in self._named

    def __len__(self) -> int:
        return len(self._promised.keys() | self._named.keys())

    def promise(self, calls: Iterable[str], now: float) -> None:
        """Promise not to handle these calls, as far as there is room: see `has_promised`.

        A promise that was given before counts from now.
        """
        _drop(self._promised, now)
        for call_id in calls:
            if call_id in self._promised or len(self._promised) < _AT_MOST:
                _put(self._promised, call_id, now)

    def has_promised(self, call_id: str) -> bool:
        """Whether this worker will not handle the call for the time that promises are kept."""
        return call_id in self._promised

    def name(self, calls: Iterable[str], now: float) -> None:
        """Do not handle these calls: another call, which is handled, has named them as its former copies."""
        for call_id in calls:
            _put(self._named, call_id, now)
        _drop(self._named, now, _NAMED_AT_MOST)

    def ages(self, now: float, at_most: int, max_bytes: int) -> dict[str, float]:
        """The latest calls for another worker, each with its age in seconds: up to ``at_most``, and of ``max_bytes``.

        These are the promises, and where there is room, what calls have named.
        """
        ages: dict[str, float] = {}
        for kept in (self._promised, self._named):
            for call_id, since in reversed(kept.items()):
                max_bytes -= len(orjson.dumps(call_id)) + _AGE_BYTES
                if now - since > REMEMBERED_FOR or len(ages) >= at_most or max_bytes < 0:
                    break
                ages.setdefault(call_id, now - since)
        return dict(reversed(ages.items()))

    def learn(self, ages: Mapping[str, float], now: float) -> None:
        """Make the promises that another worker has made, so many seconds ago, as far as there is room."""
        room = _AT_MOST - len(self._promised)
        for call_id, age in sorted(ages.items(), key=lambda item: item[1]):
            since = now - max(0.0, age)
            if call_id in self._promised:
                self._promised[call_id] = max(since, self._promised[call_id])
            elif room > 0:
                room -= 1
                self._promised[call_id] = since
        self._promised = OrderedDict(sorted(self._promised.items(), key=lambda item: item[1]))


def _put(calls: OrderedDict[str, float], call_id: str, now: float) -> None:
    calls[call_id] = now
    calls.move_to_end(call_id)


def _drop(calls: OrderedDict[str, float], now: float, at_most: int | None = None) -> None:
    """Drop what has been kept for long enough, and the oldest of more than ``at_most``."""
    while calls and (
        (at_most is not None and len(calls) > at_most) or now - next(iter(calls.values())) > REMEMBERED_FOR
    ):
        calls.popitem(last=False)
