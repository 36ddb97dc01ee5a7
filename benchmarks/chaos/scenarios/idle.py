"""Counts the messages that idle runtimes receive from the registry, with few and with many runtimes."""

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
"""Allowed ratio of messages with many runtimes to those with few: the number of heartbeats in the time can vary."""


class Idlers(Worker):
    """A process with many runtimes. Each hosts an agent type that is never called."""

    async def start(self) -> None:
        self._runtimes: list[NatsAgentRuntime] = []

    async def stop(self) -> None:
        await asyncio.gather(*(runtime.close() for runtime in self._runtimes))

    async def open(self, count: int) -> None:
        """Start ``count`` runtimes, and return when each knows all of them.

        Raises:
            RuntimeError: They did not within `_SETTLED_WITHIN` seconds.
        """
        for number in range(count):
            runtime = NatsAgentRuntime(self.place.address, namespace=self.place.namespace, **dict(self.setup.options))
            await natsrt.register(runtime, Clerk, f"idle{number}", Clerk)
            await runtime.start()
            self._runtimes.append(runtime)
        if await until(lambda: all(r.health().workers == count for r in self._runtimes), _SETTLED_WITHIN) is None:
            raise RuntimeError("the runtimes do not know each other")

    async def heard(self, seconds: float) -> list[float]:
        """Return the messages of any kind that each runtime receives per minute, measured for ``seconds``."""
        clients = [runtime.running.connection.client for runtime in self._runtimes]
        before, began = [client.stats["in_msgs"] for client in clients], time.monotonic()
        await asyncio.sleep(seconds)
        minutes = (time.monotonic() - began) / 60
        return [(client.stats["in_msgs"] - count) / minutes for client, count in zip(clients, before, strict=True)]


async def measure(*, few: int = 10, many: int = 100, seconds: float = 60.0, **settings: float) -> list[Figure]:
    """Count the messages with few and with many runtimes, both at the same time.

    Args:
        few: Number of runtimes in the first group.
        many: Number of runtimes in the second group.
        seconds: Seconds for which messages are counted.
        settings: Settings of the runtimes.
    """
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
