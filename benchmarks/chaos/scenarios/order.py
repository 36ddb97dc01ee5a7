"""Checks the order of calls and events from one sender to keyed agents, beginning with agents without an owner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from benchmarks.chaos.crew import ask_all
from benchmarks.chaos.fleet import Fleet, also_beside_a_tap
from benchmarks.chaos.scenario import Figure, Scenario

_ARRIVED_WITHIN = 30.0
_POLL_SECONDS = 0.05


async def measure(*, messages: int = 10_000, keys: int = 100, workers: int = 3, tap: bool = False) -> list[Figure]:
    """Send from one process while another process sends to other agents.

    In the figures, an event counts once for each subscribed agent type.

    Args:
        messages: Number of calls and events to send.
        keys: Number of keys.
        workers: Number of worker processes.
        tap: Whether another client subscribes to every subject.
    """
    names = [f"k{number}" for number in range(keys)]
    async with Fleet(workers=workers, callers=2, tap=tap) as fleet:
        noise = [f"noise{number}" for number in range(keys)]
        told, _ = await asyncio.gather(
            fleet.callers[0].ask("dictate", keys=names, count=messages),
            fleet.callers[1].ask("dictate", keys=noise, count=messages // 2),
        )
        expected: Mapping[str, Sequence[int]] = told["expected"]
        deadline = time.monotonic() + _ARRIVED_WITHIN
        while True:
            places = await ask_all(list(fleet.workers.values()), "written")
            arrived = sum(len(numbers) for place in places for scribe, numbers in place.items() if scribe in expected)
            if arrived >= sum(map(len, expected.values())) or time.monotonic() > deadline:
                break
            await asyncio.sleep(_POLL_SECONDS)
    written = {scribe: [place[scribe] for place in places if scribe in place] for scribe in expected}
    return [
        Figure(name="messages to agents", value=sum(map(len, expected.values()))),
        Figure(name="agents", value=len(expected)),
        Figure(name="calls that failed, by error", value=told["errors"]),
        Figure(name="calls that failed", value=sum(told["errors"].values()), at_most=0),
        Figure(name="messages that did not arrive", value=_missing(expected, written), at_most=0),
        Figure(name="messages that arrived twice", value=_twice(written), at_most=0),
        Figure(name="agents with several instances", value=sum(len(w) > 1 for w in written.values()), at_most=0),
        Figure(name="inversions", value=_inversions(written), at_most=0),
    ]


Written = Mapping[str, Sequence[Sequence[int]]]
"""By agent: the numbers that each of its instances recorded."""


def _missing(expected: Mapping[str, Sequence[int]], written: Written) -> int:
    return sum(len(set(expected[scribe]).difference(*instances)) for scribe, instances in written.items())


def _twice(written: Written) -> int:
    all_of_each = [[number for numbers in instances for number in numbers] for instances in written.values()]
    return sum(len(numbers) - len(set(numbers)) for numbers in all_of_each)


def _inversions(written: Written) -> int:
    """Return the number of messages that directly follow a message that was sent later."""
    return sum(
        later < earlier
        for instances in written.values()
        for numbers in instances
        for earlier, later in zip(numbers, numbers[1:], strict=False)
    )


SCENARIO = Scenario(
    title="Calls and events of one sender to keyed agents over three workers",
    measure=lambda short: also_beside_a_tap(lambda tap: measure(messages=3_000 if short else 10_000, tap=tap)),
)
