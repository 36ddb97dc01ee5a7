"""Each agent id gets one copy of an event, however many workers and subscriptions there are, and misses none."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

import pytest
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    Subscription,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
    event,
)

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.support.processes import Process, Processes, eventually

EVENTS = 10_000


@dataclass
class News:
    number: int


class Recorder:
    """What the agents of one test handled: (worker, agent id, topic type, number)."""

    def __init__(self) -> None:
        self.handled: list[tuple[str, str, str, int]] = []

    def agent(self, worker: str) -> Callable[[], RoutedAgent]:
        recorder = self

        class Reader(RoutedAgent):
            def __init__(self) -> None:
                super().__init__("reads")

            @event
            async def on_news(self, message: News, ctx: MessageContext) -> None:
                assert ctx.topic_id is not None
                recorder.handled.append((worker, str(self.id), ctx.topic_id.type, message.number))

        return Reader

    def copies(self) -> Counter[tuple[str, str, int]]:
        """How often each agent id handled each event."""
        return Counter(entry[1:] for entry in self.handled)


@dataclass
class Custom:
    """A subscription to a topic type and all below it, for one agent of the type."""

    topic: str
    agent_type: str
    key: str

    @property
    def id(self) -> str:
        return f"{self.topic}->{self.agent_type}/{self.key}"

    def is_match(self, topic_id: TopicId) -> bool:
        return topic_id.type.startswith(self.topic)

    def map_to_agent(self, topic_id: TopicId) -> AgentId:
        return AgentId(self.agent_type, self.key)


class Place:
    """Makes runtimes of one namespace that end with the test."""

    def __init__(self, url: str, namespace: str, stack: AsyncExitStack) -> None:
        self.url, self.namespace, self._stack = url, namespace, stack
        self.recorder = Recorder()

    async def runtime(self, *subscriptions: Subscription, host: str | None = None, name: str = "w") -> NatsAgentRuntime:
        """A started runtime; with ``host`` it hosts that agent type."""
        runtime = NatsAgentRuntime(self.url, namespace=self.namespace, name=name)
        if host is not None:
            await runtime.register_factory(host, self.recorder.agent(name))
        for subscription in subscriptions:
            await runtime.add_subscription(subscription)
        return await self._stack.enter_async_context(runtime)

    async def handled(self, count: int) -> None:
        """Wait until ``count`` events were handled."""
        await eventually(lambda: len(self.recorder.handled) >= count, 30, f"{count} events are handled")


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(server.url, namespace, stack)


OVERLAPPING: list[Callable[[], Subscription]] = [
    lambda: TypeSubscription("news", "reader"),
    lambda: TypePrefixSubscription("news", "reader"),
    lambda: TypePrefixSubscription("news.", "reader"),
    lambda: TypePrefixSubscription("ne", "reader"),
    lambda: TypeSubscription("news.tech", "reader"),
    lambda: TypePrefixSubscription("", "reader"),
]


async def test_three_workers_with_overlapping_subscriptions_handle_each_event_once(place: Place) -> None:
    for worker in range(3):
        mine = [OVERLAPPING[index]() for index in range(len(OVERLAPPING)) if index % 3 == worker or index < 3]
        await place.runtime(*mine, host="reader", name=f"w{worker}")
    publisher = await place.runtime()
    topics = ["news", "news.tech", "news.tech.chips", "newsroom", "other"]
    for number in range(EVENTS):
        await publisher.publish_message(News(number), TopicId(topics[number % 5], f"s{number % 7}"))
    await place.handled(EVENTS)
    await publisher.running.connection.barrier()
    expected = {(f"reader/s{n % 7}", topics[n % 5], n): 1 for n in range(EVENTS)}
    assert place.recorder.copies() == expected
    assert {entry[0] for entry in place.recorder.handled} == {"w0", "w1", "w2"}
