"""Publishes an event whose handler fails, kills the worker that made it a dead letter, and redrives it after a fix."""

from __future__ import annotations

import tempfile

from benchmarks.chaos import durable, journal
from benchmarks.chaos.crew import Crew, Hand, ask_all
from benchmarks.chaos.durable import FAILED, HANDLED, KEYED, PLAIN, Fact
from benchmarks.chaos.journal import Book
from benchmarks.chaos.scenario import Figure, Scenario, under
from natsrt.embedded import EmbeddedServer

MAX_DELIVER = 3
_SETTINGS = {
    "durable": [durable.TOPIC],
    "ack_wait": 2.0,
    "max_deliver": MAX_DELIVER,
    "retry_delay": 0.5,
    "heartbeat_interval": 0.5,
    "heartbeat_ttl": 4.0,
}
_BAD = "bad"
"""The source of the poison."""
_AFTER = 5
"""Events of the same source that are published after it."""
_GIVE_UP = 60.0


async def measure(agent_type: str, *, kill: bool, others: int = 20) -> list[Figure]:
    """Publish poison between other events, and redrive its dead letter when handlers are mended.

    Args:
        agent_type: `PLAIN` or `KEYED`.
        kill: Whether the worker is killed that has stored the dead letter, before it terminates the event.
        others: Number of other sources, with one event each, which are published after the poison.
    """
    facts = [Fact(_BAD, 0), Fact(_BAD, 1, True), *(Fact(_BAD, number) for number in range(2, 2 + _AFTER))]
    facts += [Fact(f"s{number}", 0) for number in range(others)]
    poison = facts[1]
    with tempfile.TemporaryDirectory(prefix="natsrt-durable-") as directory:
        async with EmbeddedServer() as server, Crew(durable.__name__) as crew:
            publisher = await crew.start("caller", server.url, durable=[durable.TOPIC])
            workers = [await _worker(crew, server, agent_type, directory)]
            if kill:
                await workers[0].ask("die_at_dead_letter")
            await publisher.ask("publish_these", facts=[[fact.source, fact.number, fact.poison] for fact in facts])
            if kill:
                await workers.pop().gone(_GIVE_UP)
                workers.append(await _worker(crew, server, agent_type, directory))
            settled = await publisher.ask("settled", agent_type=agent_type, seconds=_GIVE_UP)
            letters = await publisher.ask("letters")
            before = journal.read(directory)
            await ask_all(workers, "mend")
            await publisher.ask("redrive")
            redriven = await publisher.ask("settled", agent_type=agent_type, seconds=_GIVE_UP)
            left = await publisher.ask("letters")
        after = journal.read(directory)
    handled = [fact.name for fact in facts if fact is not poison and fact.name in before.get(HANDLED, {})]
    failed = before[FAILED][poison.name]
    most = MAX_DELIVER * (2 if kill and agent_type == KEYED else 1)  # another feeder counts from 1 again
    good = [name for name in handled if not name.startswith(_BAD)]
    told = [letter for letter in letters if "is poison" in letter["error"] and "in work" in (letter["traceback"] or "")]
    figures = [
        Figure(name="events beside the poison", value=len(facts) - 1),
        Figure(name="of these handled", value=len(handled), at_least=len(facts) - 1),
        Figure(name="attempts at the poison", value=len(failed), at_least=MAX_DELIVER, at_most=most),
        Figure(name="dead letters", value=len(letters), at_least=1, at_most=1),
        Figure(name="with the error and its traceback", value=len(told), at_least=1, at_most=1),
        Figure(name="everything was settled", value=settled is not None, at_least=1),
        Figure(name="redriven and handled", value=len(after[HANDLED].get(poison.name, ())), at_least=1, at_most=1),
        Figure(name="the redriven one was settled", value=redriven is not None, at_least=1),
        Figure(name="dead letters left", value=len(left), at_most=0),
    ]
    if not kill:
        last = max(written.moment for written in failed)
        passed = sum(before[HANDLED][name][0].moment < last for name in good)
        waited = sum(_moment(before, number) > last for number in range(2, 2 + _AFTER))
        wanted = _AFTER if agent_type == KEYED else 0
        figures += [
            Figure(name="events of other sources that passed it", value=passed, at_least=len(good)),
            Figure(name="later events of its source that waited", value=waited, at_least=wanted, at_most=wanted),
        ]
    return figures


async def _worker(crew: Crew, server: EmbeddedServer, agent_type: str, directory: str) -> Hand:
    return await crew.start("worker", server.url, hosts=agent_type, journal=directory, **_SETTINGS)


def _moment(book: Book, number: int) -> float:
    """When the event of the poison's source with this number was handled."""
    return book[HANDLED][Fact(_BAD, number).name][0].moment


async def _all(short: bool) -> list[Figure]:
    figures = []
    for agent_type in (PLAIN, KEYED):
        for kill in (False, True):
            heading = f"{agent_type}{', the worker killed before it terminates' if kill else ''}"
            figures += under(heading, await measure(agent_type, kill=kill))
    return figures


SCENARIO = Scenario(title="An event whose handler fails becomes one dead letter, and is redriven", measure=_all)
