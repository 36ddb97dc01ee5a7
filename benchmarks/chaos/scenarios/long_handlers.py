"""Handles events for longer than ``ack_wait``, and freezes a worker in the middle of one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from benchmarks.chaos import durable, journal
from benchmarks.chaos.crew import Crew, Hand
from benchmarks.chaos.durable import BEGUN, HANDLED, KEYED, PLAIN, Fact
from benchmarks.chaos.roles import until
from benchmarks.chaos.scenario import Figure, Scenario, under
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.streams import DEAD

ACK_WAIT = 1.5
_SETTINGS = {
    "durable": [durable.TOPIC],
    "ack_wait": ACK_WAIT,
    "heartbeat_interval": 0.5,
    "heartbeat_ttl": 4.0,
}
_SOURCE = "s0"
_GIVE_UP = 60.0


async def measure(agent_type: str, *, freeze: bool, later: int = 50) -> list[Figure]:
    """Have an event handled for three times ``ack_wait``, then ``later`` further ones of its source.

    Args:
        agent_type: `PLAIN` or `KEYED`.
        freeze: Whether the worker that handles the first event is frozen until another one has handled it.
        later: Number of further events.
    """
    long = Fact(_SOURCE, 0, seconds=3 * ACK_WAIT)
    facts = [Fact(_SOURCE, number) for number in range(1, 1 + later)]
    with tempfile.TemporaryDirectory(prefix="natsrt-durable-") as directory:
        async with EmbeddedServer() as server, Crew(durable.__name__) as crew:

            async def worker() -> Hand:
                return await crew.start("worker", server.url, hosts=agent_type, journal=directory, **_SETTINGS)

            async def written(word: str, wanted: Sequence[Fact]) -> float | None:
                names = {fact.name for fact in wanted}
                return await until(lambda: names <= journal.read(directory).get(word, {}).keys(), _GIVE_UP)

            publisher = await crew.start("caller", server.url, durable=[durable.TOPIC])
            first = await worker()
            await publisher.ask("publish_these", facts=[[long.source, long.number, False, long.seconds]])
            began = await written(BEGUN, [long])
            await worker()
            if freeze:
                first.freeze()
            await publisher.ask("publish_these", facts=[[fact.source, fact.number] for fact in facts])
            elsewhere = await written(HANDLED, [long, *facts])
            first.resume()
            settled = await publisher.ask("settled", agent_type=agent_type, seconds=_GIVE_UP)
            if freeze:  # its handler ends late, and what it acknowledges then is not its any more
                await until(lambda: len(journal.read(directory)[HANDLED][long.name]) > 1, 2 * long.seconds)
            last = Fact(_SOURCE, 1 + later)
            await publisher.ask("publish_these", facts=[[last.source, last.number]])
            await written(HANDLED, [last])
            settled = settled and await publisher.ask("settled", agent_type=agent_type, seconds=_GIVE_UP)
            dead = (await publisher.ask("stored"))[DEAD]
            applied = (await publisher.ask("numbers", sources=1))[0] if agent_type == KEYED else None
        book = journal.read(directory)
    begun, handled = book[BEGUN][long.name], book.get(HANDLED, {})
    took = None if elsewhere is None or began is None else elsewhere - began
    most = 2 if freeze else 1
    figures = [
        Figure(name="how often the long event was begun", value=len(begun), at_least=most, at_most=most),
        Figure(name="by so many workers", value=len({line.pid for line in begun}), at_least=most, at_most=most),
        Figure(name="until all were handled", value=took, unit="s", at_least=0),
        Figure(
            name="later events that were not handled", value=sum(fact.name not in handled for fact in facts), at_most=0
        ),
        Figure(name="everything was settled", value=settled is not None, at_least=1),
        Figure(name="dead letters", value=dead, at_most=0),
    ]
    if applied is not None:
        wrong = applied != list(range(later + 2))
        figures.append(Figure(name="states that are not each event once, in order", value=int(wrong), at_most=0))
    return figures


async def _all(short: bool) -> list[Figure]:
    figures = []
    for agent_type in (PLAIN, KEYED):
        for freeze in (False, True):
            heading = f"{agent_type}, {'frozen' if freeze else 'three times ack_wait'}"
            figures += under(heading, await measure(agent_type, freeze=freeze))
    return figures


SCENARIO = Scenario(title="Events are handled for three times ack_wait, and by a worker that is frozen", measure=_all)
