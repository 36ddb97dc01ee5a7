"""Freezes a worker, lets other workers take over and change its agents, and resumes it."""

from __future__ import annotations

import asyncio
import time

from benchmarks.chaos.counters import agent_of
from benchmarks.chaos.crew import ask_all
from benchmarks.chaos.fleet import Fleet, also_beside_a_tap
from benchmarks.chaos.scenario import Figure, Scenario

_HANDLERS = 5
_IN_HANDLERS = 2.0
"""Duration in seconds of the handlers that run while the worker is frozen. They save when it is resumed."""
_FROM_THEN_ON = 3.0
"""Seconds of load after the worker is resumed."""


async def measure(*, keys: int = 30, seconds: float = 10.0, tap: bool = False) -> list[Figure]:
    """Freeze one of two workers while some of its handlers run.

    Args:
        keys: Number of agents.
        seconds: Seconds for which the worker is frozen.
        tap: Whether another client subscribes to every subject.
    """
    names = [f"k{number}" for number in range(keys)]
    async with Fleet(workers=2, callers=2, tap=tap) as fleet:
        await ask_all(fleet.callers, "first_calls", keys=names, moment=time.monotonic())
        frozen_id, frozen = next(iter(fleet.workers.items()))
        owned = (await frozen.ask("instances"))["made"]
        for key in owned[:_HANDLERS]:
            await fleet.callers[0].ask("call_one", key=key, handled_seconds=_IN_HANDLERS)
        while (await frozen.ask("health"))["handlers_running"] < min(_HANDLERS, len(owned)):
            pass
        frozen.freeze()
        frozen_at = time.monotonic()
        recipients = [agent_of(key) for key in names]
        await ask_all(fleet.callers, "call", recipients=recipients, concurrency=2 * keys, pause=0.1)
        await asyncio.sleep(seconds)
        frozen.resume()
        resumed_at = time.monotonic()
        await asyncio.sleep(_FROM_THEN_ON)
        history = await fleet.history(names)
        instances = await ask_all(list(fleet.workers.values()), "instances")
        after = await frozen.ask("instances")
    elsewhere = [
        entry
        for entry in history.ledger.entries
        if entry.acknowledged and entry.reply[2] != frozen_id and entry.recipient in set(map(agent_of, owned))
    ]
    moved = {entry.recipient for entry in elsewhere if entry.ended < resumed_at}
    first = min((entry.ended for entry in elsewhere), default=None)
    return [
        Figure(name="agents of the worker that stood still", value=len(owned)),
        Figure(name="of these, changed elsewhere meanwhile", value=len(moved), at_least=len(owned)),
        Figure(name="until the first was", value=None if first is None else first - frozen_at, unit="s"),
        Figure(name="records that it found changed", value=after["conflicts"], at_least=len(owned)),
        Figure(name="its instances that were closed", value=len(after["closed"]), at_least=len(owned)),
        Figure(name="agents that live now", value=sum(one["live"] for one in instances), at_most=keys),
        *history.figures(),
    ]


SCENARIO = Scenario(
    title="The owner of agents stands still for 10 s while others take them over",
    measure=lambda short: also_beside_a_tap(lambda tap: measure(tap=tap)),
)
