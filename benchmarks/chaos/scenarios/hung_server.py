"""Freezes a server of a cluster, with open connections, while runtimes have megabytes to send to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.crew import Crew, Hand, ask_all, ledgers_of
from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.scenario import Figure, Scenario, slowest, under
from natsrt.jetstream.registry.registry import BUCKET

MOVED_WITHIN = 10.0
"""Seconds after the freeze within which the runtimes of the frozen server use another server."""
_GIVE_UP = 60.0
_FLOOD_BYTES = 32_000_000
_STUCK, _ELSEWHERE = "stuck", "elsewhere"


async def measure(*, leading: bool = False, settle: float = 2.0) -> list[Figure]:
    """Freeze a server to which a worker and a caller are connected. Another worker and caller use another server.

    Args:
        leading: Whether the frozen server leads the registry's stream, so that the others must first elect a leader.
        settle: Seconds of load before the server is frozen, and after it is resumed.
    """
    async with Cluster() as cluster, Crew() as crew:
        first = await crew.start("worker", cluster.urls[0], registry_replicas=3)
        leader = await cluster.leader_of(f"KV_{crew.namespace}_{BUCKET}")
        if leader is None:
            raise RuntimeError("nobody leads the registry's stream")
        following = [number for number in range(len(cluster.urls)) if number != leader]
        hung, healthy = (leader, following[0]) if leading else (following[0], leader)
        await first.stop()
        stuck = [await crew.start(role, cluster.urls[hung]) for role in ("worker", "caller")]
        worker, caller = [await crew.start(role, cluster.urls[healthy]) for role in ("worker", "caller")]
        await stuck[0].ask("host", agent_type=_STUCK)
        await worker.ask("host", agent_type=_ELSEWHERE)
        callers = [caller, stuck[1]]
        for agent_type in (_STUCK, _ELSEWHERE):
            await ask_all(callers, "call", recipients=[f"{agent_type}/k"], concurrency=4)
        await asyncio.sleep(settle)
        figures = await _hang(cluster, hung, stuck, caller)
        await asyncio.sleep(settle)
        ledgers = await ledgers_of(callers)
    undisturbed = ledgers[0].where(lambda entry: entry.recipient.startswith(_ELSEWHERE))
    return [
        *figures,
        *undisturbed.figures("between others"),
        *Ledger.together(ledgers).figures("all calls"),
    ]


async def _hang(cluster: Cluster, hung: int, stuck: Sequence[Hand], caller: Hand) -> list[Figure]:
    """Freeze the server, measure how long it takes until everything works without it, and resume it.

    Args:
        cluster: The servers.
        hung: Number of the server to freeze.
        stuck: The worker and the caller that are connected to it.
        caller: The caller that is connected to another server.
    """
    began = time.monotonic()
    cluster.freeze(hung)
    taken = await ask_all(stuck, "flood", size=_FLOOD_BYTES)
    moved = await ask_all(stuck, "connected", reconnects=0, seconds=_GIVE_UP)
    since = time.monotonic()
    answers = [
        await stuck[1].ask("answered", recipient=f"{_ELSEWHERE}/k", sent_after=since, seconds=_GIVE_UP),
        await caller.ask("answered", recipient=f"{_STUCK}/k", sent_after=since, seconds=_GIVE_UP),
    ]
    registered = await ask_all(stuck, "back", reconnects=0, seconds=_GIVE_UP)
    cluster.resume(hung)
    await cluster.until_healthy()
    return [
        Figure(name="bytes that a runtime there had sent and it had not taken", value=min(taken)),
        *(
            Figure(name=f"until {what}", value=slowest(moments, began), unit="s", at_most=bound)
            for what, moments, bound in (
                ("its runtimes are connected to another server", moved, MOVED_WITHIN),
                ("their calls, and calls to them, are answered", answers, MOVED_WITHIN),
                ("they are in step with the registry", registered, None),
            )
        ),
    ]


async def _both(short: bool) -> list[Figure]:
    settle = 0.5 if short else 2.0
    return [
        *under("a follower", await measure(settle=settle)),
        *under("the leader", await measure(leading=True, settle=settle)),
    ]


SCENARIO = Scenario(title="A server of a cluster hangs while megabytes for it are unsent", measure=_both)
