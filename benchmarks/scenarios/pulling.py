"""Messages of a stream pulled and acknowledged per second: by natsrt's pull consumer, by nats-py, and by hand."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import nats
import orjson
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig as NatsConsumerConfig

from benchmarks.harness import Goal, Measure, Sample, Scenario, Variant
from benchmarks.peers import Peer
from benchmarks.roles import Role
from benchmarks.teams import Team
from natsrt.jetstream.consumers import ConsumerConfig
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.pulling import Pull
from natsrt.options import Options
from natsrt.transport.connection import Connection

OURS, FETCH, BARE = "natsrt", "nats-py fetch", "bare sink"
SIZE = 200
"""Bytes of a message."""
_AT_ONCE = 1_000
"""Messages that are published before their acknowledgements are awaited."""
_GIVE_UP = 120.0
"""Time limit of one turn in seconds."""
_SECOND = 1_000_000_000


class Pulling(Role):
    """Publishes messages to a stream, and pulls them. Every handler acknowledges at once."""

    async def start(self) -> None:
        self._client = await nats.connect(self.place.address)
        self._js = self._client.jetstream(timeout=10)
        self._connection = Connection(Options(servers=[self.place.address]), client_name="benchmark")
        await self._connection.open()
        self._stream = f"pulled_{self.place.namespace}"
        await self._js.add_stream(name=self._stream, subjects=[f"{self._stream}.>"])
        self._stored = 0
        self._consumers = 0

    async def stop(self) -> None:
        await self._js.delete_stream(self._stream)
        await self._connection.close()
        await self._client.close()

    async def pull(self, by: str, count: int) -> float:
        """Pull ``count`` messages with a new consumer. Returns the seconds.

        Raises:
            RuntimeError: They did not come once each.
        """
        await self._store(count)
        self._consumers += 1
        way: Callable[[str, int], Awaitable[float]] = {
            OURS: self._with_natsrt,
            FETCH: self._with_fetch,
            BARE: self._with_a_sink,
        }[by]
        gc.collect()
        async with asyncio.timeout(_GIVE_UP):
            seconds = await way(f"c{self._consumers}", count)
        await self._js.delete_consumer(self._stream, f"c{self._consumers}")
        return seconds

    async def _store(self, count: int) -> None:
        """Let the stream hold exactly ``count`` messages."""
        await self._js.purge_stream(self._stream)
        for at in range(0, count, _AT_ONCE):
            many = range(min(_AT_ONCE, count - at))
            for stored in [await self._js.publish_async(f"{self._stream}.a", b"x" * SIZE) for _ in many]:
                await stored

    async def _with_natsrt(self, name: str, count: int) -> float:
        done, seen = asyncio.Event(), 0

        def receive(delivery: Delivery) -> None:
            nonlocal seen
            pull.ack(delivery)
            seen += 1
            if seen == count:
                done.set()

        config = ConsumerConfig(name=name)
        pull = Pull(self._connection, Domain(None), self._stream, config, receive, inbox_prefix="_INBOX")
        began = time.perf_counter()
        await pull.start()
        await done.wait()
        seconds = time.perf_counter() - began
        await pull.stop()
        return _checked(seconds, seen, count)

    async def _with_fetch(self, name: str, count: int) -> float:
        config = NatsConsumerConfig(max_ack_pending=10_000)
        seen = 0
        began = time.perf_counter()
        subscription = await self._js.pull_subscribe("", durable=name, stream=self._stream, config=config)
        while seen < count:
            for message in await subscription.fetch(min(256, count - seen)):
                await message.ack()
                seen += 1
        seconds = time.perf_counter() - began
        await subscription.unsubscribe()
        return _checked(seconds, seen, count)

    async def _with_a_sink(self, name: str, count: int) -> float:
        """The least that a pull needs: no statuses, no heartbeats, no parsing."""
        client, seen = self._client, 0
        inbox = client.new_inbox()
        next_messages = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{name}"
        half = orjson.dumps({"batch": 128, "expires": 30 * _SECOND})
        acks: asyncio.Queue[str] = asyncio.Queue()

        class Sink:
            def cancelled(self) -> bool:
                return False

            def set_result(self, message: Msg) -> None:
                acks.put_nowait(message.reply)

        config = NatsConsumerConfig(durable_name=name, max_ack_pending=10_000)
        began = time.perf_counter()
        await self._js.add_consumer(self._stream, config)
        subscription = await client.subscribe(inbox, future=cast(Any, Sink()))
        for _ in range(2):
            await client.publish(next_messages, half, reply=inbox)
        while seen < count:
            await client.publish(await acks.get(), b"+ACK")
            seen += 1
            if seen % 128 == 0:
                await client.publish(next_messages, half, reply=inbox)
        seconds = time.perf_counter() - began
        await subscription.unsubscribe()
        return _checked(seconds, seen, count)


def _checked(seconds: float, seen: int, count: int) -> float:
    if seen != count:
        raise RuntimeError(f"{seen} messages came instead of {count}")
    return seconds


ROLES: dict[str, type[Role]] = {"caller": Pulling}
ONE_PROCESS = Peer(name="pulls", title="one process", module=__name__, has_workers=False)


def scenarios(short: bool) -> Iterator[Scenario]:
    yield Scenario(
        name="pulling",
        title=f"Messages of {SIZE} bytes pulled from a stream, and acknowledged",
        unit="messages/s",
        baseline=FETCH,
        most=50_000,
        variants=[Variant(name=by, peer=ONE_PROCESS, measure=_measure(by)) for by in (OURS, FETCH, BARE)],
        goals=[
            Goal(text="messages pulled/s, against nats-py's `fetch(256)`", of=OURS, against=FETCH, at_least=1.5),
            Goal(text="messages pulled/s, against a pull on a bare sink", of=OURS, against=BARE, at_least=0.5),
        ],
    )


def _measure(by: str) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        seconds = await team.caller.ask("pull", by=by, count=count)
        return Sample(value=count / seconds, seconds=seconds)

    return measure
