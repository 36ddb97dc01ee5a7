"""Publishes events on a durable topic while workers are killed, and the server is killed and stops."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.chaos import durable, journal
from benchmarks.chaos.durable import KEYED, PLAIN
from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.journal import Written
from benchmarks.chaos.scenario import Figure, Scenario, under
from natsrt.jetstream.streams import DEAD, EVENTS

SETTINGS: dict[str, Any] = {
    "durable": [durable.TOPIC],
    "ack_wait": 4.0,
    "max_deliver": 30,
    "heartbeat_interval": 0.5,
    "heartbeat_ttl": 4.0,
    "retry_delay": 0.1,
}
"""A worker that is killed costs each event that it has an attempt, so there are more of them than usual."""
DOWN_SECONDS = 1.0
"""For how long the server is away, each time."""
_GIVE_UP = 280.0
OUTAGES = (True, False, True)
"""Whether the server is killed, or stops in order, at equal distances in the published events."""


async def measure(
    agent_type: str,
    *,
    events: int = 20_000,
    sources: int = 50,
    workers: int = 3,
    every: float = 1.0,
    pause: float = 0.05,
    work: float = durable.WORK,
    outages: Sequence[bool] = OUTAGES,
) -> list[Figure]:
    """Publish ``events`` events of ``sources`` sources.

    Args:
        agent_type: `PLAIN` or `KEYED`.
        events: Number of events.
        sources: Number of sources. The events of one source are published one after the other.
        workers: Number of worker processes.
        every: Seconds between two workers that are killed, until all events are handled or half of `_GIVE_UP` is over.
        pause: Seconds between two events of one source.
        work: Seconds for which each event is handled.
        outages: For each outage of the server, whether it is killed. Otherwise it stops in order.
    """
    each = events // sources
    count = each * sources
    with tempfile.TemporaryDirectory(prefix="natsrt-durable-") as directory:
        fleet = Fleet(
            workers=workers,
            callers=1,
            module=durable.__name__,
            called={"durable": [durable.TOPIC]},
            hosts=agent_type,
            journal=directory,
            **SETTINGS,
        )
        async with fleet:
            (publisher,) = fleet.callers
            began = time.monotonic()
            async with fleet.dying(every):
                await publisher.ask("begin", sources=sources, each=each, pause=pause, seconds=work)
                for number, kill in enumerate(outages, 1):
                    await publisher.ask("confirmed", count=number * count // (len(outages) + 1), seconds=_GIVE_UP)
                    await fleet.server.restart(kill=kill, downtime=DOWN_SECONDS)
                published = await publisher.ask("published", seconds=_GIVE_UP)
                confirmed_at = time.monotonic()
                await publisher.ask("settled", agent_type=agent_type, seconds=_GIVE_UP / 4)
            deaths = [end.moment for end in fleet.ends]
            settled = await publisher.ask("settled", agent_type=agent_type, seconds=_GIVE_UP)
            stored = await publisher.ask("stored")
            applied = await publisher.ask("numbers", sources=sources) if agent_type == KEYED else None
        book = journal.read(directory)
    handled, again = book.get(durable.HANDLED, {}), book.get(durable.AGAIN, {})
    names = {durable.Fact(f"s{source}", number).name for source in range(sources) for number in range(each)}
    lost = len(names - handled.keys())
    figures = [
        Figure(name="workers killed", value=len(deaths)),
        Figure(name="events published", value=count),
        Figure(name="events confirmed", value=published["confirmed"], at_least=count),
        Figure(name="events stored", value=stored[EVENTS], at_least=count, at_most=count),
        Figure(name="attempts to publish that failed, by error", value=published["failed"]),
        Figure(name="slowest attempt to publish", value=published["slowest"], unit="s"),
        Figure(name="events handled", value=len(names & handled.keys())),
        Figure(name="of these, before the last worker was killed", value=_handled_before(handled, max(deaths))),
        Figure(name="handled by an attempt that was not the first", value=sum(map(len, again.values()))),
        Figure(name="handled more than once", value=sum(len(times) > 1 for times in handled.values())),
        Figure(name="dead letters", value=stored[DEAD]),
        Figure(name="confirmed, and neither handled nor a dead letter", value=max(0, lost - stored[DEAD]), at_most=0),
        Figure(name="until all were confirmed", value=confirmed_at - began, unit="s"),
        Figure(name="until all were settled", value=None if settled is None else settled - began, unit="s", at_least=0),
    ]
    if applied is not None:
        figures += _of_states(applied, each, stored[DEAD])
    return figures


def _handled_before(handled: Mapping[str, Sequence[Written]], moment: float) -> int:
    return sum(min(line.moment for line in lines) < moment for lines in handled.values())


def _of_states(applied: Sequence[Sequence[int]], each: int, dead: int) -> list[Figure]:
    """The figures of the states of keyed agents. ``each``: how many numbers each should have, beside dead letters."""
    missing = sum(len(set(range(each)) - set(numbers)) for numbers in applied)
    return [
        Figure(name="not in the state, beside dead letters", value=max(0, missing - dead), at_most=0),
        Figure(name="in the state twice", value=sum(len(n) - len(set(n)) for n in applied), at_most=0),
        Figure(name="inversions in the states", value=sum(map(inversions, applied)), at_most=0),
    ]


def inversions(numbers: Sequence[int]) -> int:
    """The number of neighbours of which the first one is the larger one."""
    return sum(one > other for one, other in zip(numbers, numbers[1:], strict=False))


async def _both(short: bool) -> list[Figure]:
    events = 2_000 if short else 20_000
    figures = []
    for agent_type in (PLAIN, KEYED):
        figures += under(agent_type, await measure(agent_type, events=events, pause=0.02 if short else 0.05))
    return figures


SCENARIO = Scenario(
    title="Events on a durable topic while a worker is killed every second, and the server twice and stopped once",
    measure=_both,
)
