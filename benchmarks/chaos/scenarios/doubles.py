"""Several processes make the first calls to many agents at the same moment, also while workers are killed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.chaos.counters import agent_of
from benchmarks.chaos.crew import ask_all
from benchmarks.chaos.fleet import Fleet, also_beside_a_tap
from benchmarks.chaos.scenario import Figure, Scenario, under

_AHEAD = 0.3
"""Seconds from the command to the moment of the calls, so that all callers are ready."""


async def measure(
    *, keys: int = 200, workers: int = 3, callers: int = 4, deaths: int = 6, every: float = 1.0, tap: bool = False
) -> list[Figure]:
    """Make first calls to agents, then to as many new agents while workers are killed.

    Args:
        keys: Number of agents in each part.
        workers: Number of worker processes.
        callers: Number of caller processes.
        deaths: Number of workers that are killed.
        every: Seconds between two kills.
        tap: Whether another client subscribes to every subject.
    """
    async with Fleet(workers=workers, callers=callers, tap=tap) as fleet:
        in_quiet = await _in_quiet(fleet, [f"quiet{number}" for number in range(keys)])
        dying = await _while_workers_die(fleet, [f"dying{number}" for number in range(keys)], deaths, every)
        return [*under("in quiet", in_quiet), *under("while workers die", dying)]


async def _in_quiet(fleet: Fleet, keys: Sequence[str]) -> list[Figure]:
    await ask_all(fleet.callers, "first_calls", keys=list(keys), moment=time.monotonic() + _AHEAD)
    instances = await ask_all(list(fleet.workers.values()), "instances")
    made = [key for one in instances for key in one["made"]]
    shares = [len(one["made"]) for one in instances]
    history = await fleet.history(keys)
    return [
        Figure(name="agents", value=len(keys)),
        Figure(name="activations", value=len(made), at_least=len(keys), at_most=len(keys)),
        Figure(name="agents that were activated twice", value=len(made) - len(set(made)), at_most=0),
        Figure(name="the most agents on one worker", value=max(shares), unit="of a third of them each"),
        Figure(
            name="first calls without a reply",
            value=len(history.ledger.entries) - history.ledger.acknowledged,
            at_most=0,
        ),
        *history.figures(),
    ]


async def _while_workers_die(fleet: Fleet, keys: Sequence[str], deaths: int, every: float) -> list[Figure]:
    async with fleet.dying(every):
        for number, caller in enumerate(fleet.callers):
            # Each caller begins with another key: every agent has several callers, but they do not call it in step.
            begin = number * len(keys) // (2 * len(fleet.callers))
            turns = [agent_of(key) for key in (*keys[begin:], *keys[:begin])]
            await caller.ask("call", recipients=turns, concurrency=8, pause=0.02)
        await fleet.deaths(deaths)
        history = await fleet.history(keys)
    return [Figure(name="workers killed", value=len(fleet.ends)), *history.figures()]


SCENARIO = Scenario(
    title="First calls of 200 keyed agents from four processes at the same moment",
    measure=lambda short: also_beside_a_tap(lambda tap: measure(deaths=4 if short else 15, tap=tap)),
)
