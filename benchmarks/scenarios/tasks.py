"""Tasks per second, from one process that submits them to another one that handles them, and back."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autogen_core import AgentId, MessageContext, RoutedAgent, rpc

from benchmarks.harness import Measure, Sample, Scenario, Variant
from benchmarks.peers import Peer
from benchmarks.roles import Role
from benchmarks.teams import Team
from natsrt import NatsAgentRuntime

SUBMITTED, PLAIN, KEYED = "only submitted", "with results", "with results, keyed agents with state"
SIZE = 200
"""Characters of the text in a message."""
_AT_ONCE = 500
"""Tasks that are under way."""
_AGENTS = 64
_GIVE_UP = 120.0
"""Time limit of one turn in seconds."""


@dataclass
class Line:
    """A message of about `SIZE` bytes."""

    text: str


class _Returns(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("returns what it gets")

    @rpc
    async def on_line(self, message: Line, ctx: MessageContext) -> Line:
        return message

    async def save_state(self) -> Mapping[str, Any]:
        return {}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        pass


class Works(Role):
    """Hosts the agents."""

    async def start(self) -> None:
        self._runtime = NatsAgentRuntime(self.place.address, namespace=self.place.namespace)
        await self._runtime.register_factory("plain", _Returns, expected_class=_Returns)
        await self._runtime.register_factory("keyed", _Returns, expected_class=_Returns, keyed=True)
        await self._runtime.start()

    async def stop(self) -> None:
        await self._runtime.close()


class Submits(Role):
    """Submits tasks, and waits for their results."""

    async def start(self) -> None:
        self._runtime = NatsAgentRuntime(self.place.address, namespace=self.place.namespace)
        await self._runtime.start()

    async def stop(self) -> None:
        await self._runtime.close()

    async def submit(self, how: str, count: int) -> float:
        """Submit ``count`` tasks, with up to `_AT_ONCE` of them under way. Returns the seconds."""
        agent_type = "keyed" if how == KEYED else "nobody" if how == SUBMITTED else "plain"
        line, room = Line("x" * SIZE), asyncio.Semaphore(_AT_ONCE)
        agents = [AgentId(agent_type, f"k{number}") for number in range(_AGENTS)]
        ticket = await self._runtime.submit_message(line, agents[0])
        if how != SUBMITTED:
            await ticket.result(_GIVE_UP)
        gc.collect()

        async def one(number: int) -> None:
            async with room:
                ticket = await self._runtime.submit_message(line, agents[number % _AGENTS])
                if how != SUBMITTED:
                    await ticket.result()

        began = time.perf_counter()
        async with asyncio.timeout(_GIVE_UP):
            await asyncio.gather(*map(one, range(count)))
        return time.perf_counter() - began


ROLES: dict[str, type[Role]] = {"worker": Works, "caller": Submits}
TWO_PROCESSES = Peer(name="tasks", title="two processes", module=__name__)


def scenarios(short: bool) -> Iterator[Scenario]:
    yield Scenario(
        name="tasks",
        title=f"Tasks, {_AT_ONCE} at a time, for {_AGENTS} agents",
        unit="tasks/s",
        baseline=PLAIN,
        most=20_000,
        variants=[Variant(name=how, peer=TWO_PROCESSES, measure=_submitting(how)) for how in (SUBMITTED, PLAIN, KEYED)],
    )


def _submitting(how: str) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        seconds = await team.caller.ask("submit", how=how, count=count)
        return Sample(value=count / seconds, seconds=seconds)

    return measure
