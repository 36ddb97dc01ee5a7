"""Keyed agents that one worker cannot make or load: another worker serves them, and callers see no error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, message_handler

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.keyed.unmade import UnmadeAgents
from tests.support.processes import eventually


@dataclass
class Add:
    amount: int


class Sum(RoutedAgent):
    """Adds, on the worker with this name."""

    def __init__(self, site: Site) -> None:
        super().__init__("adds")
        site.made += 1
        self.site, self.value = site, 0
        if site.fails == "factory":
            raise ConnectionError(f"no database at {site.name}")

    @message_handler
    async def add(self, message: Add, ctx: MessageContext) -> Add:
        self.value += message.amount
        self.site.handled += 1
        return Add(self.value)

    async def save_state(self) -> Mapping[str, Any]:
        return {"value": self.value}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        if self.site.fails == "load":
            raise KeyError("count")
        self.value = state["value"]


@dataclass
class Site:
    """A worker, and what its agents did."""

    name: str
    fails: str = ""
    made: int = 0
    handled: int = 0
    runtime: NatsAgentRuntime = field(init=False)

    async def create(self) -> Sum:
        if self.fails == "slow factory":
            await asyncio.sleep(0.05)
            raise ConnectionError(f"no database at {self.name}")
        return Sum(self)


ERRORS = {"factory": ConnectionError, "slow factory": ConnectionError, "load": KeyError}


class Place:
    def __init__(self, url: str, namespace: str, stack: AsyncExitStack) -> None:
        self.url, self.namespace, self.stack = url, namespace, stack

    async def site(self, name: str, fails: str = "") -> Site:
        site = Site(name, fails)
        site.runtime = NatsAgentRuntime(self.url, namespace=self.namespace, name=name)
        await site.runtime.register_factory("sum", site.create, expected_class=Sum, keyed=True)
        await site.runtime.add_subscription(TypeSubscription("numbers", "sum"))
        await self.stack.enter_async_context(site.runtime)
        return site

    async def caller(self, **settings: Any) -> NatsAgentRuntime:
        return await self.stack.enter_async_context(
            NatsAgentRuntime(self.url, namespace=self.namespace, name="caller", **settings)
        )


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(server.url, namespace, stack)


AGENTS = [AgentId("sum", str(number)) for number in range(10)]


async def stored(place: Place, caller: NatsAgentRuntime) -> None:
    """Store a state of each agent, by a worker that has gone."""
    async with AsyncExitStack() as stack:
        await Place(place.url, place.namespace, stack).site("before")
        await asyncio.gather(*(caller.send_message(Add(7), agent) for agent in AGENTS))


@pytest.mark.parametrize("fails", ERRORS)
async def test_callers_see_no_error_if_another_worker_can_serve_the_agent(place: Place, fails: str) -> None:
    caller = await place.caller()
    await stored(place, caller)
    sick, healthy = await place.site("sick", fails), await place.site("healthy")
    for turn in range(3):
        sums = await asyncio.gather(*(caller.send_message(Add(1), agent) for agent in AGENTS))
        assert sums == [Add(8 + turn)] * len(AGENTS)
    assert (sick.handled, healthy.handled) == (0, 3 * len(AGENTS))
    assert sick.made <= len(AGENTS), "it does not try again and again"
    await eventually(lambda: sick.runtime.running.ownership.owned("sum") == 0)
    assert healthy.runtime.running.ownership.owned("sum") == len(AGENTS)


@pytest.mark.parametrize("fails", ERRORS)
async def test_agents_that_a_sick_worker_owns_move_when_a_healthy_one_comes(place: Place, fails: str) -> None:
    caller = await place.caller()
    await stored(place, caller)
    sick = await place.site("sick", fails)
    for agent in AGENTS[:3]:
        with pytest.raises(ERRORS[fails]):
            await caller.send_message(Add(1), agent)
    assert sick.runtime.running.ownership.owned("sum") == 3
    await place.site("healthy")
    assert [await caller.send_message(Add(1), agent) for agent in AGENTS] == [Add(8)] * len(AGENTS)


@pytest.mark.parametrize("fails", ERRORS)
async def test_the_only_worker_tries_each_time_and_the_caller_gets_its_error(place: Place, fails: str) -> None:
    caller = await place.caller()
    await stored(place, caller)
    sick = await place.site("sick", fails)
    for _ in range(3):
        with pytest.raises(ERRORS[fails]):
            await caller.send_message(Add(1), AGENTS[0])
    sick.fails = ""
    assert await caller.send_message(Add(1), AGENTS[0]) == Add(8)


async def test_if_no_worker_can_serve_the_agent_the_caller_gets_the_error_of_one(place: Place) -> None:
    caller = await place.caller()
    sites = [await place.site(name, "factory") for name in ("one", "two", "three")]
    with pytest.raises(ConnectionError, match="no database at"):
        await caller.send_message(Add(1), AGENTS[0])
    assert sum(site.made for site in sites) <= 6
    for site in sites:
        site.fails = ""
    async with asyncio.timeout(20):  # the workers try again after a while that grows
        while True:
            try:
                assert await caller.send_message(Add(1), AGENTS[0]) == Add(1)
                return
            except ConnectionError:
                await asyncio.sleep(0.1)


async def test_events_and_plain_requests_for_a_sick_worker_reach_a_healthy_one(place: Place) -> None:
    caller = await place.caller()
    sick = await place.site("sick")
    assert await caller.send_message(Add(1), AGENTS[0]) == Add(1)
    healthy = await place.site("healthy")
    sick.fails = "load"
    [slot] = sick.runtime.running.ownership._slots
    await sick.runtime.running.ownership._instances.close(slot)  # as a failed save may
    slot.agent = None
    await caller.publish_message(Add(2), TopicId("numbers", "0"))
    await eventually(lambda: healthy.handled == 1)
    client = await nats.connect(place.url)
    try:
        headers = {"Natsrt-Key": "1", "Natsrt-Type": "Add"}
        sick.fails = "factory"
        for number in range(8):
            reply = await client.request(
                f"{place.namespace}.agent.sum",
                b'{"amount": 1}',
                timeout=10,
                headers={**headers, "Natsrt-Key": str(number + 1)},
            )
            assert json.loads(reply.data) == {"amount": 1}, reply
    finally:
        await client.close()
    assert await caller.send_message(Add(0), AGENTS[0]) == Add(3)
    assert sick.handled == 1


async def test_asking_for_an_agent_that_cannot_be_made_here_raises_its_error(place: Place) -> None:
    sick = await place.site("sick", "factory")
    await place.site("healthy")
    with pytest.raises(ConnectionError, match="no database at sick"):
        await sick.runtime.try_get_underlying_agent_instance(AGENTS[0], Sum)


async def test_an_agent_that_all_workers_decline_is_back_as_soon_as_one_can_make_it(place: Place) -> None:
    caller = await place.caller()
    sites = [await place.site(name, "factory") for name in ("one", "two")]
    for _ in range(4):  # the pauses of the workers grow to some seconds
        with pytest.raises(ConnectionError):
            await caller.send_message(Add(1), AGENTS[0])
        await asyncio.sleep(0.6)
    assert sum(site.made for site in sites) <= 12, "they do not try again and again"
    for site in sites:
        site.fails = ""
    assert await caller.send_message(Add(1), AGENTS[0]) == Add(1)


def test_an_agent_is_tried_again_although_it_is_declined_but_not_at_once() -> None:
    unmade, agent = UnmadeAgents(), AGENTS[0]
    assert not unmade.try_again(agent, 0.0)
    unmade.failed(agent, ConnectionError(), 10.0)
    unmade.failed(agent, ConnectionError(), 11.0)
    assert not unmade.try_again(agent, 11.4)
    assert unmade.error(agent, 11.4) is not None
    assert unmade.try_again(agent, 11.5)
    assert unmade.error(agent, 11.5) is None
    unmade.failed(agent, ConnectionError(), 11.6)
    assert unmade.error(agent, 15.5) is not None and unmade.error(agent, 15.6) is None


def test_an_agent_is_declined_for_a_while_that_grows() -> None:
    unmade, agent, error = UnmadeAgents(), AGENTS[0], ConnectionError("no database")
    assert unmade.error(agent, 0.0) is None
    pauses = []
    now = 0.0
    for _ in range(9):
        unmade.failed(agent, error, now)
        assert unmade.error(agent, now) is error
        begun = now
        while unmade.error(agent, now) is not None:
            now += 0.25
        pauses.append(now - begun)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    unmade.made(agent)
    unmade.failed(agent, error, now)
    assert unmade.error(agent, now + 0.9) is error and unmade.error(agent, now + 1.0) is None
    for number in range(20_000):
        unmade.failed(AgentId("sum", f"n{number}"), error, now)
    assert unmade.error(agent, now) is None and unmade.error(AgentId("sum", "n19999"), now) is error
    assert len(unmade._failures) == 10_000
