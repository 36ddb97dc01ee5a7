"""Items of streams per second, the first item, and memory with a slow consumer: from one process to another."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import nats
import orjson
from autogen_core import AgentId, MessageContext, RoutedAgent
from nats.aio.msg import Msg

import natsrt
from benchmarks.harness import LESS, Goal, Measure, Sample, Scenario, Variant
from benchmarks.peers import Peer
from benchmarks.roles import ForgetfulRole, Role
from benchmarks.teams import Team
from benchmarks.work import Text, encoded
from natsrt import NatsAgentRuntime

RAW, PLAIN, KEYED = "raw publish", "streams", "keyed"
SIZES = (10, 1_000, 10_000, 100_000)
"""Characters of the text in an item."""
WINDOWS = (16, 256, 4_096)
"""Items; the largest one has more bytes, too."""
_BYTES = {16: 1024 * 1024, 256: 1024 * 1024, 4_096: 16 * 1024 * 1024}
"""``window_bytes`` of each window."""
_DIGITS = 10
"""An item ends with its number, in so many digits."""
_GIVE_UP = 240.0
"""Time limit of one turn in seconds."""
_SHORT = 10
"""Items of a short stream."""


@dataclass
class Produce:
    """Asks for ``count`` items with ``size`` characters each."""

    count: int
    size: int


class Producer(RoutedAgent):
    """Sends the items that it is asked for."""

    def __init__(self) -> None:
        super().__init__("produces")

    @natsrt.streaming
    async def on_produce(self, message: Produce, ctx: MessageContext) -> AsyncGenerator[Text, None]:
        start = "x" * (message.size - _DIGITS)
        for number in range(message.count):
            yield Text(f"{start}{number:0{_DIGITS}d}")

    async def save_state(self) -> Mapping[str, Any]:
        return {}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        pass


class Sends(ForgetfulRole):
    """Hosts the agents, and publishes the same items without natsrt."""

    async def start(self) -> None:
        space = self.place.namespace
        self._client = await nats.connect(self.place.address)
        await self._client.subscribe(f"raw.{space}", cb=self._publish)
        await self._client.flush()
        self._runtime = NatsAgentRuntime(self.place.address, namespace=space)
        await self._runtime.register_factory(PLAIN, Producer, expected_class=Producer)
        await self._runtime.register_factory(KEYED, Producer, expected_class=Producer, keyed=True)
        await self._runtime.start()

    async def stop(self) -> None:
        await self._runtime.close()
        await self._client.close()

    async def _publish(self, message: Msg) -> None:
        wanted = Produce(**orjson.loads(message.data))
        start = "x" * (wanted.size - _DIGITS)
        for number in range(wanted.count):
            await self._client.publish(message.reply, encoded(Text(f"{start}{number:0{_DIGITS}d}")))


class Reads(ForgetfulRole):
    """Reads the items, and checks that they are complete and in order."""

    async def start(self) -> None:
        self._client = await nats.connect(self.place.address)
        self._runtime = NatsAgentRuntime(self.place.address, namespace=self.place.namespace)
        await self._runtime.start()

    async def stop(self) -> None:
        await self._runtime.close()
        await self._client.close()

    async def rate(self, of: str, count: int, size: int, window: int, streams: int = 1) -> float:
        """Read ``count`` items from ``streams`` streams at once. Returns the seconds."""
        gc.collect()
        began = time.perf_counter()
        async with asyncio.timeout(_GIVE_UP):
            if of == RAW:
                await self._raw(Produce(count, size))
            else:
                each = Produce(count // streams, size)
                await asyncio.gather(*(self._stream(AgentId(of, f"{n}"), each, window) for n in range(streams)))
        return time.perf_counter() - began

    async def _stream(self, agent: AgentId, wanted: Produce, window: int, pause: float = 0) -> None:
        number = 0
        async with self._runtime.stream_message(wanted, agent, window=window, window_bytes=_BYTES[window]) as stream:
            async for item in stream:
                _check(int(item.content[-_DIGITS:]), number)
                number += 1
                if pause:
                    await asyncio.sleep(pause)
        _check(number, wanted.count)

    async def _raw(self, wanted: Produce) -> None:
        inbox, number, all_came = self._client.new_inbox(), 0, asyncio.Event()

        async def arrived(message: Msg) -> None:
            nonlocal number
            _check(int(message.data[-2 - _DIGITS : -2]), number)
            number += 1
            if number == wanted.count:
                all_came.set()

        # Without limits: what arrives faster than it is handled would be dropped.
        items = await self._client.subscribe(inbox, cb=arrived, pending_msgs_limit=-1, pending_bytes_limit=-1)
        await asyncio.sleep(0)
        await self._client.flush()
        body = orjson.dumps(wanted)
        await self._client.publish(f"raw.{self.place.namespace}", body, reply=inbox)
        await all_came.wait()
        await items.unsubscribe()

    async def first(self, how: str, count: int) -> float:
        """Make ``count`` calls, one after the other. Returns the median of the seconds until something came."""
        wanted, took, agent = Produce(1, 100), [], AgentId(PLAIN, "0")
        gc.collect()
        for _ in range(count):
            began = time.perf_counter()
            if how == _CALL:
                await self._runtime.send_message(wanted, agent)
                took.append(time.perf_counter() - began)
            else:
                async with self._runtime.stream_message(wanted, agent) as stream:
                    async for _ in stream:
                        if how == _FIRST:
                            took.append(time.perf_counter() - began)
                    if how == _ALL:
                        took.append(time.perf_counter() - began)
        return statistics.median(took)

    async def short(self, how: str, of: str, count: int, concurrency: int) -> float:
        """Make ``count`` calls to ``concurrency`` agents, one after the other at each. Returns the seconds."""
        wanted, left = Produce(_SHORT, 100), iter(range(count))

        async def read(agent: AgentId) -> None:
            for _ in left:
                if how == _CALL:
                    await self._runtime.send_message(wanted, agent)
                else:
                    await self._stream(agent, wanted, 256)

        gc.collect()
        began = time.perf_counter()
        async with asyncio.timeout(_GIVE_UP):
            await asyncio.gather(*(read(AgentId(of, f"{number}")) for number in range(concurrency)))
        return time.perf_counter() - began

    async def slow(self, count: int, size: int, pause: float) -> None:
        """Read a stream, with ``pause`` seconds after each item."""
        await self._stream(AgentId(PLAIN, "0"), Produce(count, size), 256, pause)


def _check(number: int, expected: int) -> None:
    if number != expected:
        raise RuntimeError(f"item {number} came in the place of item {expected}")


_CALL, _FIRST, _ALL = "a call", "first item of a stream", "end of a stream of one item"
ROLES: dict[str, type[Role]] = {"worker": Sends, "caller": Reads}
TWO_PROCESSES = Peer(name="streams", title="two processes", module=__name__)


def scenarios(short: bool) -> Iterator[Scenario]:
    for size in SIZES:
        yield Scenario(
            name=f"streams-{size}",
            title=f"Items of a stream with {size:,} bytes of text",
            unit="items/s",
            baseline=RAW,
            most=100_000,
            variants=[_row(RAW, _rate(RAW, size, 256))]
            + [_row(f"window of {window:,}", _rate(PLAIN, size, window)) for window in WINDOWS],
        )
    yield Scenario(
        name="streams-many",
        title="Items of 1,000 streams at once, with 100 bytes of text",
        unit="items/s",
        baseline="1 stream",
        most=100_000,
        multiple=1_000,
        first=1,
        variants=[
            _row("1 stream", _rate(PLAIN, 100, 256)),
            _row("1,000 streams", _rate(PLAIN, 100, 256, streams=1_000)),
        ],
    )
    yield Scenario(
        name="streams-keyed",
        title="Items of a stream from a keyed agent, with 100 bytes of text",
        unit="items/s",
        baseline="not keyed",
        most=100_000,
        variants=[_row("not keyed", _rate(PLAIN, 100, 256)), _row(KEYED, _rate(KEYED, 100, 256))],
    )
    yield Scenario(
        name="streams-first",
        title="One caller: time until the first item",
        unit="ms",
        better=LESS,
        baseline=_CALL,
        most=5_000,
        variants=[_row(how, _first(how)) for how in (_CALL, _FIRST, _ALL)],
        goals=[Goal(text="first item of a stream against a plain call", of=_FIRST, against=_CALL, at_most=1.5)],
    )
    yield Scenario(
        name="streams-short",
        title=f"Streams of {_SHORT} items, 64 at a time",
        unit="streams/s",
        baseline=_CALL,
        most=20_000,
        multiple=64,
        first=1,
        variants=[
            _row(_CALL, _brief(_CALL, PLAIN)),
            _row("a stream", _brief(_ALL, PLAIN)),
            _row("a call, keyed", _brief(_CALL, KEYED)),
            _row("a stream, keyed", _brief(_ALL, KEYED)),
        ],
    )
    yield Scenario(
        name="streams-memory",
        title="Memory beyond that of a stream of one item: 200 MB are read at 10 MB/s or less",
        unit="MB",
        better=LESS,
        fresh=True,
        rounds=3,
        variants=[_row(who, _memory(who, 100 if short else 20_000)) for who in ("worker", "caller")],
        goals=[
            Goal(text=f"memory of the {who} with a slow consumer, MB", of=who, at_most=8.0)
            for who in ("worker", "caller")
        ],
    )


def _row(name: str, measure: Measure) -> Variant:
    return Variant(name=name, peer=TWO_PROCESSES, measure=measure)


def _rate(of: str, size: int, window: int, streams: int = 1) -> Measure:
    return _timed("rate", of=of, size=size, window=window, streams=streams)


def _brief(how: str, of: str) -> Measure:
    return _timed("short", how=how, of=of, concurrency=64)


def _timed(command: str, **arguments: Any) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        before = team.cpu()
        seconds = await team.caller.ask(command, count=count, **arguments)
        return Sample(value=count / seconds, seconds=seconds, cpu=team.cpu().per_message(before, count))

    return measure


def _first(how: str) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        seconds = await team.caller.ask("first", how=how, count=count)
        return Sample(value=seconds * 1e3, seconds=seconds * count)

    return measure


def _memory(who: str, count: int) -> Measure:
    async def measure(team: Team, _: int) -> Sample:
        member = team.workers[0] if who == "worker" else team.caller
        await team.caller.ask("slow", count=1, size=10_000, pause=0)
        before = await member.ask("forget_peak")
        await team.caller.ask("slow", count=count, size=10_000, pause=0.001)
        return Sample(value=(await member.ask("peak_memory") - before) / 1e6)

    return measure
