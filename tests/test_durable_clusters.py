"""Durable topics where servers are joined: at a leaf node whose hub has the streams, and in a cluster of three."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from autogen_core import AgentId, TopicId, TypeSubscription

import natsrt
from benchmarks.chaos.cluster import Cluster
from natsrt import NatsAgentRuntime
from natsrt.errors import NatsrtError
from natsrt.jetstream.stream_reader import StreamReader
from natsrt.jetstream.streams import EVENTS
from tests.programs import durable_ledger
from tests.programs.durable_ledger import Ask, Entry
from tests.programs.durable_worker import Job
from tests.support.processes import eventually
from tests.support.topology import hub_and_leaf
from tests.test_durable_handling import Seen, Works

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

JOBS = TopicId("work.jobs", "default")
ENTRIES = TopicId("work.entries", "x")


def runtime_with(seen: Seen, servers: Any, name: str, **settings: Any) -> NatsAgentRuntime:
    """A runtime with the durable topics ``work.``, which hosts nothing yet."""
    settings = durable_ledger.SETTINGS | {"publish_timeout": 30.0} | settings
    return NatsAgentRuntime(servers, name=name, **settings)


async def hosting(seen: Seen, runtime: NatsAgentRuntime) -> NatsAgentRuntime:
    """Have the runtime host the plain type ``jobs`` and the keyed type ``ledger``."""
    await natsrt.register(runtime, Works, "jobs", lambda: Works(seen, "w"))
    await runtime.add_subscription(TypeSubscription(JOBS.type, "jobs"))
    await durable_ledger.host(runtime)
    return runtime


async def publish_until_confirmed(runtime: NatsAgentRuntime, message: Any, topic: TopicId, message_id: str) -> None:
    while True:
        try:
            await runtime.publish_message(message, topic, message_id=message_id)
            return
        except NatsrtError:
            await asyncio.sleep(0.1)


async def publish_all(runtime: NatsAgentRuntime, numbers: range) -> None:
    """Publish the numbers as jobs and as entries, each when the one before is confirmed."""
    for number in numbers:
        await publish_until_confirmed(runtime, Job(number), JOBS, f"job-{number}")
        await publish_until_confirmed(runtime, Entry(number), ENTRIES, f"entry-{number}")


async def entries(runtime: NatsAgentRuntime) -> list[int]:
    """What the keyed agent has handled, in its order. Empty if it does not answer."""
    try:
        return list((await runtime.send_message(Ask(), AgentId("ledger", ENTRIES.source))).numbers)
    except NatsrtError:
        return []


async def all_handled(seen: Seen, runtime: NatsAgentRuntime, count: int) -> None:
    """Wait until both types have handled the numbers up to ``count``: the keyed one each once, and in order."""
    await eventually(lambda: seen.numbers.keys() == set(range(count)), 60.0, "jobs")

    async def has_all() -> bool:
        return await entries(runtime) == list(range(count))

    await eventually(has_all, 60.0, "entries")


# -- a hub and a leaf node -------------------------------------------------------------------------------------------


async def test_a_durable_topic_at_the_hub_is_used_from_a_leaf_node_whose_link_breaks(tmp_path: Path) -> None:
    seen = Seen()
    async with hub_and_leaf(tmp_path) as servers:
        publisher = runtime_with(seen, servers.leaf.url, "publisher", jetstream_domain="hub")
        far = await hosting(seen, runtime_with(seen, servers.leaf.url, "far", jetstream_domain="hub"))
        async with publisher, far:
            await publish_all(publisher, range(10))
            publishing = asyncio.create_task(publish_all(publisher, range(10, 30)))
            servers.link.cut()
            await asyncio.sleep(2.0)  # events wait meanwhile, and pulls are silent
            assert not publishing.done()
            await servers.link.restore()
            await asyncio.wait_for(publishing, 60)
            await all_handled(seen, publisher, 30)


async def test_events_published_at_a_leaf_node_are_handled_at_the_hub(tmp_path: Path) -> None:
    seen = Seen()
    async with hub_and_leaf(tmp_path) as servers:
        near = await hosting(seen, runtime_with(seen, servers.hub.url, "near", jetstream_domain="hub"))
        publisher = runtime_with(seen, servers.leaf.url, "publisher", jetstream_domain="hub")
        async with near, publisher:
            await publish_all(publisher, range(20))
            await all_handled(seen, publisher, 20)
            await publisher.publish_message(Job(20), JOBS, delay=0.5, message_id="later")
            await eventually(lambda: seen.numbers[20] == 1, 20.0)


# -- a cluster of three ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def in_cluster(seen: Seen, cluster: Cluster) -> AsyncIterator[tuple[NatsAgentRuntime, list[NatsAgentRuntime]]]:
    """A publisher, and two workers that host both types."""
    settings = {"registry_replicas": 3, "ack_wait": 3.0, "subscription_timeout": 30.0}
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(runtime_with(seen, cluster.urls, "publisher", **settings))
        workers = [await hosting(seen, runtime_with(seen, cluster.urls, f"w{n}", **settings)) for n in range(2)]
        for worker in workers:
            await stack.enter_async_context(worker)
        yield publisher, workers


@pytest.mark.parametrize("leading", [False, True], ids=["a follower", "the leader"])
async def test_events_are_published_and_handled_while_a_server_of_three_is_down(leading: bool) -> None:
    seen = Seen()
    async with Cluster() as cluster, in_cluster(seen, cluster) as (publisher, _):
        await publish_all(publisher, range(10))
        leader = await cluster.leader_of(EVENTS)
        assert leader is not None
        number = leader if leading else next(n for n in cluster.answering if n != leader)
        await cluster.kill(number)
        await publish_all(publisher, range(10, 40))
        await all_handled(seen, publisher, 40)
        await cluster.start(number)
        await cluster.until_healthy()
        await publish_all(publisher, range(40, 50))
        await all_handled(seen, publisher, 50)


async def _fired(runtime: NatsAgentRuntime, stream: str, topic_type: str) -> list[float]:
    """When each event on the topics of a type was stored."""
    reader = StreamReader(runtime.running.connection, runtime.options)
    subject = runtime.running.network.subjects.type_filter(topic_type).subject
    return [message.stored_at async for message in reader.read(stream, subject)]


async def test_delayed_events_are_published_once_although_the_leader_is_killed_when_they_are_due() -> None:
    seen, count = Seen(), 40
    async with Cluster() as cluster, in_cluster(seen, cluster) as (publisher, _):
        due = time.time() + 4.0
        for number in range(count):
            at = due + 0.02 * number
            await publisher.publish_message(Job(number), JOBS, delay=at - time.time(), message_id=f"job-{number}")
        leader = await cluster.leader_of(EVENTS)
        assert leader is not None and time.time() < due, "the machine is too slow for this test"
        await asyncio.sleep(due + 0.01 * count - time.time())
        await cluster.kill(leader)
        await eventually(lambda: seen.numbers.keys() == set(range(count)), 60.0, "delayed events")

        async def stored() -> list[float]:
            try:
                return await _fired(publisher, EVENTS, JOBS.type)
            except NatsrtError:
                return []

        assert len(await eventually(stored, 30.0)) == count, "each was published once"


async def test_a_reminder_fires_once_for_each_due_time_although_the_leader_is_killed_at_one() -> None:
    seen, every = Seen(), 2.0
    stream = f"{EVENTS}_reminders"
    async with Cluster() as cluster, in_cluster(seen, cluster) as (publisher, _):
        await publisher.remind(AgentId("jobs", "k"), "tick", Job(7), every=every)
        await eventually(lambda: seen.numbers[7] >= 1, 30.0)
        topic = "natsrt.reminder.jobs:tick"
        (first, *_) = await _fired(publisher, stream, topic)
        leader = await cluster.leader_of(stream)
        assert leader is not None
        next_due = first + every * (1 + int((time.time() - first) / every))
        await asyncio.sleep(next_due - time.time())
        await cluster.kill(leader)
        before = seen.numbers[7]
        await eventually(lambda: seen.numbers[7] >= before + 3, 60.0, "reminders after the leader was killed")
        moments = await _fired(publisher, stream, topic)
        told = [round(moment - first, 2) for moment in moments]
        # The one that was due is late, and the server counts from then on: no two for one time, and not more of them.
        assert all(later - one > 0.05 for one, later in pairwise(moments)), told
        assert len(moments) <= 1.5 + (moments[-1] - first) / every, told
