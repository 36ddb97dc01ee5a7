"""``max_running``: at most so many handlers at once, of a worker and of an agent type; nothing waits for itself."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, event, rpc

import natsrt
from natsrt import NatsAgentRuntime, register
from natsrt.agents.chain import Chain
from natsrt.agents.hosted_type import HostedType
from natsrt.embedded import EmbeddedServer
from natsrt.errors import WorkerBusy
from natsrt.hosting import places as places_module
from natsrt.hosting.places import Place, Places
from tests.support.processes import eventually
from tests.support.reading_worker import News

BOUND = 25.0
"""Seconds for what must not wait for ever."""


@dataclass
class Ask:
    text: str
    down: list[str] = field(default_factory=list)
    """The agent types that are called one after the other, each by the handler of the one before."""
    times: int = 1


class Life:
    """What the agents of a test do."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.started: list[str] = []
        self.free = asyncio.Event()

    def begin(self, agent: AgentId, text: str) -> None:
        self.started.append(text)
        for name in (agent.type, "all"):
            self.running[name] += 1
            self.most[name] = max(self.most[name], self.running[name])

    def end(self, agent: AgentId) -> None:
        self.running[agent.type] -= 1
        self.running["all"] -= 1


class Busy(RoutedAgent):
    def __init__(self, life: Life) -> None:
        super().__init__("works")
        self._life = life

    @rpc
    async def on_ask(self, message: Ask, ctx: MessageContext) -> str:
        self._life.begin(self.id, message.text)
        try:
            if message.down:
                below = Ask(message.text, message.down[1:])
                target = AgentId(message.down[0], "below" if message.down[0] != self.id.type else self.id.key)
                calls = (self.send_message(below, target) for _ in range(message.times))
                await asyncio.gather(*calls)
            else:
                await self._life.free.wait()
            return message.text
        finally:
            self._life.end(self.id)

    @event
    async def on_news(self, message: News, ctx: MessageContext) -> None:
        self._life.begin(self.id, str(message.number))
        await self._life.free.wait()
        self._life.end(self.id)


@natsrt.keyed
class KeyedBusy(Busy):
    pass


Make = Callable[..., Any]


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def runtime(
            life: Life | None = None, limits: dict[str, int | None] | None = None, **settings: Any
        ) -> Any:
            made = NatsAgentRuntime(server.url, namespace=namespace, **settings)
            cls = KeyedBusy if settings.get("name") == "keyed" else Busy
            for agent_type, limit in (limits or {}).items():
                assert life is not None
                await register(made, cls, agent_type, lambda: cls(life), max_running=limit)
            return await stack.enter_async_context(made)

        yield runtime


# -- at most so many -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "keyed"])
async def test_a_type_runs_so_many_handlers_at_once_and_the_others_wait(make: Make, name: str) -> None:
    life = Life()
    worker = await make(life, {"a": 3, "b": None}, name=name)
    caller = await make()
    calls = [asyncio.ensure_future(caller.send_message(Ask(str(n)), AgentId("a", f"k{n}"))) for n in range(20)]
    await eventually(lambda: worker.health().messages_queued == 17, 10.0)
    assert (life.running["a"], worker.health().handlers_running) == (3, 3)
    assert worker.health().pending_bytes > 0
    other = asyncio.ensure_future(caller.send_message(Ask("b"), AgentId("b", "k")))
    await eventually(lambda: life.running["b"] == 1)  # another type does not wait
    life.free.set()
    assert await asyncio.gather(*calls) == [str(n) for n in range(20)]
    assert await other == "b"
    assert life.most["a"] == 3
    assert (worker.health().messages_queued, worker.health().pending_bytes) == (0, 0)


async def test_a_worker_runs_so_many_handlers_of_all_types_at_once(make: Make) -> None:
    life = Life()
    worker = await make(life, {"a": None, "b": 1}, max_running=2)
    caller = await make()
    calls = [
        asyncio.ensure_future(caller.send_message(Ask(f"{t}{n}"), AgentId(t, f"k{n}"))) for n in range(6) for t in "ab"
    ]
    await eventually(lambda: worker.health().messages_queued == 10, 10.0)
    life.free.set()
    await asyncio.gather(*calls)
    assert life.most["all"] == 2 and life.most["b"] == 1


async def test_calls_and_events_of_one_agent_keep_their_order_while_they_wait(make: Make) -> None:
    life = Life()
    worker = await make(life, {"a": 1})
    await worker.add_subscription(TypeSubscription("news", "a"))
    caller = await make()
    await eventually(lambda: caller.running.registry.takers("news"))
    calls = []
    for n in range(0, 20, 2):
        calls.append(asyncio.ensure_future(caller.send_message(Ask(str(n)), AgentId("a", "k"))))
        await asyncio.sleep(0)
        await caller.publish_message(News(n + 1), TopicId("news", "k"))
    await eventually(lambda: worker.health().messages_queued == 19, 10.0)
    life.free.set()
    await asyncio.gather(*calls)
    await eventually(lambda: len(life.started) == 20)
    assert life.started == [str(n) for n in range(20)]


