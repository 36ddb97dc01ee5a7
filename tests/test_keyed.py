"""Keyed agents: one live instance per id over all workers, one message at a time, with saved state."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import nats
import pytest
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    message_handler,
)
from autogen_core.exceptions import NotAccessibleError

import natsrt
from natsrt import KeyedOptions, NatsAgentRuntime, keyed
from natsrt.embedded import EmbeddedServer
from natsrt.keyed import slots
from natsrt.wire.envelope import KEY_HEADER
from tests.support.clients import settled
from tests.support.processes import eventually


@dataclass
class Add:
    amount: int = 1


@dataclass
class Total:
    value: int
    worker: str


@dataclass
class Hold:
    name: str


@dataclass
class Ask:
    via: str


class Life:
    """What the agents of one test did, on whichever runtime."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []
        self.closed: list[tuple[str, str]] = []
        self.inside: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.handled: list[tuple[str, str, Any]] = []
        self.gates: dict[str, asyncio.Event] = {}

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())


@keyed
class Counting(RoutedAgent):
    """Adds up, and writes down what happens to it."""

    def __init__(self, life: Life, worker: str) -> None:
        super().__init__("adds up")
        self.life, self.worker, self.value = life, worker, 0
        life.made.append((str(self.id), worker))

    async def close(self) -> None:
        self.life.closed.append((str(self.id), self.worker))

    async def save_state(self) -> Mapping[str, Any]:
        return {"value": self.value}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]

    def _enter(self, message: Any) -> None:
        name = str(self.id)
        self.life.handled.append((name, self.worker, message))
        self.life.inside[name] += 1
        self.life.most[name] = max(self.life.most[name], self.life.inside[name])

    @message_handler
    async def on_add(self, message: Add, ctx: MessageContext) -> Total:
        self._enter(message)
        before = self.value
        await asyncio.sleep(0)
        self.value = before + message.amount
        self.life.inside[str(self.id)] -= 1
        return Total(self.value, self.worker)

    @message_handler
    async def on_hold(self, message: Hold, ctx: MessageContext) -> Total:
        self._enter(message)
        self.life.gate(f"{message.name} began").set()
        await self.life.gate(message.name).wait()
        self.life.inside[str(self.id)] -= 1
        return Total(self.value, self.worker)

    @message_handler
    async def on_ask(self, message: Ask, ctx: MessageContext) -> Total:
        """Calls another agent, which calls this one."""
        self._enter(message)
        total: Total = await self.send_message(Add(10), AgentId.from_str(message.via))
        self.life.inside[str(self.id)] -= 1
        return total


class Relay(RoutedAgent):
    """Not keyed: gives on what it gets to the agent that its own key names."""

    def __init__(self) -> None:
        super().__init__("gives on")

    @message_handler
    async def on_add(self, message: Add, ctx: MessageContext) -> Total:
        total: Total = await self.send_message(message, AgentId("counting", self.id.key), cancellation_token=None)
        return total


class Place:
    """Runtimes of one namespace that end with the test."""

    def __init__(self, url: str, namespace: str, stack: AsyncExitStack) -> None:
        self.url, self.namespace, self._stack = url, namespace, stack
        self.life = Life()

    async def caller(self, **settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.url, namespace=self.namespace, name="caller", **settings)
        return await self._stack.enter_async_context(runtime)

    async def worker(
        self, name: str, options: KeyedOptions | None = None, agent_type: str = "counting", **settings: Any
    ) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.url, namespace=self.namespace, name=name, **settings)
        await runtime.register_factory(
            agent_type, lambda: Counting(self.life, name), expected_class=Counting, keyed=options
        )
        await runtime.add_subscription(TypeSubscription("numbers", agent_type))
        return await self._stack.enter_async_context(runtime)


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(server.url, namespace, stack)


def agent(key: str) -> AgentId:
    return AgentId("counting", key)


async def test_every_key_has_one_instance_over_all_workers(place: Place) -> None:
    for name in ("w1", "w2", "w3"):
        await place.worker(name)
    callers = [await place.caller() for _ in range(4)]
    keys = [f"k{number}" for number in range(50)]
    totals = await asyncio.gather(*(caller.send_message(Add(), agent(key)) for key in keys for caller in callers))
    assert Counter(str(agent(key)) for key in keys) == Counter(name for name, _ in place.life.made)
    assert Counter(total.value for total in totals) == {1: 50, 2: 50, 3: 50, 4: 50}


