"""Submits tasks, and kills who submitted them, workers and the server, before another process reads the results."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from benchmarks.chaos import journal, tasks
from benchmarks.chaos.durable import KEYED, PLAIN
from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.scenario import Figure, Scenario, under
from natsrt.jetstream.streams import DEAD

SETTINGS: dict[str, Any] = {
    "ack_wait": 4.0,
    "max_deliver": 30,
    "heartbeat_interval": 0.5,
    "heartbeat_ttl": 4.0,
    "retry_delay": 0.1,
}
"""A worker that is killed costs each task that it handles an attempt, so there are more of them than usual."""
_GIVE_UP = 240.0
_KILLED_FOR = 30.0
"""Seconds after which no more workers are killed: a keyed type on a busy machine may need longer for a new feeder."""
_SETTLED_WITHIN = 60.0
"""Seconds within which every task that has a result is removed: its worker may have been killed before it did that."""
_KEYS = 20
_EVERY = {PLAIN: 0.5, KEYED: 4.0}
"""Seconds between two workers that are killed. A keyed type needs a new feeder first."""
_LATER = 3600.0
"""Seconds after which the tasks are due that are cancelled before."""


async def measure(
    agent_type: str, *, count: int = 1000, every: float = 1.0, work: float = 0.2, cancelled: int = 100
) -> list[Figure]:
    """Submit ``count`` tasks, and ``cancelled`` ones that are cancelled.

    Args:
        agent_type: `PLAIN` or `KEYED`.
        count: Number of tasks.
        every: Seconds between two workers that are killed.
        work: Seconds for which each handler runs.
        cancelled: Number of tasks that are cancelled before they are due, and of others while they are queued.
    """
    with tempfile.TemporaryDirectory(prefix="natsrt-tasks-") as directory:
        fleet = Fleet(workers=3, callers=2, module=tasks.__name__, hosts=agent_type, journal=directory, **SETTINGS)
        async with fleet:
            submitter, reader = fleet.callers
            began = time.monotonic()
            async with fleet.dying(every):
                submitted = await submitter.ask(
                    "submit", agent_type=agent_type, first=0, count=count, keys=_KEYS, seconds=work
                )
                delayed = await submitter.ask(
                    "submit",
                    agent_type=agent_type,
                    first=count,
                    count=cancelled,
                    keys=_KEYS,
                    seconds=work,
                    due=time.time() + _LATER,
                )
                await submitter.kill()
                revoked = await reader.ask("cancel", ids=list(delayed["ids"].values()))
                await fleet.server.restart(kill=True, downtime=1.0)
                await reader.ask("results", ids=submitted["ids"], seconds=_KILLED_FOR)
            results = await reader.ask("results", ids=submitted["ids"], seconds=_GIVE_UP)
            ended = time.monotonic()
            told = await reader.ask("results", ids=delayed["ids"], seconds=_GIVE_UP)
            left = await reader.ask("left", seconds=_SETTLED_WITHIN)
            states = await reader.ask("names", keys=_KEYS) if agent_type == KEYED else None
            deaths = len(fleet.ends)
        book = journal.read(directory)
    handled = book.get(tasks.HANDLED, {})
    right = sum(name == result for name, result in results.items())
    wrong = sorted({result for name, result in results.items() if name != result})
    figures = [
        Figure(name="workers killed", value=deaths),
        Figure(name="tasks submitted", value=len(submitted["ids"]), at_least=count, at_most=count),
        Figure(name="attempts to submit that failed, by error", value=submitted["failed"]),
        Figure(name="results fetched by another process", value=right, at_least=count),
        Figure(name="other results", value="; ".join(wrong[:5]) or "none"),
        Figure(name="results of tasks that were not handled", value=len(set(results) - handled.keys()), at_most=0),
        Figure(name="handled more than once", value=sum(len(times) > 1 for times in handled.values())),
        Figure(name="tasks cancelled", value=revoked, at_least=cancelled),
        Figure(
            name="results that say so",
            value=sum(result.startswith("TaskCancelled") for result in told.values()),
            at_least=cancelled,
        ),
        Figure(
            name="cancelled, and handled",
            value=len(delayed["ids"].keys() & book.get(tasks.BEGUN, {}).keys()),
            at_most=0,
        ),
        Figure(name="dead letters", value=left[DEAD], at_most=0),
        Figure(name="tasks left in the stream", value=left[tasks.TASKS], at_most=0),
        Figure(name="until all results were fetched", value=ended - began, unit="s"),
    ]
    if states is not None:
        names = [name for of_key in states for name in of_key]
        figures += [
            Figure(name="not in the states", value=len(submitted["ids"].keys() - set(names)), at_most=0),
            Figure(name="in the states twice", value=len(names) - len(set(names)), at_most=0),
        ]
    return figures


async def due_at_once(agent_type: str, count: int = 10_000, wait: float = 10.0) -> list[Figure]:
    """Submit ``count`` tasks that are due at the same moment, ``wait`` seconds from now or later."""
    with tempfile.TemporaryDirectory(prefix="natsrt-tasks-") as directory:
        fleet = Fleet(workers=2, callers=1, module=tasks.__name__, hosts=agent_type, journal=directory, **SETTINGS)
        async with fleet:
            (submitter,) = fleet.callers
            due = time.time() + wait
            submitted = await submitter.ask(
                "submit", agent_type=agent_type, first=0, count=count, keys=_KEYS, seconds=0.0, due=due
            )
            ready = time.time()
            results = await submitter.ask("results", ids=submitted["ids"], seconds=_GIVE_UP)
            ended = time.time()
        handled = journal.read(directory).get(tasks.HANDLED, {})
    return [
        Figure(name="tasks due at once", value=len(submitted["ids"]), at_least=count),
        Figure(name="submitted before they were due", value=str(ready < due)),
        Figure(name="results", value=sum(name == result for name, result in results.items()), at_least=count),
        Figure(name="handled", value=len(handled), at_least=count),
        Figure(name="handled more than once", value=sum(len(times) > 1 for times in handled.values())),
        Figure(name="from then until all results were fetched", value=ended - max(due, ready), unit="s"),
    ]


async def _both(short: bool) -> list[Figure]:
    figures = []
    for agent_type in (PLAIN, KEYED):
        figures += under(agent_type, await measure(agent_type, count=300 if short else 1000, every=_EVERY[agent_type]))
    return [*figures, *await due_at_once(PLAIN, 1000 if short else 10_000)]


SCENARIO = Scenario(
    title="Tasks whose submitter, workers and server are killed, and whose results another process fetches",
    measure=_both,
)