async def test_what_waits_is_accepted_and_lives_longer_than_the_caller_would_wait_for_a_lost_worker(make: Make) -> None:
    life = Life()
    worker = await make(life, {"a": 1}, accept_after=0.05)
    caller = await make(check_after=0.1, lost_after=0.5)
    calls = [asyncio.ensure_future(caller.send_message(Ask(str(n)), AgentId("a", "k"))) for n in range(3)]
    log = worker.running.incoming.call_log._running
    await eventually(lambda: len(log) == 3 and all(call.accepted for call in log.values()), 10.0)
    ended, _ = await asyncio.wait(calls, timeout=2.0, return_when=asyncio.FIRST_COMPLETED)  # longer than lost_after
    assert not ended
    assert worker.health().messages_queued == 2
    life.free.set()
    assert await asyncio.gather(*calls) == ["0", "1", "2"]


@pytest.mark.parametrize("how", ["cancelled", "expired"])
@pytest.mark.parametrize("name", ["plain", "keyed"])
async def test_a_call_that_nobody_waits_for_leaves_the_queue(make: Make, name: str, how: str) -> None:
    life = Life()
    worker = await make(life, {"a": 1}, name=name)
    caller = await make()
    first = asyncio.ensure_future(caller.send_message(Ask("first"), AgentId("a", "k")))
    await eventually(lambda: life.running["a"] == 1)
    timeout = 1.0 if how == "expired" else None
    second = asyncio.ensure_future(caller.send_message(Ask("second"), AgentId("a", "other"), timeout=timeout))
    await eventually(lambda: worker.health().messages_queued == 1)
    if how == "cancelled":
        second.cancel()
    with pytest.raises((asyncio.CancelledError, natsrt.CallTimeout)):
        await second
    await eventually(lambda: worker.health().messages_queued == 0)
    life.free.set()
    assert await first == "first"
    assert life.started == ["first"]


async def test_a_call_of_a_caller_that_is_gone_leaves_the_queue_at_its_deadline(
    make: Make, server: EmbeddedServer, namespace: str
) -> None:
    life = Life()
    worker = await make(life, {"a": 1})
    caller = await make()
    first = asyncio.ensure_future(caller.send_message(Ask("first"), AgentId("a", "k")))
    await eventually(lambda: life.running["a"] == 1)
    call = {"specversion": "1.0", "type": "natsrt.call", "id": "1", "source": "/", "subject": "k", "messagetype": "Ask"}
    body = json.dumps({**call, "timeout": "300", "data": {"text": "second"}}).encode()
    client = await nats.connect(server.url)
    await client.publish(f"{namespace}.agent.a", body, reply=client.new_inbox())
    await client.close()
    await eventually(lambda: worker.running.counters.taken_in == 2)
    await eventually(lambda: worker.health().messages_queued == 0)
    life.free.set()
    assert await first == "first"
    assert life.started == ["first"]


async def test_a_full_intake_is_busy_as_ever(make: Make) -> None:
    life = Life()
    worker = await make(life, {"a": 1}, max_pending_bytes=20_000)
    caller = await make(busy_retry=0.2)
    calls = [asyncio.ensure_future(caller.send_message(Ask("x" * 2000), AgentId("a", "k"))) for _ in range(20)]
    await eventually(lambda: sum(call.done() for call in calls) > 5, 10.0)
    life.free.set()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(one) for one in ended} == {str, WorkerBusy}
    assert worker.health().pending_bytes == 0


# -- nothing waits for itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "keyed"])
async def test_a_handler_that_calls_its_own_type_does_not_wait_for_its_own_place(make: Make, name: str) -> None:
    life = Life()
    await make(life, {"a": 1}, name=name)
    caller = await make()
    life.free.set()
    async with asyncio.timeout(BOUND):
        down = Ask("x", ["a", "a", "a"], times=3 if name == "plain" else 1)
        assert await asyncio.gather(*(caller.send_message(down, AgentId("a", "k")) for _ in range(5))) == ["x"] * 5


async def test_of_many_calls_to_its_own_type_one_runs_at_a_time(make: Make) -> None:
    life = Life()
    worker = await make(life, {"a": 1})
    caller = await make()
    call = asyncio.ensure_future(caller.send_message(Ask("x", ["a"], times=8), AgentId("a", "k")))
    await eventually(lambda: worker.health().messages_queued == 7)
    assert life.running["a"] == 2  # the one that waits, and one of its calls
    life.free.set()
    assert await call == "x"
    assert life.most["a"] == 2


async def test_handlers_of_two_limits_that_call_one_another_do_not_wait_for_ever(make: Make) -> None:
    """Each is limited to one on a worker of its own, and both are called from outside at the same moment."""
    life = Life()
    await make(life, {"a": 1})
    await make(life, {"b": 1})
    caller = await make()
    await eventually(lambda: len(caller.running.registry.view.hosts) == 2)
    life.free.set()
    calls = [caller.send_message(Ask("x", ["b", "a", "b"]), AgentId("a", "k")) for _ in range(3)]
    calls += [caller.send_message(Ask("x", ["a", "b", "a"]), AgentId("b", "k")) for _ in range(3)]
    async with asyncio.timeout(BOUND):
        assert await asyncio.gather(*calls) == ["x"] * 6


