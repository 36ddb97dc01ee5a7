"""Handlers of keyed agents that do not wait for their turn: `natsrt.out_of_turn`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import nats
import pytest
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    SingleThreadedAgentRuntime,
    TopicId,
    TypeSubscription,
    event,
    message_handler,
    rpc,
)

import natsrt
from natsrt import DurableTopics, KeyedOptions, NatsAgentRuntime, StateConflict
from natsrt.embedded import EmbeddedServer
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER
from tests.support.processes import eventually

AGENT = AgentId("worker", "k")


@dataclass
class Work:
    pass


@dataclass
class Add:
    amount: int = 1


@dataclass
class Pause:
    pass


@dataclass
class Tell:
    pass


@dataclass
class CallYourself:
    pass


@dataclass
class Wait:
    pass


@dataclass
class Said:
    text: str


class Scene:
    """What the agents of one test share with it."""

    def __init__(self) -> None:
        self.paused = asyncio.Event()
        self.let_load = asyncio.Event()
        self.let_load.set()
        self.let_go = asyncio.Event()
        self.begun: list[str] = []
        self.places: list[str] = []


@natsrt.keyed
class Worker(RoutedAgent):
    """Works until it is paused."""

    def __init__(self, scene: Scene, where: str = "") -> None:
        super().__init__("works until it is paused")
        self.scene, self.where, self.value, self.inside = scene, where, 0, 0

    async def close(self) -> None:
        self.scene.begun.append("closed")

    async def save_state(self) -> Mapping[str, Any]:
        return {"value": self.value}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]

    @message_handler
    async def work(self, message: Work, ctx: MessageContext) -> Said:
        self.inside += 1
        self.scene.begun.append("work")
        await self.scene.paused.wait()
        assert self.inside == 1
        self.inside -= 1
        return Said("paused")

    @message_handler
    async def add(self, message: Add, ctx: MessageContext) -> Said:
        assert not self.inside
        self.value += message.amount
        return Said(str(self.value))

    @natsrt.out_of_turn
    @message_handler
    async def pause(self, message: Pause, ctx: MessageContext) -> Said:
        self.value += 100
        self.scene.places.append(self.where)
        self.scene.paused.set()
        return Said(f"pausing {self.inside}")

    @natsrt.streaming
    @natsrt.out_of_turn
    async def tell(self, message: Tell, ctx: MessageContext) -> AsyncGenerator[Said, None]:
        yield Said("busy" if self.inside else "idle")
        yield Said(str(self.value))

    @rpc
    @natsrt.out_of_turn
    async def call_yourself(self, message: CallYourself, ctx: MessageContext) -> Said:
        self.scene.begun.append("calling")
        said: Said = await self.send_message(Add(5), self.id)
        return said

    @natsrt.out_of_turn
    @rpc
    async def wait(self, message: Wait, ctx: MessageContext) -> Said:
        self.scene.begun.append("wait")
        await self.scene.let_go.wait()
        return Said("went")


class Place:
    def __init__(self, url: str, namespace: str, stack: AsyncExitStack) -> None:
        self.url, self.namespace, self._stack, self.scene = url, namespace, stack, Scene()

    async def runtime(self, *, hosts: str | None = None, **settings: Any) -> NatsAgentRuntime:
        max_running = settings.pop("max_running", None)
        made = NatsAgentRuntime(self.url, namespace=self.namespace, **settings)
        if hosts is not None:
            where = hosts

            async def factory() -> Worker:
                await self.scene.let_load.wait()
                return Worker(self.scene, where)

            await made.register_factory("worker", factory, expected_class=Worker, max_running=max_running)
            await made.add_subscription(TypeSubscription("orders", "worker"))
        return await self._stack.enter_async_context(made)


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(server.url, namespace, stack)


async def begin(place: Place, caller: NatsAgentRuntime) -> asyncio.Task[Any]:
    working = asyncio.ensure_future(caller.send_message(Work(), AGENT))
    await eventually(lambda: place.scene.begun == ["work"])
    return working


async def test_it_reaches_an_agent_that_is_busy(place: Place) -> None:
    await place.runtime(hosts="one")
    caller = await place.runtime()
    working = await begin(place, caller)
    added = asyncio.ensure_future(caller.send_message(Add(), AGENT))
    assert await caller.send_message(Pause(), AGENT) == Said("pausing 1")
    assert await working == Said("paused")
    assert await added == Said("101")


async def test_it_reaches_an_agent_that_is_just_being_made(place: Place) -> None:
    place.scene.let_load.clear()
    await place.runtime(hosts="one")
    caller = await place.runtime()
    working = asyncio.ensure_future(caller.send_message(Work(), AGENT))
    await asyncio.sleep(0)
    pausing = asyncio.ensure_future(caller.send_message(Pause(), AGENT))
    await asyncio.sleep(0.2)
    place.scene.let_load.set()
    async with asyncio.timeout(10):
        assert (await pausing).text.startswith("pausing")
        assert await working == Said("paused")


async def test_it_makes_an_agent_that_does_not_live(place: Place) -> None:
    await place.runtime(hosts="one")
    caller = await place.runtime()
    assert await caller.send_message(Pause(), AGENT) == Said("pausing 0")


async def test_it_is_forwarded_to_the_owner(place: Place) -> None:
    workers = [await place.runtime(hosts=name) for name in ("one", "two")]
    working = await begin(place, workers[0])
    connection = await nats.connect(place.url)
    try:  # a plain request comes to any worker of the type
        for _ in range(6):
            headers = {KEY_HEADER: "k", TYPE_HEADER: "Pause"}
            reply = await connection.request(f"{place.namespace}.agent.worker", b"{}", timeout=10, headers=headers)
            assert b"pausing" in reply.data
    finally:
        await connection.close()
    assert await working == Said("paused")
    assert len(set(place.scene.places)) == 1


@pytest.mark.parametrize("name", ["Pause", f"{Pause.__module__}.Pause"])
async def test_a_plain_message_is_recognised_by_either_name_of_its_class(place: Place, name: str) -> None:
    worker = await place.runtime(hosts="one")
    working = await begin(place, worker)
    connection = await nats.connect(place.url)
    try:
        headers = {KEY_HEADER: "k", TYPE_HEADER: name}
        reply = await connection.request(f"{place.namespace}.agent.worker", b"{}", timeout=5, headers=headers)
    finally:
        await connection.close()
    assert b"pausing 1" in reply.data
    await working


async def test_beside_concurrent_handlers_it_is_one_of_them(place: Place) -> None:
    runtime = NatsAgentRuntime(place.url, namespace=place.namespace)
    options = KeyedOptions(concurrency="concurrent")
    await runtime.register_factory("worker", lambda: Worker(place.scene), expected_class=Worker, keyed=options)
    async with runtime:
        working = await begin(place, runtime)
        assert await runtime.send_message(Pause(), AGENT) == Said("pausing 1")
        assert await working == Said("paused")


async def test_an_event_of_a_durable_topic_takes_its_turn(place: Place) -> None:
    durable = [DurableTopics("orders")]
    await place.runtime(hosts="one", durable=durable)
    caller = await place.runtime(durable=durable)
    working = await begin(place, caller)
    await caller.publish_message(Pause(), TopicId("orders", "k"))
    await asyncio.sleep(1.0)
    assert not place.scene.places  # it waits for the handler that has the turn
    await caller.send_message(Pause(), AGENT)
    await working
    await eventually(lambda: len(place.scene.places) == 2)


async def test_what_it_waits_for_is_let_in_while_the_worker_stops(place: Place) -> None:
    worker = await place.runtime(hosts="one")
    caller = await place.runtime()
    working = await begin(place, caller)
    calling = asyncio.ensure_future(caller.send_message(CallYourself(), AGENT))
    await eventually(lambda: "calling" in place.scene.begun)
    stopping = asyncio.ensure_future(worker.stop())
    await asyncio.sleep(0.2)
    place.scene.paused.set()
    async with asyncio.timeout(10):
        assert await working == Said("paused")
        assert await calling == Said("5")
        await stopping


async def test_as_an_event_it_does_not_wait_either(place: Place) -> None:
    await place.runtime(hosts="one")
    caller = await place.runtime()
    working = await begin(place, caller)
    await caller.publish_message(Pause(), TopicId("orders", "k"))
    async with asyncio.timeout(10):
        assert await working == Said("paused")


async def test_nothing_is_stored_after_it_but_with_the_next_turn(place: Place) -> None:
    await place.runtime(hosts="one")
    caller = await place.runtime()
    await caller.send_message(Add(), AGENT)

    async def stored() -> bytes | None:
        record = await caller.running.records.read(AGENT)
        assert record is not None
        return record.body

    before = await stored()
    await caller.send_message(Pause(), AGENT)
    assert await stored() == before
    assert await caller.send_message(Add(), AGENT) == Said("102")
    after = await stored()
    assert after != before and b"102" in after


async def test_a_limit_of_running_handlers_does_not_keep_it_out(place: Place) -> None:
    await place.runtime(hosts="one", max_running=1)
    caller = await place.runtime()
    working = await begin(place, caller)
    async with asyncio.timeout(10):
        assert await caller.send_message(Pause(), AGENT) == Said("pausing 1")
        assert await working == Said("paused")


async def test_it_may_stream(place: Place) -> None:
    await place.runtime(hosts="one")
    caller = await place.runtime()
    working = await begin(place, caller)
    async with asyncio.timeout(10):
        assert [item async for item in caller.stream_message(Tell(), AGENT)] == [Said("busy"), Said("0")]
    place.scene.paused.set()
    await working


async def test_what_it_waits_for_takes_its_turn(place: Place) -> None:
    await place.runtime(hosts="one")
    caller = await place.runtime()
    working = await begin(place, caller)
    calling = asyncio.ensure_future(caller.send_message(CallYourself(), AGENT))
    await eventually(lambda: "calling" in place.scene.begun)
    await asyncio.sleep(0.2)  # if the call were let in, `add` would fail by now
    assert not calling.done()
    place.scene.paused.set()
    async with asyncio.timeout(10):
        assert await working == Said("paused")
        assert await calling == Said("5")


async def test_a_worker_that_stops_lets_it_end(place: Place) -> None:
    worker = await place.runtime(hosts="one")
    caller = await place.runtime()
    waiting = asyncio.ensure_future(caller.send_message(Wait(), AGENT))
    await eventually(lambda: place.scene.begun == ["wait"])
    stopping = asyncio.ensure_future(worker.stop())
    await asyncio.sleep(0.2)
    assert not stopping.done()
    place.scene.let_go.set()
    assert await waiting == Said("went")
    await stopping


async def test_it_does_not_answer_for_an_instance_that_was_dropped_meanwhile(place: Place) -> None:
    worker = await place.runtime(hosts="one")
    caller = await place.runtime()
    waiting = asyncio.ensure_future(caller.send_message(Wait(), AGENT))
    await eventually(lambda: place.scene.begun == ["wait"])
    present = await caller.running.records.read(AGENT)
    assert present is not None
    await caller.running.records.write_state(AGENT, b'{"value": 7}', expected=present)
    worker.running.ownership.doubt()
    await eventually(lambda: place.scene.begun == ["wait", "closed"])
    place.scene.let_go.set()
    with pytest.raises(StateConflict):
        await waiting


async def test_a_type_that_is_not_keyed_is_as_before(place: Place) -> None:
    runtime = NatsAgentRuntime(place.url, namespace=place.namespace)
    await runtime.register_factory("worker", lambda: Worker(place.scene), expected_class=Worker, keyed=False)
    async with runtime:
        assert await runtime.send_message(Pause(), AGENT) == Said("pausing 0")


async def test_in_autogens_own_runtime_it_has_no_effect(place: Place) -> None:
    runtime = SingleThreadedAgentRuntime()
    await Worker.register(runtime, "worker", lambda: Worker(place.scene))
    runtime.start()
    assert await runtime.send_message(Pause(), AGENT) == Said("pausing 0")
    await runtime.stop()


def marked(first: bool, second: bool) -> type[RoutedAgent]:
    def decorated(is_marked: bool, handler: Any) -> Any:
        return natsrt.out_of_turn(handler) if is_marked else handler

    async def one(self: Any, message: Pause, ctx: MessageContext) -> None: ...

    async def two(self: Any, message: Pause, ctx: MessageContext) -> None: ...

    one.__annotations__ = two.__annotations__ = {"message": Pause, "ctx": MessageContext, "return": type(None)}
    members = {"one": decorated(first, event(one)), "two": decorated(second, rpc(two))}
    return type("Marked", (RoutedAgent,), members)


@pytest.mark.parametrize("first", [True, False])
async def test_handlers_of_one_type_are_all_out_of_turn_or_none(place: Place, first: bool) -> None:
    runtime = NatsAgentRuntime(place.url, namespace=place.namespace)
    with pytest.raises(TypeError, match="the handlers of Pause in Marked must all be out of turn, or none"):
        await runtime.register_factory(
            "marked", lambda: None, expected_class=marked(first, not first), keyed=KeyedOptions()
        )
    for both in (True, False):
        await runtime.register_factory(f"marked{both}", lambda: None, expected_class=marked(both, both))
