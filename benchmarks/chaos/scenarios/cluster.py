"""Kills the server that leads a bucket under load, in a cluster of three servers with three replicas of each bucket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.crew import Crew, Hand, ask_all, ledgers_of
from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.scenario import Figure, Scenario, slowest, under
from natsrt.jetstream.agent_bucket import AGENTS_BUCKET
from natsrt.jetstream.registry import registry

_ANSWER_WITHIN = 5.0
"""Maximum seconds without a reply for a caller, if neither its server nor the agent's server was killed."""
_GIVE_UP = 60.0
_PLAIN, _KEYED, _STATEFUL = "plain", "keyed", "stateful"
_KEYS = 10


async def measure(*, led: str = registry.BUCKET, settle: float = 3.0) -> list[Figure]:
    """Kill the leader of a bucket. A worker and a caller are connected to each server.

    Args:
        led: The bucket whose leader is killed.
        settle: Seconds of load before the kill, and after everything works again.
    """
    async with Cluster() as cluster, Crew() as crew:
        settings = {"registry_replicas": 3, "keyed": f"{_KEYED},{_STATEFUL}"}
        working = await crew.start_all("worker", cluster.urls, **settings)
        calling = await crew.start_all("caller", cluster.urls, **settings)
        for number, worker in enumerate(working):
            await worker.ask("host", agent_type=f"{_PLAIN}{number}")
            await worker.ask("host", agent_type=_KEYED)
            await worker.ask("host", agent_type=_STATEFUL, agent="Bookkeeper")
        plain = [f"{_PLAIN}{number}/k" for number in range(len(working))]
        for recipient in [*plain, *(f"{kind}/{key}" for kind in (_KEYED, _STATEFUL) for key in range(_KEYS))]:
            await ask_all(calling, "call", recipients=[recipient], concurrency=1)
        await asyncio.sleep(settle)
        victim = await cluster.leader_of(f"KV_{crew.namespace}_{led}")
        if victim is None:
            raise RuntimeError(f"nobody leads {led}")
        at = {health["worker_id"]: cluster.number_of(health["server"]) for health in await ask_all(working, "health")}
        figures = await _kill(cluster, victim, [*working, *calling])
        await asyncio.sleep(settle)
        ledgers = await ledgers_of(calling)
    surviving = [ledger for number, ledger in enumerate(ledgers) if number != victim]
    pairs = [pair for ledger in surviving for pair in _by_recipient(ledger) if at[pair.entries[0].reply] != victim]
    return [
        *figures,
        *(figure for kind in (_PLAIN, _KEYED, _STATEFUL) for figure in _between_survivors(kind, pairs)),
        *Ledger.together(ledgers).figures("all calls"),
    ]


async def _kill(cluster: Cluster, victim: int, everybody: Sequence[Hand]) -> list[Figure]:
    """Kill the server. Measures how long it takes until everything works without it, and with it again."""
    at = [cluster.number_of(health["server"]) for health in await ask_all(everybody, "health")]
    moving = [hand for hand, number in zip(everybody, at, strict=True) if number == victim]
    survivor = next(hand for hand in everybody if hand not in moving)
    killed = time.monotonic()
    await cluster.kill(victim)

    async def move() -> tuple[list[float | None], list[float | None]]:
        moved = await ask_all(moving, "connected", reconnects=0, seconds=_GIVE_UP)
        return moved, await ask_all(moving, "back", reconnects=0, seconds=_GIVE_UP)

    (moved, ready), registered = await asyncio.gather(
        move(), survivor.ask("host_at_last", agent_type="late", seconds=_GIVE_UP)
    )
    seen = await ask_all(everybody, "sees", agent_type="late", seconds=_GIVE_UP)
    returned = time.monotonic()
    await cluster.start(victim)
    await cluster.until_healthy()
    return [
        Figure(name="until every runtime of the killed server is at another", value=slowest(moved, killed), unit="s"),
        Figure(name="until every one of them is registered there", value=slowest(ready, killed), unit="s"),
        Figure(name="until another runtime registers a new type", value=slowest([registered], killed), unit="s"),
        Figure(name="until every runtime sees it", value=slowest(seen, killed), unit="s", at_most=_GIVE_UP),
        Figure(name="until the killed server is healthy again", value=time.monotonic() - returned, unit="s"),
    ]


def _by_recipient(ledger: Ledger) -> list[Ledger]:
    """Return a ledger for each agent, beginning with the agent's first reply."""
    ledgers: dict[str, Ledger] = {}
    for entry in ledger.entries:
        if entry.acknowledged or entry.recipient in ledgers:
            ledgers.setdefault(entry.recipient, Ledger()).entries.append(entry)
    return list(ledgers.values())


def _between_survivors(kind: str, pairs: Sequence[Ledger]) -> list[Figure]:
    """Return the figures of calls between callers and agents whose servers were not killed.

    Agents that store their state in every call must wait for the next leader; the others need not.

    Args:
        kind: The kind of agent.
        pairs: A ledger for each pair of caller and agent.
    """
    of_kind = [pair for pair in pairs if pair.entries[0].recipient.startswith(kind)]
    together = Ledger.together(of_kind)
    gap = max((pair.longest_gap for pair in of_kind), default=None)
    return under(
        f"{kind}, between survivors",
        [
            Figure(
                name="longest time that one caller waited for one agent",
                value=gap,
                unit="s",
                at_most=None if kind == _STATEFUL else _ANSWER_WITHIN,
            ),
            Figure(name="calls acknowledged", value=together.acknowledged),
            Figure(name="calls that failed, by error", value=together.errors),
        ],
    )


async def _all(short: bool) -> list[Figure]:
    settle = 1.0 if short else 3.0
    return [
        figure
        for led in (registry.BUCKET, AGENTS_BUCKET)
        for figure in under(led, await measure(led=led, settle=settle))
    ]


SCENARIO = Scenario(title="The leader of a bucket is killed in a cluster of three, under load", measure=_all)
