"""Calls and events from one runtime to one agent start in the order they were sent."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from autogen_core import (
    AgentId,
    DefaultInterventionHandler,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
    message_handler,
)

from natsrt import NatsAgentRuntime, register
from natsrt.embedded import EmbeddedServer
from tests.support.processes import eventually

MESSAGES = 20_000
TOPICS = ("orders", "orders.new", "news")
AGENT = AgentId("clerk", "one")


Book = defaultdict[str, list[int]]
"""The numbers that each agent started to handle."""


@dataclass
class Numbered:
    number: int
    filling: str


@dataclass
class Other:
    number: int


class Clerk(RoutedAgent):
    """Writes down the number of each message when its handler starts. Some handlers then wait, so that they overlap."""

    def __init__(self, book: Book) -> None:
        super().__init__("writes numbers down")
        self._started = book[str(self.id)]

    @message_handler
    async def on_numbered(self, message: Numbered, ctx: MessageContext) -> None:
        self._started.append(message.number)
        if message.number % 10 == 0:
            await asyncio.sleep(message.number % 7 / 1000)

    @message_handler
    async def on_other(self, message: Other, ctx: MessageContext) -> Other:
        self._started.append(message.number)
        return message


class Sleepy(DefaultInterventionHandler):
    """Waits a random moment before each message goes on."""

    def __init__(self) -> None:
        self._random = random.Random(7)

    async def _nap(self) -> None:
        for _ in range(self._random.randrange(3)):
            await asyncio.sleep(0)

    async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
        await self._nap()
        return message

    async def on_publish(self, message: Any, *, message_context: MessageContext) -> Any:
        await self._nap()
        return message

    async def on_response(self, message: Any, *, sender: AgentId, recipient: AgentId | None) -> Any:
        await self._nap()
        return message


async def clerk_runtime(
    server: EmbeddedServer, namespace: str, factory: Callable[[], Any], agent_type: str = "clerk"
) -> NatsAgentRuntime:
    """A runtime, not started, that hosts a `Clerk` of all topics."""
    runtime = NatsAgentRuntime(server.url, namespace=namespace, name="worker")
    await register(runtime, Clerk, agent_type, factory)
    await runtime.add_subscription(TypeSubscription("orders", agent_type))
    await runtime.add_subscription(TypePrefixSubscription("orders.", agent_type))
    await runtime.add_subscription(TypePrefixSubscription("new", agent_type))
    return runtime


async def send_all(sender: NatsAgentRuntime, agents: tuple[AgentId, ...] = (AGENT,), count: int = MESSAGES) -> None:
    """Send the numbers from 0 on: calls and events on three topics at random, none awaited before the next is sent."""
    choose = random.Random(13)
    tasks = []
    for number in range(count):
        agent = agents[number % len(agents)]
        filling = "x" * choose.choice((0, 10, 300, 5_000))
        message = Numbered(number, filling) if choose.random() < 0.8 else Other(number)
        match choose.randrange(4):
            case 0:
                work: Any = sender.send_message(message, agent)
            case topic:
                work = sender.publish_message(message, TopicId(TOPICS[topic - 1], agent.key))
        tasks.append(asyncio.create_task(work))
        if choose.random() < 0.02:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks)


async def all_started(book: Book, agent: AgentId = AGENT, count: int = MESSAGES) -> None:
    """Wait until ``agent`` has started on ``count`` messages, and assert that they came in order."""
    started = book[str(agent)]
    await eventually(lambda: len(started) >= count, 30, f"{count} handlers start")
    assert started == list(range(count))


@pytest.mark.slow
@pytest.mark.parametrize("interventions", [False, True], ids=["without interventions", "with interventions"])
async def test_handlers_start_in_the_order_in_which_the_messages_were_sent(
    server: EmbeddedServer, namespace: str, interventions: bool
) -> None:
    book: Book = defaultdict(list)
    worker = await clerk_runtime(server, namespace, lambda: Clerk(book))
    sender = NatsAgentRuntime(server.url, namespace=namespace, intervention_handlers=[Sleepy()] * 2 * interventions)
    noisy = NatsAgentRuntime(server.url, namespace=namespace)
    async with worker, sender, noisy:
        load = AgentId("clerk", "load")
        await asyncio.gather(send_all(sender), send_all(noisy, (load,)))
        await all_started(book)
        await all_started(book, load)


@pytest.mark.slow
async def test_order_holds_for_each_agent_of_two_types(server: EmbeddedServer, namespace: str) -> None:
    book: Book = defaultdict(list)
    agents = (AgentId("clerk", "one"), AgentId("scribe", "two"))
    # Each worker hosts one type; an agent sees the events that have its key as source.
    clerk = await clerk_runtime(server, namespace, lambda: Clerk(book))
    scribe = await clerk_runtime(server, namespace, lambda: Clerk(book), "scribe")
    sender = NatsAgentRuntime(server.url, namespace=namespace)
    async with clerk, scribe, sender:
        await send_all(sender, agents)
        for place, agent in enumerate(agents):
            started = book[str(agent)]
            await eventually(lambda started=started: len(started) >= MESSAGES // 2, 30)
            assert started == list(range(place, MESSAGES, 2))


@pytest.mark.parametrize("interventions", [False, True], ids=["without interventions", "with interventions"])
async def test_order_holds_while_a_slow_factory_makes_the_agent(
    server: EmbeddedServer, namespace: str, interventions: bool
) -> None:
    book: Book = defaultdict(list)
    let_go = asyncio.Event()

    async def factory() -> Clerk:
        clerk = Clerk(book)
        await let_go.wait()
        return clerk

    worker = await clerk_runtime(server, namespace, factory)
    sender = NatsAgentRuntime(server.url, namespace=namespace, intervention_handlers=[Sleepy()] * interventions)
    async with worker, sender:
        sending = asyncio.create_task(send_all(sender, count=2_000))
        await eventually(lambda: worker.running.counters.taken_in >= 1_000)
        let_go.set()
        await sending
        await all_started(book, count=2_000)


@pytest.mark.parametrize("interventions", [False, True], ids=["without interventions", "with interventions"])
async def test_order_holds_for_what_is_sent_before_and_after_start_completes(
    server: EmbeddedServer, namespace: str, interventions: bool
) -> None:
    book: Book = defaultdict(list)
    worker = await clerk_runtime(server, namespace, lambda: Clerk(book))
    sender = NatsAgentRuntime(server.url, namespace=namespace, intervention_handlers=[Sleepy()] * interventions)
    async with worker:
        starting = sender.start()
        early = [asyncio.create_task(sender.send_message(Other(number), AGENT)) for number in range(300)]
        number = len(early)
        while not sender.ready:
            early.append(asyncio.create_task(sender.publish_message(Other(number), TopicId("orders", AGENT.key))))
            number += 1
            await asyncio.sleep(0)
        for late in range(number, number + 300):
            early.append(asyncio.create_task(sender.send_message(Other(late), AGENT)))
        await starting
        await asyncio.gather(*early)
        await all_started(book, count=len(early))
        await sender.close()


async def test_order_holds_from_a_runtime_to_its_own_agent(server: EmbeddedServer, namespace: str) -> None:
    book: Book = defaultdict(list)
    runtime = await clerk_runtime(server, namespace, lambda: Clerk(book))
    async with runtime:
        await send_all(runtime, count=3_000)
        await all_started(book, count=3_000)


async def test_order_holds_for_messages_that_wait_for_their_serializer(server: EmbeddedServer, namespace: str) -> None:
    book: Book = defaultdict(list)
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    sender = NatsAgentRuntime(server.url, namespace=namespace)
    async with runtime, sender:
        # As AutoGen's own registration does: factory and subscription first, serializers afterwards.
        await runtime.register_factory("clerk", lambda: Clerk(book))
        await runtime.add_subscription(TypeSubscription("orders", "clerk"))
        sending = [asyncio.create_task(sender.send_message(Other(number), AGENT)) for number in range(200)]
        await eventually(lambda: runtime.running.counters.taken_in >= 200)
        await asyncio.gather(*sending)
        await all_started(book, count=200)
