"""Each agent id gets one copy of an event, however many workers and subscriptions there are, and misses none."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
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
from tests.support.processes import REPOSITORY, Process, Processes, eventually
from tests.support.reading_worker import News, Publish, WhatWasRead

EVENTS = 10_000


READING_WORKER = REPOSITORY / "tests" / "support" / "reading_worker.py"


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
        self.runtimes: list[NatsAgentRuntime] = []

    async def runtime(self, *subscriptions: Subscription, host: str | None = None, name: str = "w") -> NatsAgentRuntime:
        """A started runtime; with ``host`` it hosts that agent type."""
        runtime = NatsAgentRuntime(self.url, namespace=self.namespace, name=name)
        if host is not None:
            await runtime.register_factory(host, self.recorder.agent(name))
        for subscription in subscriptions:
            await runtime.add_subscription(subscription)
        self.runtimes.append(runtime)
        return await self._stack.enter_async_context(runtime)

    async def settled(self) -> None:
        """Wait until everything that was published has been handled, extra copies included."""
        running = [runtime.running for runtime in self.runtimes if runtime.worker_id is not None]
        for worker in running:
            await worker.connection.barrier()
        for worker in running:
            await worker.wait_idle()


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
    await place.settled()
    expected = {(f"reader/s{n % 7}", topics[n % 5], n): 1 for n in range(EVENTS)}
    assert place.recorder.copies() == expected
    assert {entry[0] for entry in place.recorder.handled} == {"w0", "w1", "w2"}


async def test_a_worker_that_serves_a_topic_misses_none_because_another_serves_the_prefix_below_it(
    place: Place,
) -> None:
    await place.runtime(TypeSubscription("news", "reader"), host="reader", name="topic")
    await place.runtime(TypePrefixSubscription("news.", "reader"), host="reader", name="prefix")
    publisher = await place.runtime()
    for number in range(1000):
        await publisher.publish_message(News(number), TopicId("news", "s"))
    await place.settled()
    assert place.recorder.copies() == {("reader/s", "news", number): 1 for number in range(1000)}


async def test_types_with_different_subscriptions_each_get_their_own_copy(place: Place) -> None:
    await place.runtime(TypeSubscription("news", "exact"), host="exact")
    await place.runtime(TypePrefixSubscription("news.", "below"), host="below")
    publisher = await place.runtime()
    for number in range(500):
        await publisher.publish_message(News(number), TopicId("news", "s"))
        await publisher.publish_message(News(number), TopicId("news.tech", "s"))
    await place.settled()
    assert place.recorder.copies() == {
        **{("exact/s", "news", number): 1 for number in range(500)},
        **{("below/s", "news.tech", number): 1 for number in range(500)},
    }


async def test_custom_subscriptions_that_name_one_agent_give_it_one_copy(place: Place) -> None:
    subscriptions = [
        Custom("news", "reader", "chief"),
        Custom("news.tech", "reader", "chief"),
        Custom("news.tech", "reader", "geek"),
        TypeSubscription("news.tech", "reader"),
    ]
    for name in ("w0", "w1"):
        await place.runtime(*subscriptions, host="reader", name=name)
    publisher = await place.runtime()
    for number in range(300):
        await publisher.publish_message(News(number), TopicId("news.tech", "chief"))
        await publisher.publish_message(News(number), TopicId("news.tech.chips", "someone"))
    await place.settled()
    assert place.recorder.copies() == {
        (agent, topic, number): 1
        for number in range(300)
        for agent, topic in (
            ("reader/chief", "news.tech"),
            ("reader/geek", "news.tech"),
            *((f"reader/{key}", "news.tech.chips") for key in ("chief", "geek")),
        )
    }


async def test_instances_on_several_workers_each_get_their_own_events_once(place: Place) -> None:
    for key in ("a", "b", "c"):
        worker = await place.runtime(name=key)
        await worker.register_agent_instance(place.recorder.agent(key)(), AgentId("reader", key))
        await worker.add_subscription(TypeSubscription("news", "reader"))
        await worker.add_subscription(TypePrefixSubscription("ne", "reader"))
    publisher = await place.runtime()
    for number in range(300):
        for source in ("a", "b", "c", "nobody"):
            await publisher.publish_message(News(number), TopicId("news", source))
            await publisher.publish_message(News(number), TopicId("news.tech", source))
    await place.settled()
    assert place.recorder.copies() == {
        (f"reader/{key}", topic, n): 1 for key in "abc" for n in range(300) for topic in ("news", "news.tech")
    }
    assert {(entry[0], entry[1]) for entry in place.recorder.handled} == {(key, f"reader/{key}") for key in "abc"}


async def test_a_custom_subscription_reaches_an_instance_on_whichever_worker_it_lives(place: Place) -> None:
    for key in ("a", "b", "c"):
        worker = await place.runtime(name=key)
        await worker.register_agent_instance(place.recorder.agent(key)(), AgentId("reader", key))
        await worker.add_subscription(Custom("news", "reader", "b"))
    publisher = await place.runtime()
    for number in range(100):
        await publisher.publish_message(News(number), TopicId("news", "s"))
    await place.settled()
    assert place.recorder.copies() == {("reader/b", "news", number): 1 for number in range(100)}


async def test_a_worker_that_joins_late_serves_the_subscriptions_of_all(place: Place) -> None:
    first = await place.runtime(TypeSubscription("news", "reader"), host="reader", name="first")
    outsider = await place.runtime(TypePrefixSubscription("alerts.", "reader"), name="outsider")
    await place.runtime(host="reader", name="late")
    for number in range(400):
        await outsider.publish_message(News(number), TopicId(("news", "alerts.fire")[number % 2], "s"))
    await place.settled()
    assert set(place.recorder.copies().values()) == {1}
    assert len(place.recorder.handled) == 400
    for topic in ("news", "alerts.fire"):
        assert {entry[0] for entry in place.recorder.handled if entry[2] == topic} == {"first", "late"}
    assert first.ready


async def test_a_subscription_ends_with_its_last_declaring_worker(server: EmbeddedServer, place: Place) -> None:
    both = TypePrefixSubscription("both.", "reader")
    leaving = await place.runtime(TypeSubscription("alone", "reader"), both, host="reader", name="leaving")
    staying = await place.runtime(both, host="reader", name="staying")
    publisher = await place.runtime(TypeSubscription("outside", "reader"))
    root = f"{place.namespace}.topic"
    assert await topics_at_server(server, staying) == {f"{root}.alone.*", f"{root}.both.*.>", f"{root}.outside.*"}
    await leaving.stop()

    async def ended() -> bool:
        return await topics_at_server(server, staying) == {f"{root}.both.*.>", f"{root}.outside.*"}

    await eventually(ended)
    for number, topic in enumerate(("alone", "both.x", "outside")):
        await publisher.publish_message(News(number), TopicId(topic, "s"))
    await place.settled()
    assert place.recorder.copies() == {("reader/s", "both.x", 1): 1, ("reader/s", "outside", 2): 1}


async def test_a_removed_subscription_ends_on_every_worker_unless_another_declares_it(
    server: EmbeddedServer, place: Place
) -> None:
    shared = [TypeSubscription("news", "reader") for _ in range(2)]
    first, second = [await place.runtime(shared[n], host="reader", name=f"w{n}") for n in range(2)]
    await first.remove_subscription(shared[0].id)
    for worker in (first, second):
        assert await topics_at_server(server, worker) == {f"{place.namespace}.topic.news.*"}
    await second.remove_subscription(shared[1].id)
    for worker in (first, second):
        assert await topics_at_server(server, worker) == set()


async def test_a_worker_of_one_topic_is_sent_no_message_of_another(server: EmbeddedServer, place: Place) -> None:
    orders = [TypePrefixSubscription("orders.", "reader"), TypePrefixSubscription("reader:", "reader")]
    worker = await place.runtime(*orders, host="reader", name="orders")
    await place.runtime(TypePrefixSubscription("", "everything"), host="everything", name="all")
    publisher = await place.runtime()
    before = (await connection_at_server(server, worker))["out_msgs"]
    for number in range(500):
        for topic in ("news", "orders", "order", "ordersx.y", "news.orders.x", "everything:"):
            await publisher.publish_message(News(number), TopicId(topic, "s"))
    await publisher.publish_message(News(-1), TopicId("orders.new", "s"))
    await place.settled()
    details = (await connection_at_server(server, worker))["subscriptions_list_detail"]
    received = {entry["subject"]: entry["msgs"] for entry in details if ".topic." in entry["subject"]}
    assert received == {f"{place.namespace}.topic.orders.*.>": 1, f"{place.namespace}.topic.reader=3A.*.>": 0}
    after = (await connection_at_server(server, worker))["out_msgs"]
    assert after - before < 100  # the one event, and what the registry says: nothing of the 3,000


async def connection_at_server(server: EmbeddedServer, runtime: NatsAgentRuntime) -> dict[str, Any]:
    """What the server's monitoring tells of the connection of ``runtime``."""

    def read() -> dict[str, Any]:
        with urlopen(f"{server.monitor_url}/connz?subs=detail&limit=4096") as page:
            found = [c for c in json.load(page)["connections"] if c.get("name") == f"natsrt {runtime.worker_id}"]
            return dict(found[0])

    return await asyncio.to_thread(read)


