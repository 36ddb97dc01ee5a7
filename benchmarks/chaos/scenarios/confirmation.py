"""Takes the server away from a publisher whose events on a durable topic are under way, and publishes them again."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from autogen_core import TopicId

from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.roles import until
from benchmarks.chaos.scenario import Figure, Scenario, under
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import EventNotStored, NatsrtError
from natsrt.jetstream.stream_reader import StoredMessage, StreamReader
from natsrt.jetstream.streams import EVENTS

TIMEOUT = 4.0
"""The setting ``publish_timeout``, in seconds."""
LATE = 1.5
"""Seconds after ``publish_timeout`` within which the error is raised, on a machine that does other things too."""
_BEFORE = 20
"""Events that are confirmed before the failure, beside two for each publisher."""
_TRIES = 5
_AGAIN = 0.2
_GIVE_UP = 60.0
_TOPIC = TopicId("orders", "shop")
_SETTINGS: dict[str, Any] = {"durable": [_TOPIC.type], "subscription_timeout": 30.0}


class Place(NamedTuple):
    """Where events are published: the URLs of the servers, how a failure begins and how it ends."""

    urls: list[str]
    replicas: int
    fail: Callable[[], Awaitable[None]]
    mend: Callable[[], Awaitable[None]]


@asynccontextmanager
async def down() -> AsyncIterator[Place]:
    """A single server that is killed."""
    async with EmbeddedServer() as server:
        yield Place([server.url], 1, server.kill, server.start)


@asynccontextmanager
async def hung() -> AsyncIterator[Place]:
    """A single server that is stopped with SIGSTOP."""
    async with EmbeddedServer() as server:

        async def fail() -> None:
            server.pause()

        async def mend() -> None:
            server.resume()

        yield Place([server.url], 1, fail, mend)


@asynccontextmanager
async def without_leader() -> AsyncIterator[Place]:
    """Three servers, of which the one is killed that leads the stream of the events."""
    async with Cluster() as cluster:
        killed: list[int] = []

        async def fail() -> None:
            leader = await cluster.leader_of(EVENTS)
            assert leader is not None
            await cluster.kill(leader)
            killed.append(leader)

        async def mend() -> None:
            await cluster.start(killed.pop())
            await cluster.until_healthy()

        yield Place(cluster.urls, 3, fail, mend)


FAILURES = {"server down": down, "server hung": hung, "leader killed": without_leader}
"""The failures by name."""


@dataclass
class _Outcomes:
    """What became of the events: the numbers of the confirmed ones, and the errors of the others."""

    confirmed: set[int] = field(default_factory=set)
    failed: dict[int, Exception] = field(default_factory=dict)
    slowest: float = 0.0

    async def publish(self, runtime: NatsAgentRuntime, number: int) -> None:
        """Publish one event, and write down how that ended."""
        began = time.monotonic()
        try:
            await runtime.publish_message(str(number), _TOPIC, message_id=f"order-{number}")
        except Exception as error:
            self.failed[number] = error
        else:
            self.confirmed.add(number)
        self.slowest = max(self.slowest, time.monotonic() - began)


async def measure(failure: str, *, under_way: int, timeout: float = TIMEOUT) -> list[Figure]:
    """Publish events, let the server fail meanwhile, and publish those again that were not confirmed.

    Args:
        failure: One of `FAILURES`.
        under_way: Number of events that are published at the same time; 1: the next one when one has ended.
        timeout: The setting ``publish_timeout``, in seconds.
    """
    async with (
        FAILURES[failure]() as place,
        NatsAgentRuntime(place.urls, **_SETTINGS, registry_replicas=place.replicas, publish_timeout=timeout) as runtime,
    ):
        outcomes = await _published(runtime, place, under_way)
        await place.mend()
        stored = await _stored(runtime)
        again = await _published_again(runtime, outcomes)
        after = await _stored(runtime)
    denied = {
        n for n, error in outcomes.failed.items() if isinstance(error, EventNotStored) and not error.may_be_stored
    }
    numbers = outcomes.confirmed | outcomes.failed.keys()
    errors = Counter(type(error).__name__ for error in outcomes.failed.values())
    untyped = sum(not isinstance(error, NatsrtError) for error in outcomes.failed.values())
    return [
        Figure(name="events published", value=len(numbers)),
        Figure(name="confirmed", value=len(outcomes.confirmed)),
        Figure(name="raised, by error", value=errors),
        Figure(name="raised, without a type of natsrt's", value=untyped, at_most=0),
        Figure(name="slowest end", value=outcomes.slowest, unit="s", at_most=timeout + LATE),
        Figure(name="confirmed, and not stored", value=len(outcomes.confirmed - stored.keys()), at_most=0),
        Figure(name="said not to be stored, and stored", value=len(denied & stored.keys()), at_most=0),
        Figure(name="raised, and stored", value=len(outcomes.failed.keys() & stored.keys())),
        Figure(name="published again, and not confirmed", value=len(again.failed), at_most=0),
        Figure(name="stored in the end", value=len(after), at_least=len(numbers), at_most=len(numbers)),
        Figure(name="stored more than once", value=sum(count > 1 for count in after.values()), at_most=0),
    ]


async def _published(runtime: NatsAgentRuntime, place: Place, under_way: int) -> _Outcomes:
    """Publish, and let the server fail when some are confirmed. Returns when all have ended.

    Each publisher begins one event at least after the failure.
    """
    outcomes, numbers, failed = _Outcomes(), itertools.count(), asyncio.Event()

    async def keep_publishing() -> None:
        while not failed.is_set():
            await outcomes.publish(runtime, next(numbers))
        await outcomes.publish(runtime, next(numbers))

    tasks = [asyncio.create_task(keep_publishing()) for _ in range(under_way)]
    await until(lambda: len(outcomes.confirmed) > 2 * under_way + _BEFORE, _GIVE_UP)
    await place.fail()
    failed.set()
    await asyncio.gather(*tasks)
    return outcomes


async def _published_again(runtime: NatsAgentRuntime, outcomes: _Outcomes) -> _Outcomes:
    """Publish all events that raised until they are confirmed. Also those that were confirmed, once, which changes
    nothing. Returns the outcomes."""
    again = _Outcomes()
    for _ in range(_TRIES):
        left = (outcomes.confirmed | outcomes.failed.keys()) - again.confirmed
        again.failed.clear()
        await asyncio.gather(*(again.publish(runtime, number) for number in left))
    return again


async def _stored(runtime: NatsAgentRuntime) -> Counter[int]:
    """How often each event is stored."""
    deadline = time.monotonic() + _GIVE_UP
    while True:
        try:
            reader = StreamReader(runtime.running.connection, runtime.options)
            subject = runtime.running.network.subjects.topic(_TOPIC.type, _TOPIC.source)
            return Counter([_number(message) async for message in reader.read(EVENTS, subject)])
        except NatsrtError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_AGAIN)


def _number(message: StoredMessage) -> int:
    return int(json.loads(message.data)["id"].removeprefix("order-"))


async def _all(short: bool) -> list[Figure]:
    figures = []
    for failure in FAILURES:
        for under_way in (1, 1_000):
            figures += under(f"{failure}, {under_way:,} under way", await measure(failure, under_way=under_way))
    return figures


SCENARIO = Scenario(title="The server is down, hangs, or its leader is killed while events are published", measure=_all)