async def test_two_workers_of_one_limited_type_that_call_it(make: Make) -> None:
    life = Life()
    for name in ("w1", "w2"):
        await make(life, {"a": None}, max_running=1, name=name)
    caller = await make()
    await eventually(lambda: len(caller.running.registry.view.workers) == 2)
    life.free.set()
    async with asyncio.timeout(BOUND):
        calls = [caller.send_message(Ask("x", ["a", "a"]), AgentId("a", f"k{n}")) for n in range(6)]
        assert await asyncio.gather(*calls) == ["x"] * 6


async def test_calls_of_a_limited_type_to_another_are_limited_there(make: Make) -> None:
    life = Life()
    worker = await make(life, {"a": 10, "b": 2})
    caller = await make()
    calls = [asyncio.ensure_future(caller.send_message(Ask("x", ["b"]), AgentId("a", f"k{n}"))) for n in range(10)]
    await eventually(lambda: worker.health().messages_queued == 8, 10.0)
    life.free.set()
    await asyncio.gather(*calls)
    assert (life.most["a"], life.most["b"]) == (10, 2)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "3"])
async def test_a_wrong_limit_is_refused(wrong: Any) -> None:
    runtime = NatsAgentRuntime("nats://127.0.0.1:1")
    with pytest.raises(ValueError, match="max_running must be a whole number of at least 1"):
        await runtime.register_factory("a", lambda: Busy(Life()), max_running=wrong)
    if wrong != "3":
        with pytest.raises(
            natsrt.ConfigurationError, match="max_running: must be a whole number from 1 to [0-9,]* or none"
        ):
            NatsAgentRuntime("nats://127.0.0.1:1", max_running=wrong)


# -- without a server ------------------------------------------------------------------------------------------------


class World:
    """Handlers of some types that start, call one another, and end, in a random order."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.limits = {name: self.chance.choice([None, 1, 2, 3]) for name in "abc"}
        self.whole = self.chance.choice([None, 1, 2, 4])
        self.places = Places(self.whole)
        self.inside: dict[str, list[Place]] = {name: [] for name in "abc"}
        self.arrived: dict[str, list[Place]] = {name: [] for name in "abc"}
        self.roots_in: dict[str, list[Place]] = {name: [] for name in "abc"}
        self.ended = 0

    def type(self, name: str) -> HostedType:
        return HostedType(name, None, None, max_running=self.limits[name])

    async def handle(self, name: str, chain: Chain, depth: int) -> None:
        place = self.places.place(self.type(name), chain)
        if place.limits:
            if not chain:
                self.arrived[name].append(place)
            await self.places.enter(place, name)
        self.inside[name].append(place)
        if not chain and place.limits:
            self.roots_in[name].append(place)
        self.check(place)
        for _ in range(self.chance.randint(0, 2)):
            await asyncio.sleep(0)
        if depth and self.chance.random() < 0.7:
            below = [
                self.handle(self.chance.choice("abc"), (*chain, place.handler_id), depth - 1)
                for _ in range(self.chance.randint(1, 3))
            ]
            await place.call(asyncio.wait_for(asyncio.gather(*below), BOUND)) if place.limits else await asyncio.gather(
                *below
            )
        self.inside[name].remove(place)
        if place.limits:
            self.places.leave(place)
        self.ended += 1

    def check(self, place: Place) -> None:
        """One that enters beyond a limit does so only if all others there await calls, and it belongs to a handler."""
        for limit in place.limits:
            if len(limit.holders) > limit.maximum:
                assert place.chain
                assert sum(not one.awaited for one in limit.holders.values()) <= max(limit.maximum, 1)


@pytest.mark.parametrize("seed", range(150))
async def test_random_schedules_end_and_keep_the_limits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module, "_CIRCLE_AFTER", 0.01)
    monkeypatch.setattr(places_module, "_SOON", 0.001)
    world = World(seed)
    roots = [world.handle(world.chance.choice("abc"), (), world.chance.randint(0, 3)) for _ in range(20)]
    async with asyncio.timeout(BOUND):
        await asyncio.gather(*roots)
    assert world.places.waiting == 0 and world.places._timer is None
    for name in "abc":
        assert world.roots_in[name] == world.arrived[name]  # in order
    assert all(not limit.holders and limit.active == 0 for limit in world.places._types.values())


async def test_a_wait_that_is_cancelled_at_any_moment_leaves_nothing_behind() -> None:
    for cancel_at in range(6):
        places = Places(1)
        hosted = HostedType("a", None, None)
        first, second, third = (places.place(hosted, ()) for _ in range(3))
        await places.enter(first, "a")
        waits = [asyncio.ensure_future(places.enter(place, "a")) for place in (second, third)]
        for at in range(6):
            if at == 3:
                places.leave(first)
            if at == cancel_at:
                waits[0].cancel()
            await asyncio.sleep(0)
        if waits[0].cancelled():
            await waits[1]
            places.leave(third)
        else:
            places.leave(second)
            await waits[1]
            places.leave(third)
        assert places.waiting == 0 and places._worker is not None and not places._worker.holders
