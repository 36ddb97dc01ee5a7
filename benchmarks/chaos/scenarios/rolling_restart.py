"""Replaces all workers gracefully, one after the other, under load."""

from __future__ import annotations

import time

from benchmarks.chaos.counters import agent_of
from benchmarks.chaos.crew import ask_all
from benchmarks.chaos.fleet import Fleet, also_beside_a_tap
from benchmarks.chaos.scenario import Figure, Scenario


async def measure(
    *, calls: int = 10_000, keys: int = 200, workers: int = 3, pause: float = 0.01, tap: bool = False
) -> list[Figure]:
    """Call with 64 concurrent callers in four processes, and replace the workers.

    Each worker gets SIGTERM. Its replacement starts when it has ended.

    Args:
        calls: Number of calls.
        keys: Number of agents.
        workers: Number of worker processes.
        pause: Seconds between a reply and the same caller's next call.
        tap: Whether another client subscribes to every subject.
    """
    names = [f"k{number}" for number in range(keys)]
    async with Fleet(workers=workers, callers=4, tap=tap) as fleet:
        recipients = [agent_of(key) for key in names]
        await ask_all(fleet.callers, "call", recipients=recipients, concurrency=16, pause=pause)
        await fleet.ended(calls // 10)
        took = []
        for worker_id in list(fleet.workers):
            began = time.monotonic()
            await fleet.end_in_order(worker_id)
            took.append(time.monotonic() - began)
            await fleet.start_worker()
        await fleet.ended(calls)
        history = await fleet.history(names)
    waits = [outage.new for outage in history.outages(fleet.ends) if outage.new is not None]
    failed = len(history.ledger.entries) - history.ledger.acknowledged
    return [
        Figure(name="workers", value=len(took)),
        Figure(name="a worker's slowest stop", value=max(took), unit="s"),
        *history.figures(),
        Figure(name="calls that failed", value=failed, at_most=0),
        Figure(name="longest wait of the first call to an agent that moved", value=max(waits, default=0.0), unit="s"),
    ]


SCENARIO = Scenario(
    title="Rolling restart of all workers under 64 concurrent callers",
    measure=lambda short: also_beside_a_tap(lambda tap: measure(calls=3_000 if short else 10_000, tap=tap)),
)