async def test_ownership_is_spread_over_the_workers(place: Place) -> None:
    for name in ("w1", "w2", "w3"):
        await place.worker(name)
    caller = await place.caller()
    await asyncio.gather(*(caller.send_message(Add(), agent(f"k{number}")) for number in range(60)))
    owned = Counter(worker for _, worker in place.life.made)
    assert len(owned) == 3
    assert min(owned.values()) >= 5


async def test_calls_and_events_of_one_sender_come_in_order_from_the_very_first_message(place: Place) -> None:
    for name in ("w1", "w2", "w3"):
        await place.worker(name)
    caller = await place.caller()
    calls = []
    for number in range(300):
        if number % 3:
            await caller.publish_message(Add(number), TopicId("numbers", f"k{number % 7}"))
        else:
            calls.append(asyncio.ensure_future(caller.send_message(Add(number), agent(f"k{number % 7}"))))
            await asyncio.sleep(0)
    await asyncio.gather(*calls)
    await eventually(lambda: len(place.life.handled) == 300)
    for key in range(7):
        numbers = [m.amount for name, _, m in place.life.handled if name == f"counting/k{key}"]
        assert numbers == sorted(numbers)
    assert len(place.life.made) == 7


async def test_an_event_reaches_each_keyed_agent_once_also_from_a_raw_publisher(place: Place) -> None:
    for name in ("w1", "w2", "w3"):
        await place.worker(name)
    caller = await place.caller()
    client = await nats.connect(place.url)
    try:
        for number in range(30):
            await caller.publish_message(Add(number), TopicId("numbers", f"k{number % 5}"))
            subject = f"{place.namespace}.topic.numbers.k{number % 5}"
            await client.publish(subject, json.dumps({"amount": 1000 + number}).encode())
        await settled(client)
        await eventually(lambda: len(place.life.handled) >= 60)
        await asyncio.gather(*(caller.send_message(Add(0), agent(f"k{key}")) for key in range(5)))
        handled = Counter(message.amount for _, _, message in place.life.handled if message.amount)
        assert handled == Counter([*range(1, 30), *range(1000, 1030)])
        assert len(place.life.made) == 5
    finally:
        await client.close()


async def test_a_plain_request_reaches_the_owner_whichever_worker_gets_it(place: Place) -> None:
    for name in ("w1", "w2", "w3"):
        await place.worker(name)
    client = await nats.connect(place.url)
    try:
        values = []
        for _ in range(12):
            reply = await client.request(
                f"{place.namespace}.agent.counting", b'{"amount": 1}', headers={KEY_HEADER: "k"}, timeout=5
            )
            values.append(json.loads(reply.data)["value"])
        reply = await client.request(f"{place.namespace}.agent.counting.k", b'{"amount": 1}', timeout=5)
        values.append(json.loads(reply.data)["value"])
    finally:
        await client.close()
    assert values == list(range(1, 14))
    assert len(place.life.made) == 1


async def test_handlers_of_one_agent_run_one_at_a_time_and_those_of_others_do_not_wait(place: Place) -> None:
    await place.worker("w1")
    caller = await place.caller()
    first = asyncio.ensure_future(caller.send_message(Hold("gate"), agent("k")))
    await asyncio.wait_for(place.life.gate("gate began").wait(), 5)
    second = asyncio.ensure_future(caller.send_message(Add(), agent("k")))
    await caller.send_message(Add(), agent("other"))
    assert not second.done()
    place.life.gate("gate").set()
    await asyncio.gather(first, second)
    assert place.life.most["counting/k"] == 1


async def test_concurrent_handlers_are_chosen_by_the_options(place: Place) -> None:
    await place.worker("w1", KeyedOptions(concurrency="concurrent"))
    caller = await place.caller()
    first = asyncio.ensure_future(caller.send_message(Hold("gate"), agent("k")))
    await asyncio.wait_for(place.life.gate("gate began").wait(), 5)
    assert (await caller.send_message(Add(), agent("k"))).value == 1
    place.life.gate("gate").set()
    await first


async def test_an_agent_that_is_called_back_along_its_own_chain_does_not_deadlock(place: Place) -> None:
    for name in ("w1", "w2"):
        runtime = await place.worker(name)
        await runtime.register_factory("relay", Relay)
    caller = await place.caller()
    async with asyncio.timeout(10):
        assert (await caller.send_message(Ask("relay/k"), agent("k"))).value == 10  # over another agent
        assert (await caller.send_message(Ask("counting/k"), agent("k"))).value == 20  # itself
    assert place.life.most["counting/k"] == 2