async def topics_at_server(server: EmbeddedServer, runtime: NatsAgentRuntime) -> set[str]:
    """The subjects of events that the server sends ``runtime``."""
    details = (await connection_at_server(server, runtime))["subscriptions_list_detail"]
    return {entry["subject"] for entry in details if ".topic." in entry["subject"]}


ADDITIONS = 1_000


@pytest.mark.slow
@pytest.mark.parametrize("adder_hosts", [False, True], ids=["adder does not host the type", "adder hosts the type"])
async def test_no_event_published_right_after_adding_its_subscription_is_missed(
    place: Place, processes: Processes, adder_hosts: bool
) -> None:
    hosts = [await start_worker(place, processes, name) for name in ("host", "other")]
    publisher = await start_worker(place, processes, "elsewhere")
    adder = await place.runtime(host="reader" if adder_hosts else None, name="adder")
    for number in range(ADDITIONS):
        await adder.add_subscription(TypeSubscription(f"topic{number}", "reader"))
        await adder.send_message(Publish(f"topic{number}", "s", number), AgentId("publisher-elsewhere", "p"))

    async def handled() -> list[int]:
        read = [entry[3] for entry in place.recorder.handled]
        for name in ("host", "other", "elsewhere"):
            memory = await adder.send_message(WhatWasRead(), AgentId(f"memory-{name}", "m"))
            read += [int(entry.split()[1]) for entry in memory.events]
        return read

    async def complete() -> bool:
        return len(await handled()) >= ADDITIONS

    await eventually(complete, 10, "every event is handled")
    assert sorted(await handled()) == list(range(ADDITIONS))
    assert publisher.running and all(host.running for host in hosts)


