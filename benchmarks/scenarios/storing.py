"""Messages per second that a stream has confirmed: events of natsrt on a durable topic, and messages of nats-py."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import nats
from autogen_core import MessageContext, RoutedAgent, TopicId, TypeSubscription, message_handler

from benchmarks.harness import Goal, Measure, Sample, Scenario, Variant
from benchmarks.peers import Peer
from benchmarks.roles import Role
from benchmarks.teams import Team
from natsrt import NatsAgentRuntime

OURS, BARE, IN_TASKS = "natsrt", "nats-py", "nats-py, a task for each"
PLAIN, KEYED = "agents", "keyed agents, states stored"
SIZE = 200
"""Characters of the text in a message."""
_AT_ONCE = 1_000
"""Events that are under way while those are stored that are handled later."""
_GIVE_UP = 120.0
"""Time limit of one turn in seconds."""
_TOPIC = TopicId("stored.lines", "k")
_SOURCES = 64
"""Sources of the events that are handled, and so the number of agents."""


@dataclass
class Line:
    """A message of about `SIZE` bytes."""

    text: str


class _Counter:
    """Counts what the agents of one turn handle. ``all`` is set when it is ``wanted`` events."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.handled = 0
        self.all = asyncio.Event()


class _Reads(RoutedAgent):
    def __init__(self, counter: _Counter) -> None:
        super().__init__("reads")
        self._counter = counter

    @message_handler
    async def on_line(self, message: Line, ctx: MessageContext) -> None:
        self._counter.handled += 1
        if self._counter.handled == self._counter.wanted:
            self._counter.all.set()

    async def save_state(self) -> Mapping[str, Any]:
        return {}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        pass


class Storing(Role):
    """Publishes messages to a stream, and waits until each is confirmed."""

    async def start(self) -> None:
        space = self.place.namespace
        self._client = await nats.connect(self.place.address)
        self._js = self._client.jetstream(timeout=10)
        self._stream = f"stored_{space}"
        await self._js.add_stream(name=self._stream, subjects=[f"{self._stream}.>"])
        self._runtime = NatsAgentRuntime(self.place.address, namespace=space, durable=["stored."])
        await self._runtime.start()
        self._types = 0

    async def stop(self) -> None:
        await self._js.delete_stream(self._stream)
        await self._runtime.close()
        await self._client.close()

    async def store(self, by: str, count: int, at_once: int) -> float:
        """Publish ``count`` messages, with up to ``at_once`` of them under way. Returns the seconds."""
        line = Line("x" * SIZE)
        body = b"x" * SIZE
        gc.collect()

        async def one() -> None:
            if by == OURS:
                await self._runtime.publish_message(line, _TOPIC)
            elif by == IN_TASKS:
                await (await self._js.publish_async(f"{self._stream}.a", body))
            else:
                await self._js.publish(f"{self._stream}.a", body)

        began = time.perf_counter()
        async with asyncio.timeout(_GIVE_UP):
            if at_once == 1:
                for _ in range(count):
                    await one()
            elif by != BARE:
                for start in range(0, count, at_once):
                    await asyncio.gather(*(one() for _ in range(min(at_once, count - start))))
            else:
                for start in range(0, count, at_once):
                    many = range(min(at_once, count - start))
                    await asyncio.gather(*[await self._js.publish_async(f"{self._stream}.a", body) for _ in many])
        return time.perf_counter() - began

    async def handle(self, by: str, count: int) -> float:
        """Store ``count`` events, and let the agents of a new type handle them. Returns the seconds of that.

        Raises:
            RuntimeError: They were not handled once each.
        """
        self._types += 1
        agent_type, counter = f"reads{self._types}", _Counter(count)
        topics = [TopicId(f"stored.{agent_type}", f"k{number}") for number in range(_SOURCES)]
        for start in range(0, count, _AT_ONCE):
            numbers = range(start, min(count, start + _AT_ONCE))
            line = Line("x" * SIZE)
            await asyncio.gather(*(self._runtime.publish_message(line, topics[n % _SOURCES]) for n in numbers))
        gc.collect()
        async with NatsAgentRuntime(self.place.address, namespace=self.place.namespace) as worker:
            began = time.perf_counter()
            await worker.register_factory(
                agent_type,
                lambda: _Reads(counter),
                expected_class=_Reads,
                keyed=True if by == KEYED else None,
                start_from="all",
            )
            await worker.add_subscription(TypeSubscription(topics[0].type, agent_type))
            async with asyncio.timeout(_GIVE_UP):
                await counter.all.wait()
            seconds = time.perf_counter() - began
        if counter.handled != count:
            raise RuntimeError(f"{counter.handled} events were handled instead of {count}")
        return seconds


ROLES: dict[str, type[Role]] = {"caller": Storing}
ONE_PROCESS = Peer(name="stores", title="one process", module=__name__, has_workers=False)


def scenarios(short: bool) -> Iterator[Scenario]:
    for at_once, way, peers in ((1, "publish", (BARE,)), (1_000, "publish_async", (BARE, IN_TASKS))):
        yield Scenario(
            name=f"storing-{at_once}",
            title=f"Events on a durable topic that are stored, {at_once:,} at a time",
            unit="messages/s",
            baseline=BARE,
            most=50_000,
            variants=[Variant(name=by, peer=ONE_PROCESS, measure=_storing(by, at_once)) for by in (OURS, *peers)],
            goals=[
                Goal(
                    text=f"events stored/s, {at_once:,} at a time, against `{way}` of {by}",
                    of=OURS,
                    against=by,
                    at_least=0.8,
                )
                for by in peers
            ],
        )

    yield Scenario(
        name="handling",
        title=f"Events on a durable topic that are handled and acknowledged, for {_SOURCES} agents",
        unit="events/s",
        baseline=PLAIN,
        most=20_000,
        variants=[Variant(name=by, peer=ONE_PROCESS, measure=_handling(by)) for by in (PLAIN, KEYED)],
    )


def _handling(by: str) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        seconds = await team.caller.ask("handle", by=by, count=count)
        return Sample(value=count / seconds, seconds=seconds)

    return measure


def _storing(by: str, at_once: int) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        seconds = await team.caller.ask("store", by=by, count=count, at_once=at_once)
        return Sample(value=count / seconds, seconds=seconds)

    return measure