async def test_state_is_stored_before_the_reply_and_loaded_by_the_next_owner(place: Place) -> None:
    first = await place.worker("w1")
    caller = await place.caller()
    for _ in range(3):
        await caller.send_message(Add(), agent("k"))
    await first.stop()
    await place.worker("w2")
    total = await caller.send_message(Add(), agent("k"))
    assert (total.value, total.worker) == (4, "w2")


async def test_an_idle_instance_is_stored_closed_and_woken_by_the_next_message(place: Place) -> None:
    await place.worker("w1", KeyedOptions(idle_timeout=0.3, save="interval", save_interval=100))
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    await eventually(lambda: place.life.closed == [("counting/k", "w1")])
    assert (await caller.send_message(Add(), agent("k"))).value == 6
    assert len(place.life.made) == 2


async def test_an_event_wakes_an_agent_that_was_released(place: Place) -> None:
    await place.worker("w1", KeyedOptions(idle_timeout=0.3))
    caller = await place.caller()
    await caller.publish_message(Add(5), TopicId("numbers", "k"))
    await eventually(lambda: place.life.closed == [("counting/k", "w1")])
    await caller.publish_message(Add(6), TopicId("numbers", "k"))
    await eventually(lambda: len(place.life.handled) == 2)
    assert (await caller.send_message(Add(0), agent("k"))).value == 11


