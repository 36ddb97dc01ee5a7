"""What an idle runtime hears from the registry, among few others and among many."""

from __future__ import annotations

import asyncio
import statistics
import time

import natsrt
from benchmarks.chaos.crew import Crew
from benchmarks.chaos.roles import Clerk, Worker, until
from benchmarks.chaos.scenario import Figure, Scenario
from benchmarks.roles import Role
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer

_SETTLED_WITHIN = 60.0
_TOLERANCE = 1.2
"""How much more a runtime among many may hear: a beat of its heart more or less falls into the time."""


class Idlers(Worker):
    """A process with many runtimes, each of which hosts a type that nobody calls."""

    async def start(self) -> None:
        self._runtimes: list[NatsAgentRuntime] = []

    async def stop(self) -> None:
        await asyncio.gather(*(runtime.close() for runtime in self._runtimes))

    async def open(self, count: int) -> None:
        """Start ``count`` runtimes, and return when each knows all of them."""
        for number in range(count):
            runtime = NatsAgentRuntime(self.place.address, namespace=self.place.namespace, **dict(self.setup.options))
            await natsrt.register(runtime, Clerk, f"idle{number}", Clerk)
            await runtime.start()
            self._runtimes.append(runtime)
        if await until(lambda: all(r.health().workers == count for r in self._runtimes), _SETTLED_WITHIN) is None:
            raise RuntimeError("the runtimes do not know each other")

    async def heard(self, seconds: float) -> list[float]:
        """Messages that each runtime gets in a minute, whatever they are for, measured for some seconds."""
        clients = [runtime.running.connection.client for runtime in self._runtimes]
        before, began = [client.stats["in_msgs"] for client in clients], time.monotonic()
        await asyncio.sleep(seconds)
        minutes = (time.monotonic() - began) / 60
        return [(client.stats["in_msgs"] - count) / minutes for client, count in zip(clients, before, strict=True)]


async def measure(*, few: int = 10, many: int = 100, seconds: float = 60.0, **settings: float) -> list[Figure]:
    """Count for so many seconds, both at the same time. ``settings``: of the runtimes."""
    async with EmbeddedServer() as server, Crew(__name__) as fewer, Crew(__name__) as more:
        crews = {
            few: await fewer.start("idlers", server.url, **settings),
            many: await more.start("idlers", server.url, **settings),
        }
        for count, hand in crews.items():
            await hand.ask("open", count=count)
        heard = await asyncio.gather(*(hand.ask("heard", seconds=seconds) for hand in crews.values()))
    figures = []
    for count, rates in zip(crews, heard, strict=True):
        bound = statistics.mean(heard[0]) * _TOLERANCE if count == many else None
        figures += [
            Figure(
                name=f"messages to each of {count} idle runtimes, the mean",
                value=statistics.mean(rates),
                unit="per minute",
                at_most=bound,
            ),
            Figure(name=f"messages to each of {count} idle runtimes, the most", value=max(rates), unit="per minute"),
        ]
    return figures


ROLES: dict[str, type[Role]] = {"idlers": Idlers}
SCENARIO = Scenario(
    title="Idle runtimes: what they hear, 10 of them and 100",
    measure=lambda short: measure(many=30, seconds=10.0) if short else measure(),
)