@pytest.mark.slow
async def test_three_processes_with_overlapping_subscriptions_handle_each_event_once(
    place: Place, processes: Processes
) -> None:
    served = (["news", "news."], ["news."], ["news", "news.tech"])
    for number, topics in enumerate(served):
        await start_worker(place, processes, f"p{number}", *topics)
    publisher = await place.runtime()
    topics = ["news", "news.tech", "news.tech.chips"]
    for number in range(EVENTS):
        await publisher.publish_message(News(number), TopicId(topics[number % 3], f"s{number % 7}"))

    async def handled() -> list[list[str]]:
        return [(await publisher.send_message(WhatWasRead(), AgentId(f"memory-p{n}", "m"))).events for n in range(3)]

    async def complete() -> bool:
        return sum(map(len, await handled())) >= EVENTS

    await eventually(complete, 30, "every event is handled")
    shares = await handled()
    assert all(shares)
    copies = Counter(entry for share in shares for entry in share)
    assert copies == {f"s{number % 7} {number}": 1 for number in range(EVENTS)}


async def start_worker(place: Place, processes: Processes, name: str, *topics: str) -> Process:
    worker = processes.python(READING_WORKER, place.url, place.namespace, name, *topics, name=name)
    await worker.wait_for_line("ready", 20)
    return worker
