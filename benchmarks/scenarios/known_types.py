"""The start of a runtime whose registry knows many agent types that no worker hosts any more."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Iterator

from benchmarks.harness import LESS, Goal, Measure, Sample, Scenario, Variant
from benchmarks.peers import Peer
from benchmarks.peers.natsrt_peer import NatsrtCaller
from benchmarks.roles import Role
from benchmarks.teams import Team
from natsrt import NatsAgentRuntime
from natsrt.jetstream.registry.entries import KnownEntry, encode_entry
from natsrt.jetstream.registry.registry import BUCKET, KNOWN_TTL

MANY = 150_000
"""What 25,000 of AgentChat's teams leave in a day and a half if their workers are killed."""
_AT_A_TIME = 256


class Newcomer(NatsrtCaller):
    """Starts further runtimes."""

    async def start(self) -> None:
        """Do nothing: the command starts the runtimes."""

    async def stop(self) -> None:
        """Do nothing."""

    async def start_beside(self, known: int) -> float:
        """Start a runtime after ``known`` agent types were stored. Returns the seconds."""
        await self._prepare(known)
        began = time.perf_counter()
        async with self.make():
            return time.perf_counter() - began

    async def memory_beside(self, known: int) -> int:
        """Start a runtime after ``known`` agent types were stored. Returns the size of its Python objects in bytes."""
        await self._prepare(known)
        tracemalloc.start()
        async with self.make():
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

    async def _prepare(self, known: int) -> None:
        async with self.make() as runtime:
            await self._store(runtime, known)

    async def _store(self, runtime: NatsAgentRuntime, known: int) -> None:
        """Store entries of agent types as a worker does that hosted them and was killed."""
        connection = runtime.running.connection
        prefix = f"$KV.{runtime.running.network.subjects.bucket(BUCKET)}."
        js = connection.jetstream
        for start in range(0, known, _AT_A_TIME):
            entries = [
                KnownEntry(f"RoundRobinGroupChatManager_{number:08x}", ("GroupChatMessage", "GroupChatStart"))
                for number in range(start, min(start + _AT_A_TIME, known))
            ]
            writes = (js.publish(prefix + e.key, encode_entry(e), msg_ttl=KNOWN_TTL, timeout=30) for e in entries)
            await asyncio.gather(*writes)


ROLES: dict[str, type[Role]] = {"caller": Newcomer}
NEWCOMER = Peer(name="natsrt", title="natsrt", module=__name__, has_workers=False)


def scenarios(short: bool) -> Iterator[Scenario]:
    sizes = (0, 10) if short else (0, 1_000, MANY)
    most = _row(sizes[-1])
    yield Scenario(
        name="known-types-start",
        title="Start of a runtime whose registry knows more and more agent types without a worker",
        unit="ms",
        better=LESS,
        fresh=True,
        rounds=3,
        variants=[Variant(name=_row(size), peer=NEWCOMER, measure=_start(size)) for size in sizes],
        goals=[Goal(text=f"start beside {MANY:,} known types, ms", of=most, at_most=200)],
    )
    yield Scenario(
        name="known-types-memory",
        title="Python objects of a runtime whose registry knows more and more agent types without a worker",
        unit="MB",
        better=LESS,
        fresh=True,
        rounds=3,
        variants=[Variant(name=_row(size), peer=NEWCOMER, measure=_memory(size)) for size in sizes],
        goals=[Goal(text=f"memory of a runtime beside {MANY:,} known types, MB", of=most, at_most=5)],
    )


def _row(known: int) -> str:
    return f"natsrt, {known:,}"


def _start(known: int) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        return Sample(value=await team.caller.ask("start_beside", known=known) * 1e3)

    return measure


def _memory(known: int) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        return Sample(value=await team.caller.ask("memory_beside", known=known) / 1e6)

    return measure
