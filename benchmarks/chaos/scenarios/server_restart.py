"""Restarts a single server under load, and kills it and starts it again after a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.chaos.crew import Crew, Hand, ask_all, ledgers_of
from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.scenario import Figure, Scenario, slowest, under
from natsrt.embedded import EmbeddedServer

BACK_WITHIN = 5.0
"""Seconds after the server's return within which everything works again."""
_GIVE_UP = 30.0
_SHARED = "clerk"
_TOPIC = "notes"


@dataclass(frozen=True, kw_only=True)
class Outage:
    """One interruption. ``seconds`` is the time from the end of the server to its restart."""

    name: str
    kill: bool
    seconds: float


RESTARTED = Outage(name="restarted", kill=False, seconds=0.0)
AWAY = Outage(name="killed, 8 s away", kill=True, seconds=8.0)


async def measure(
    *, outages: Sequence[Outage] = (RESTARTED, AWAY), workers: int = 3, callers: int = 2, settle: float = 2.0
) -> list[Figure]:
    """Cause the outages one after the other.

    Args:
        outages: The interruptions.
        workers: Number of worker processes.
        callers: Number of caller processes.
        settle: Seconds of load before and after each outage.
    """
    figures: list[Figure] = []
    async with EmbeddedServer() as server, Crew() as crew:
        working = await crew.start_all("worker", [server.url] * workers)
        calling = await crew.start_all("caller", [server.url] * callers)
        own = [f"{_SHARED}{number}" for number in range(workers)]
        for worker, agent_type in zip(working, own, strict=True):
            await worker.ask("host", agent_type=_SHARED)
            await worker.ask("host", agent_type=agent_type, topic=_TOPIC)
        for number, outage in enumerate(outages):
            await ask_all(calling, "call", recipients=[f"{agent_type}/k" for agent_type in (_SHARED, *own)])
            await calling[0].ask("publish", topic=_TOPIC)
            await asyncio.sleep(settle)
            found = await _interrupt(server, outage, working, calling)
            found += await _nobody_is_blind(f"late{number}", own[-1], working, calling)
            await asyncio.sleep(settle)
            ledger = Ledger.together(await ledgers_of(calling))
            figures += [*under(outage.name, found), *ledger.figures(outage.name)]
    return figures


async def _interrupt(
    server: EmbeddedServer, outage: Outage, working: Sequence[Hand], calling: Sequence[Hand]
) -> list[Figure]:
    everybody = [*working, *calling]
    before = [health["reconnects"] for health in await ask_all(everybody, "health")]
    await server.restart(kill=outage.kill, downtime=outage.seconds)
    returned = time.monotonic()
    ready = await asyncio.gather(
        *(
            hand.ask("back", reconnects=reconnects, seconds=_GIVE_UP)
            for hand, reconnects in zip(everybody, before, strict=True)
        )
    )
    answered = await ask_all(calling, "answered", sent_after=returned, seconds=_GIVE_UP)
    heard = await ask_all(working, "hears", topic=_TOPIC, published_after=returned, seconds=_GIVE_UP)
    return [
        Figure(name=what, value=slowest(moments, returned), unit="s", at_most=BACK_WITHIN)
        for what, moments in (
            ("until every runtime is connected and registered", ready),
            ("until every caller is answered", answered),
            ("until every subscriber hears events", heard),
        )
    ]


async def _nobody_is_blind(
    late: str, subscriber: str, working: Sequence[Hand], calling: Sequence[Hand]
) -> list[Figure]:
    """Check that new declarations reach every process: a new agent type, and a subscription added by another process.

    Args:
        late: The new agent type, and the topic type of the new subscription.
        subscriber: The agent type that only the last worker hosts.
        working: The workers.
        calling: The callers.
    """
    registered = time.monotonic()
    await working[0].ask("host", agent_type=late)
    seen = await ask_all([*working, *calling], "sees", agent_type=late, seconds=_GIVE_UP)
    subscribed = time.monotonic()
    await calling[0].ask("subscribe", topic=late, agent_type=subscriber)
    await working[0].ask("note", topic=late)
    heard = await working[-1].ask("hears", topic=late, published_after=subscribed, seconds=_GIVE_UP)
    return [
        Figure(
            name="until a type registered afterwards is in every view",
            value=slowest(seen, registered),
            unit="s",
            at_most=BACK_WITHIN,
        ),
        Figure(
            name="until an event reaches a subscription added afterwards",
            value=slowest([heard], subscribed),
            unit="s",
            at_most=BACK_WITHIN,
        ),
    ]


SCENARIO = Scenario(
    title="A server is restarted, and killed and away for 8 s, under load",
    measure=lambda short: measure(workers=2 if short else 3, callers=1 if short else 2, settle=0.5 if short else 2.0),
)