async def test_with_rebalance_a_worker_that_joins_gets_its_share_of_idle_agents(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_LEASE", 0.05)
    options = KeyedOptions(idle_timeout=2, rebalance=True)
    await place.worker("w1", options)
    caller = await place.caller()
    keys = [agent(f"k{number}") for number in range(40)]
    await asyncio.gather(*(caller.send_message(Add(), key) for key in keys))
    await place.worker("w2", options)
    await eventually(lambda: len(place.life.closed) == 40)
    totals = await asyncio.gather(*(caller.send_message(Add(), key) for key in keys))
    assert {total.value for total in totals} == {2}
    assert min(Counter(total.worker for total in totals).values()) >= 5


async def test_what_is_only_stored_on_request_is_stored_on_request(place: Place) -> None:
    first = await place.worker("w1", KeyedOptions(save="manual"))
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    await first.store_state(agent("k"))
    await caller.send_message(Add(5), agent("k"))
    await first.stop()
    await place.worker("w2", KeyedOptions(save="manual"))
    assert (await caller.send_message(Add(), agent("k"))).value == 6


async def test_storing_what_lives_elsewhere_is_refused(place: Place) -> None:
    await place.worker("w1")
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    with pytest.raises(LookupError, match="counting/k"):
        await caller.store_state(agent("k"))


async def test_state_is_read_and_written_where_the_agent_lives(place: Place) -> None:
    await place.worker("w1")
    await place.worker("w2")
    caller = await place.caller()
    for number in range(6):
        await caller.send_message(Add(number), agent(f"k{number}"))
        assert await caller.agent_save_state(agent(f"k{number}")) == {"value": number}
        await caller.agent_load_state(agent(f"k{number}"), {"value": 50})
        assert (await caller.send_message(Add(), agent(f"k{number}"))).value == 51
        assert (await caller.agent_metadata(agent(f"k{number}")))["key"] == f"k{number}"


async def test_a_loaded_state_outlives_its_worker(place: Place) -> None:
    first = await place.worker("w1")
    caller = await place.caller()
    await caller.agent_load_state(agent("k"), {"value": 7})
    await first.stop()
    await place.worker("w2")
    assert (await caller.send_message(Add(), agent("k"))).value == 8


async def test_the_underlying_instance_is_there_only_where_the_agent_lives(place: Place) -> None:
    first, second = await place.worker("w1"), await place.worker("w2")
    caller = await place.caller()
    owner = (await caller.send_message(Add(), agent("k"))).worker
    here, elsewhere = (first, second) if owner == "w1" else (second, first)
    assert (await here.try_get_underlying_agent_instance(agent("k"), Counting)).value == 1
    with pytest.raises(NotAccessibleError):
        await elsewhere.try_get_underlying_agent_instance(agent("k"), Counting)
    await caller.get(agent("new"), lazy=False)
    assert ("counting/new", "w1") in place.life.made or ("counting/new", "w2") in place.life.made


async def test_a_snapshot_of_a_runtime_restores_its_keyed_agents(place: Place) -> None:
    first = await place.worker("w1")
    caller = await place.caller()
    for number in range(4):
        await caller.send_message(Add(number), agent(f"k{number}"))
    snapshot = await first.save_state()
    assert snapshot == {f"counting/k{number}": {"value": number} for number in range(4)}
    for number in range(4):
        await caller.send_message(Add(100), agent(f"k{number}"))
    await first.load_state(snapshot)
    for number in range(4):
        assert (await caller.send_message(Add(0), agent(f"k{number}"))).value == number


async def test_the_loser_of_a_race_for_the_state_drops_its_instance_and_says_so(place: Place) -> None:
    worker = await place.worker("w1")
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    records = caller.running.records
    present = await records.read(agent("k"))
    assert present is not None
    assert present.owner == worker.worker_id
    await records.write_state(agent("k"), b'{"value": 7}', expected=present)
    with pytest.raises(natsrt.StateConflict, match="counting/k"):
        await caller.send_message(Add(100), agent("k"))
    assert (await caller.send_message(Add(1), agent("k"))).value == 8


async def test_a_type_is_keyed_on_all_workers_or_on_none(place: Place) -> None:
    await place.worker("w1")
    async with NatsAgentRuntime(place.url, namespace=place.namespace) as other:
        with pytest.raises(ValueError, match="keyed"):
            await other.register_factory("counting", Relay)


async def test_a_keyed_class_whose_registration_hides_it_is_refused_at_its_first_message(place: Place) -> None:
    runtime = await place.caller()
    await runtime.register_factory("hidden", lambda: Counting(place.life, "w"))
    with pytest.raises(ValueError, match="expected_class"):
        await runtime.send_message(Add(), AgentId("hidden", "k"))


@keyed(save="manual")
class Amounts(RoutedAgent):
    """Keyed: returns the amount."""

    @message_handler
    async def on_add(self, message: Add, ctx: MessageContext) -> int:
        return message.amount


@pytest.mark.parametrize("started", [True, False], ids=["started", "before the start"])
async def test_an_instance_of_a_keyed_class_or_type_is_refused(place: Place, started: bool) -> None:
    settings: dict[str, Any] = {"namespace": place.namespace, "keyed": {"named": True, "loose": False}}
    runtime = NatsAgentRuntime(place.url, **settings)
    if started:
        await runtime.start()
    with pytest.raises(ValueError, match=r"Amounts is a keyed class, .*register_factory\('counting', .*Amounts\)"):
        await runtime.register_agent_instance(Amounts("keyed"), AgentId("counting", "k"))
    with pytest.raises(ValueError, match=r"setting keyed names the type 'named', .*register_factory\('named'"):
        await runtime.register_agent_instance(Relay(), AgentId("named", "k"))
    # Nothing was registered, and the setting may say that the class does not matter.
    await runtime.register_agent_instance(Amounts("keyed"), AgentId("loose", "k"))
    await runtime.register_factory("counting", partial(Amounts, "keyed"), expected_class=Amounts)
    if not started:
        await runtime.start()
    assert await runtime.send_message(Add(1), AgentId("loose", "k")) == 1
    assert await runtime.send_message(Add(1), AgentId("counting", "k")) == 1
    assert not await runtime.running.registry.is_known("named")
    await runtime.close()


@pytest.mark.parametrize("by", ["argument", "setting"])
async def test_a_factory_may_say_without_a_class_that_its_type_is_not_keyed(place: Place, by: str) -> None:
    settings: dict[str, Any] = {"keyed": {"loose": False}} if by == "setting" else {}
    async with NatsAgentRuntime(place.url, namespace=place.namespace, **settings) as runtime:
        keyed = False if by == "argument" else None
        await runtime.register_factory("loose", lambda: Counting(place.life, "w"), keyed=keyed)
        assert (await runtime.send_message(Add(1), AgentId("loose", "k"))).value == 1
        assert not runtime.running.registry.is_keyed("loose")


async def test_what_the_argument_says_counts_more_than_the_class(place: Place) -> None:
    runtime = await place.caller()
    await runtime.register_factory("loose", lambda: Counting(place.life, "w"), expected_class=Counting, keyed=False)
    gates = [asyncio.ensure_future(runtime.send_message(Hold("g"), AgentId("loose", "k"))) for _ in range(2)]
    await eventually(lambda: place.life.most["loose/k"] == 2)
    place.life.gate("g").set()
    await asyncio.gather(*gates)
