"""Increments counters while their workers are killed one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.chaos.counters import agent_of
from benchmarks.chaos.crew import ask_all
from benchmarks.chaos.fleet import Fleet, also_beside_a_tap
from benchmarks.chaos.scenario import Figure, Scenario

BACK_WITHIN = 5.0
"""Seconds after the end of its owner within which an agent replies again, to any call."""
BACK_FOR_NEW_CALLS_WITHIN = 1.0
"""Seconds within which it replies again to calls that were sent after the end."""


async def measure(
    *, increments: int = 5_000, keys: int = 50, workers: int = 3, every: float = 1.0, tap: bool = False
) -> list[Figure]:
    """Increment with eight callers in four processes, and kill workers.

    Args:
        increments: Number of calls.
        keys: Number of counters.
        workers: Number of worker processes.
        every: Seconds between two kills.
        tap: Whether another client subscribes to every subject.
    """
    names = [f"k{number}" for number in range(keys)]
    async with Fleet(workers=workers, callers=4, tap=tap) as fleet:
        async with fleet.dying(every):
            recipients = [agent_of(key) for key in names]
            await ask_all(fleet.callers, "call", recipients=recipients, concurrency=2, pause=0.02)
            await fleet.ended(increments)
        history = await fleet.history(names)
    outages = history.outages(fleet.ends)
    new, all_calls = _known(outage.new for outage in outages), _known(outage.any for outage in outages)
    # With a tap, each kill blocks the few callers for seconds, so they cannot call most agents in between.
    at_once, in_time = (None, None) if tap else (BACK_FOR_NEW_CALLS_WITHIN, BACK_WITHIN)
    return [
        Figure(name="workers killed", value=len(fleet.ends)),
        *history.figures(),
        Figure(name="times that an agent had to move", value=len(outages)),
        Figure(name="outage of an agent for new calls, the median", value=_median(new), unit="s"),
        Figure(name="longest outage of an agent for new calls", value=max(new, default=0.0), unit="s", at_most=at_once),
        Figure(
            name="longest outage of an agent, calls that were under way included",
            value=max(all_calls, default=0.0),
            unit="s",
            at_most=in_time,
        ),
        Figure(
            name="longest time without a reply to any new call to a killed worker's agents",
            value=max(history.no_reply(fleet.ends), default=0.0),
            unit="s",
            at_most=at_once,
        ),
    ]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


SCENARIO = Scenario(
    title="5,000 increments of 50 counters while a worker is killed every second",
    measure=lambda short: also_beside_a_tap(lambda tap: measure(increments=1_500 if short else 5_000, tap=tap)),
)
