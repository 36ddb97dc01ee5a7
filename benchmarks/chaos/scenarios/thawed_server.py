"""Freezes the server of a caller with calls on their way, and lets it go on when they were sent again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler

import natsrt
from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.scenario import Figure, Scenario
from natsrt import NatsAgentRuntime

STALLS = [1.0 + step / 2 for step in range(17)]
"""Seconds for which the server stands still."""
_CALLS = 12
"""Calls of each kind that are on their way when it does."""
_THAWED_FOR = 1.5
"""Seconds after the end of a stall within which everything that waited in the server has arrived."""
_GIVE_UP = 60.0

_handled: Counter[int] = Counter()


class Plain(RoutedAgent):
    """Counts how often each call was handled."""

    def __init__(self) -> None:
        super().__init__("counts calls")

    @message_handler
    async def take(self, message: int, ctx: MessageContext) -> int:
        _handled[message] += 1
        return message


@natsrt.keyed
class Keyed(RoutedAgent):
    """Adds up what it is sent."""

    def __init__(self) -> None:
        super().__init__("adds up")
        self.total = 0

    @message_handler
    async def add(self, message: int, ctx: MessageContext) -> int:
        self.total += message
        return self.total

    async def save_state(self) -> dict[str, Any]:
        return {"total": self.total}

    async def load_state(self, state: Any) -> None:
        self.total = state["total"]


async def measure(stalls: Sequence[float] = STALLS) -> list[Figure]:
    """Freeze the caller's server once for each of ``stalls``, in seconds."""
    _handled.clear()
    async with Cluster() as cluster:
        workers = [NatsAgentRuntime(cluster.urls[number], registry_replicas=3) for number in (1, 2)]
        caller = NatsAgentRuntime(cluster.urls, name="caller")
        async with workers[0], workers[1], caller:
            for worker in workers:
                await natsrt.register(worker, Plain, "plain", Plain)
                await natsrt.register(worker, Keyed, "keyed", Keyed)
            seen: list[int] = []
            errors: Counter[str] = Counter()
            for stall in stalls:
                await _freeze_once(cluster, caller, stall, seen, errors)
            totals = [await caller.send_message(0, AgentId("keyed", f"k{number}")) for number in range(_CALLS)]
    return [
        Figure(name="stalls of 1 to 9 s with calls on their way", value=len(stalls), at_least=len(stalls)),
        Figure(name="plain calls that were handled", value=len(_handled)),
        Figure(name="handled twice", value=sum(times > 1 for times in _handled.values()), at_least=0, at_most=0),
        Figure(name="answered, and not handled", value=sum(call not in _handled for call in seen), at_most=0),
        Figure(name="keyed agents that counted too much", value=sum(t > len(stalls) for t in totals), at_most=0),
        Figure(name="keyed calls that were lost and not counted", value=_CALLS * len(stalls) - sum(totals)),
        Figure(name="errors", value=dict(errors)),
    ]


async def _freeze_once(
    cluster: Cluster, caller: NatsAgentRuntime, stall: float, seen: list[int], errors: Counter[str]
) -> None:
    warm = [caller.send_message(0, AgentId("keyed", f"k{number}")) for number in range(_CALLS)]
    await asyncio.gather(*warm)
    url = caller.health().server
    number = next(n for n, server in enumerate(cluster.servers) if url is not None and server.url.split(":")[-1] in url)
    first = len(seen) + sum(errors.values()) + 1000 * int(stall * 2)
    cluster.freeze(number)
    plain = [caller.send_message(first + n, AgentId("plain", f"k{n}")) for n in range(_CALLS)]
    keyed = [caller.send_message(1, AgentId("keyed", f"k{n}")) for n in range(_CALLS)]
    calls = asyncio.gather(*plain, *keyed, return_exceptions=True)
    await asyncio.sleep(stall)
    cluster.resume(number)
    async with asyncio.timeout(_GIVE_UP):
        results = await calls
    await asyncio.sleep(_THAWED_FOR)
    await cluster.until_healthy()
    for result in results[:_CALLS]:
        if isinstance(result, int):
            seen.append(result)
    errors.update(type(result).__name__ for result in results if isinstance(result, BaseException))


async def _all(short: bool) -> list[Figure]:
    return await measure([1.5, 3.0, 5.0, 7.5] if short else STALLS)


SCENARIO = Scenario(title="The caller's server of a cluster stands still with calls on their way", measure=_all)
