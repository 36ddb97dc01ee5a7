"""Measures memory and activation rate of very many live keyed agents on one worker."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from autogen_core import AgentId

from benchmarks.chaos.crew import Crew
from benchmarks.chaos.roles import Bookkeeper, Clerk, Question, Worker
from benchmarks.chaos.scenario import Figure, Scenario, under
from benchmarks.roles import Role
from natsrt.embedded import EmbeddedServer

_CONCURRENCY = 64
_WARM_UP = 100
"""Number of agents that are live before measuring starts."""
_CALLED_AGAIN = 10_000
_IDLE_SECONDS = 10.0


class Holder(Worker):
    """Hosts the agents."""

    async def memory(self) -> int:
        """Return the resident memory of the process in bytes. Linux only."""
        return _pages() * os.sysconf("SC_PAGE_SIZE")

    async def live(self) -> int:
        """Return the number of live agents."""
        return sum(self.runtime.health().agents.values())

    async def idle(self, seconds: float) -> float:
        """Return the share of a processor that the process uses during ``seconds`` without calls."""
        before = time.process_time()
        await asyncio.sleep(seconds)
        return (time.process_time() - before) / seconds


class Waker(Worker):
    """Calls agents, each for the first time."""

    async def wake(self, agent_type: str, first: int, count: int) -> None:
        """Call ``count`` agents, with keys from ``first`` on, `_CONCURRENCY` at a time."""
        keys = iter(range(first, first + count))

        async def call() -> None:
            for key in keys:
                await self.runtime.send_message(Question(key), AgentId(agent_type, str(key)))

        await asyncio.gather(*(call() for _ in range(_CONCURRENCY)))


def _pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


async def measure(*, agent: str, keys: int = 100_000, callers: int = 2) -> list[Figure]:
    """Activate agents on one worker.

    Args:
        agent: Name of the agents' class.
        keys: Number of agents.
        callers: Number of processes that call the agents.
    """
    async with EmbeddedServer() as server, Crew(__name__) as crew:
        holder = await crew.start("holder", server.url, keyed=agent)
        await holder.ask("host", agent_type=agent, agent=agent)
        wakers = await crew.start_all("waker", [server.url] * callers)
        await wakers[0].ask("wake", agent_type=agent, first=0, count=_WARM_UP)
        before = await holder.ask("memory")
        began = time.monotonic()
        share = keys // callers
        await asyncio.gather(
            *(
                waker.ask("wake", agent_type=agent, first=_WARM_UP + number * share, count=share)
                for number, waker in enumerate(wakers)
            )
        )
        took = time.monotonic() - began
        after = await holder.ask("memory")
        idle = await holder.ask("idle", seconds=_IDLE_SECONDS)
        began = time.monotonic()
        await wakers[0].ask("wake", agent_type=agent, first=_WARM_UP, count=min(share, _CALLED_AGAIN))
        called = time.monotonic() - began
        live = await holder.ask("live")
    woken = share * callers
    return [
        Figure(name="live agents", value=live, at_least=woken + _WARM_UP, at_most=woken + _WARM_UP),
        Figure(name="memory of the worker for each", value=(after - before) / woken, unit="bytes"),
        Figure(name="came to life", value=woken / took, unit="agents/s"),
        Figure(name="calls to them afterwards", value=min(share, _CALLED_AGAIN) / called, unit="calls/s"),
        Figure(name="processor of the worker while nobody calls", value=idle * 100, unit="%"),
    ]


async def _all(short: bool) -> list[Figure]:
    keys = 2_000 if short else 100_000
    return [
        figure
        for heading, cls in (("without state", Clerk), ("with state", Bookkeeper))
        for figure in under(heading, await measure(agent=cls.__name__, keys=keys))
    ]


ROLES: dict[str, type[Role]] = {"holder": Holder, "waker": Waker}
SCENARIO = Scenario(title="100,000 live keyed agents on one worker", measure=_all)
