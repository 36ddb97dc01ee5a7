"""Keyed agents where it gets tight: agents that fail or hang, owners that leave in mid-work, and lost ownership."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from enum import IntFlag, StrEnum
from types import MappingProxyType
from typing import Any, cast
from uuid import uuid4

import nats
import pytest
from autogen_core import (
    AgentId,
    BaseAgent,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
    message_handler,
)

import natsrt
from natsrt import KeyedOptions, NatsAgentRuntime, keyed
from natsrt.agents.control import LOAD_STATE, encode_data
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.record import encode_state
from natsrt.keyed.ownership import OwnedElsewhere
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER
from tests.support.clients import settled
from tests.support.processes import eventually
from tests.test_keyed import Add, Ask, Counting, Hold, Life, Place, Total, agent


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(server.url, namespace, stack)


class Fussy(Counting):
    """Does what the test says when it saves, loads and closes."""

    failures: dict[str, Exception]
    gated: set[str]

    async def _pass(self, what: str) -> None:
        life = self.life
        life.gate(f"{what} began").set()
        if what in self.gated:
            await life.gate(what).wait()
        if what in self.failures:
            raise self.failures[what]

    async def save_state(self) -> Mapping[str, Any]:
        await self._pass("save")
        return await super().save_state()

    async def load_state(self, state: Mapping[str, Any]) -> None:
        await self._pass("load")
        await super().load_state(state)


class Gated(RoutedAgent):
    """Not keyed: waits for a gate, and calls the agent that its own key names."""

    def __init__(self, life: Life) -> None:
        super().__init__("waits, and gives on")
        self.life = life

    @message_handler
    async def on_add(self, message: Add, ctx: MessageContext) -> Total:
        self.life.gate("relay began").set()
        await self.life.gate("relay").wait()
        total: Total = await self.send_message(message, AgentId("counting", self.id.key))
        return total


async def fussy(
    place: Place, name: str, options: KeyedOptions, **settings: Any
) -> tuple[NatsAgentRuntime, type[Fussy]]:
    """A worker whose agents are of a class of its own, which the test makes fail or wait."""

    class Own(Fussy):
        failures = {}
        gated = set()

    runtime = NatsAgentRuntime(place.url, namespace=place.namespace, name=name, **settings)
    await runtime.register_factory("counting", lambda: Own(place.life, name), expected_class=Own, keyed=options)
    await runtime.add_subscription(TypeSubscription("numbers", "counting"))
    await place._stack.enter_async_context(runtime)
    return runtime, Own


async def test_an_event_that_was_published_before_the_stop_still_finds_its_agent(place: Place) -> None:
    await place.worker("w1")
    publisher = await place.caller()
    await publisher.publish_message(Add(3), TopicId("numbers", "k"))
    await publisher.stop()
    await eventually(lambda: len(place.life.handled) == 1)


async def test_an_agent_whose_state_cannot_be_saved_stays_reachable(place: Place) -> None:
    _, cls = await fussy(place, "w1", KeyedOptions(idle_timeout=0.2, save="interval", save_interval=100))
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    cls.failures["save"] = ValueError("not now")
    place.life.gate("save began").clear()
    await asyncio.wait_for(place.life.gate("save began").wait(), 5)
    async with asyncio.timeout(3):
        assert (await caller.send_message(Add(1), agent("k"))).value == 6
    cls.failures.clear()
    await eventually(lambda: place.life.closed == [("counting/k", "w1")])
    assert (await caller.send_message(Add(1), agent("k"))).value == 7


async def test_a_stop_waits_for_the_release_that_is_under_way(place: Place) -> None:
    runtime, cls = await fussy(place, "w1", KeyedOptions(idle_timeout=0.2, save="interval", save_interval=100))
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    cls.gated.add("save")
    await asyncio.wait_for(place.life.gate("save began").wait(), 5)
    stopping = asyncio.ensure_future(runtime.stop())
    await eventually(lambda: caller.running.registry.view.takers_of(agent("k")) == [])
    place.life.gate("save").set()
    await stopping
    await place.worker("w2")
    assert (await caller.send_message(Add(1), agent("k"))).value == 6
    assert place.life.closed == [("counting/k", "w1")]


async def test_a_handler_whose_instance_was_dropped_meanwhile_does_not_report_success(place: Place) -> None:
    runtime = await place.worker("w1")
    caller = await place.caller()
    held_up = asyncio.ensure_future(caller.send_message(Hold("gate"), agent("k")))
    await asyncio.wait_for(place.life.gate("gate began").wait(), 5)
    present = await caller.running.records.read(agent("k"))
    assert present is not None
    await caller.running.records.write_state(agent("k"), b'{"value": 7}', expected=present)
    runtime.running.ownership.doubt()
    await eventually(lambda: place.life.closed == [("counting/k", "w1")])
    assert (await caller.running.outgoing.locator.locate(agent("k"))).worker_id == runtime.worker_id  # it owns it again
    place.life.gate("gate").set()
    with pytest.raises(natsrt.StateConflict):
        await held_up
    assert (await caller.send_message(Add(1), agent("k"))).value == 8


@pytest.mark.parametrize("concurrency", ["serial", "concurrent"])
async def test_a_draining_owner_lets_in_what_its_running_handlers_wait_for(place: Place, concurrency: Any) -> None:
    runtime = await place.worker("w1", KeyedOptions(concurrency=concurrency))
    caller = await place.caller()
    relay = await place.caller()
    await relay.register_factory("relay", lambda: Gated(place.life))
    call = asyncio.ensure_future(caller.send_message(Ask("relay/k"), agent("k")))
    await asyncio.wait_for(place.life.gate("relay began").wait(), 5)
    await place.worker("w2", KeyedOptions(concurrency=concurrency))
    stopping = asyncio.ensure_future(runtime.stop())
    await eventually(lambda: len(caller.running.registry.view.takers_of(agent("k"))) == 1)
    place.life.gate("relay").set()
    async with asyncio.timeout(4):
        assert (await call).value == 10
    await stopping


async def test_what_a_handler_waits_for_does_not_stand_behind_what_waits_for_the_handler(place: Place) -> None:
    runtime = await place.worker("w1")
    caller = await place.caller()
    relay = await place.caller()
    await relay.register_factory("relay", lambda: Gated(place.life))
    call = asyncio.ensure_future(caller.send_message(Ask("relay/k"), agent("k")))
    await asyncio.wait_for(place.life.gate("relay began").wait(), 5)
    await place.worker("w2")
    stopping = asyncio.ensure_future(runtime.stop())
    await eventually(lambda: len(relay.running.registry.view.takers_of(agent("k"))) == 1)
    await relay.publish_message(Add(1), TopicId("numbers", "k"))
    place.life.gate("relay").set()
    async with asyncio.timeout(4):
        assert (await call).value == 10
    await stopping
    await eventually(lambda: len(place.life.handled) == 3)
    assert (await caller.send_message(Add(0), agent("k"))).value == 11


async def test_a_type_that_is_no_longer_hosted_gives_its_agents_up(place: Place) -> None:
    runtime = await place.worker("w1", KeyedOptions(save="interval", save_interval=100))
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    await place.worker("w2", KeyedOptions(save="interval", save_interval=100))
    await runtime.unregister("counting")
    total = await caller.send_message(Add(1), agent("k"))
    assert (total.value, total.worker) == (6, "w2")
    assert place.life.closed == [("counting/k", "w1")]
    await runtime.register_factory(
        "counting", lambda: Counting(place.life, "again"), expected_class=Counting, keyed=KeyedOptions()
    )
    assert (await caller.send_message(Add(1), agent("k"))).worker == "w2"


@keyed
class Quitting(RoutedAgent):
    """Stops its own runtime."""

    def __init__(self) -> None:
        super().__init__("quits")

    @message_handler
    async def on_add(self, message: Add, ctx: MessageContext) -> None:
        assert isinstance(self.runtime, NatsAgentRuntime)
        await self.runtime.stop()


async def test_a_keyed_agent_may_stop_its_own_runtime(place: Place) -> None:
    runtime = await place.caller()
    await runtime.register_factory("quitting", Quitting, expected_class=Quitting)
    await runtime.add_subscription(TypeSubscription("quit", "quitting"))
    await runtime.publish_message(Add(), TopicId("quit", "k"))
    await asyncio.wait_for(runtime.wait_until_stopped(), 5)


async def test_a_message_that_comes_while_its_agent_is_given_up_wakes_it_again(place: Place) -> None:
    _, cls = await fussy(place, "w1", KeyedOptions(idle_timeout=0.2, save="interval", save_interval=100))
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    cls.gated.add("save")
    place.life.gate("save began").clear()
    await asyncio.wait_for(place.life.gate("save began").wait(), 5)
    client = await nats.connect(place.url)
    try:
        request = asyncio.ensure_future(
            client.request(f"{place.namespace}.agent.counting", b'{"name": "gate"}', 5, headers={KEY_HEADER: "k"})
        )
        located = asyncio.ensure_future(caller.running.outgoing.locator.locate(agent("k")))
        await caller.send_message(Add(1), agent("other"))
        await settled(client)
        await caller.send_message(Add(1), agent("other"))
        place.life.gate("save").set()
        await located
        place.life.gate("gate").set()
        assert (await request).headers is None
    finally:
        await client.close()


async def test_a_large_state_that_was_changed_before_it_was_loaded_is_loaded_as_it_is_now(
    place: Place,
) -> None:
    records = (await place.worker("w1")).running.records
    await records.open()
    large = b'{"value": 1, "text": "' + b"x" * 1_500_000 + b'"}'
    await records.write_state(agent("k"), large, expected=None)
    caller = await place.caller()
    await caller.running.outgoing.locator.locate(agent("k"))
    present = await records.read(agent("k"))
    await records.write_state(agent("k"), large.replace(b"1,", b"2,"), expected=present)
    with pytest.raises(natsrt.StateConflict):
        await caller.send_message(Add(1), agent("k"))
    assert (await caller.send_message(Add(1), agent("k"))).value == 3


async def test_a_runtime_that_is_started_again_has_its_keyed_agents_again(place: Place) -> None:
    runtime = await place.worker("w1")
    caller = await place.caller()
    for value in (1, 2, 3):
        assert (await caller.send_message(Add(), agent("k"))).value == value
        await runtime.stop()
        assert len(place.life.closed) == value
        await runtime.start()
    await runtime.close()
    assert len(place.life.closed) == len(place.life.made) == 3


async def test_keys_that_no_subject_can_carry_are_agents_of_their_own(place: Place) -> None:
    for name in ("w1", "w2"):
        await place.worker(name, KeyedOptions(idle_timeout=0.3))
    caller = await place.caller()
    keys = ["x" * 300, "x" * 299 + "y", "ä ö.>*", "", "a/b"]
    for key in keys:
        await caller.send_message(Add(1), agent(key))
        await caller.publish_message(Add(2), TopicId("numbers", key))
        assert (await caller.send_message(Add(3), agent(key))).value == 6
        assert await caller.agent_save_state(agent(key)) == {"value": 6}
    await eventually(lambda: len(place.life.closed) == len(keys))
    for key in keys:
        assert (await caller.send_message(Add(1), agent(key))).value == 7


class Odd:
    """A custom subscription: every topic of type ``odd`` goes to the agent whose key is the source turned round."""

    def __init__(self, agent_type: str) -> None:
        self.agent_type = agent_type

    @property
    def id(self) -> str:
        return f"odd-{self.agent_type}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd) and other.id == self.id

    def is_match(self, topic_id: TopicId) -> bool:
        return topic_id.type == "odd"

    def map_to_agent(self, topic_id: TopicId) -> AgentId:
        return AgentId(self.agent_type, topic_id.source[::-1])


async def test_each_agent_gets_one_copy_whatever_the_mix_of_types_and_subscriptions(place: Place) -> None:
    class Plain(RoutedAgent):
        def __init__(self, life: Life, worker: str) -> None:
            super().__init__("not keyed")
            self.life, self.worker = life, worker

        @message_handler
        async def on_add(self, message: Add, ctx: MessageContext) -> None:
            self.life.handled.append((str(self.id), self.worker, message))

    for name in ("w1", "w2"):
        runtime = await place.worker(name)
        await runtime.register_factory("other", lambda: Counting(place.life, "w"), expected_class=Counting)
        await runtime.register_factory("plain", lambda: Plain(place.life, "w"))
        for agent_type in ("counting", "other", "plain"):
            await runtime.add_subscription(TypePrefixSubscription("num", agent_type, id=f"prefix-{agent_type}"))
            if agent_type != "counting":  # it has that one
                await runtime.add_subscription(TypeSubscription("numbers", agent_type))
            await runtime.add_subscription(Odd(agent_type))
    publisher = await place.caller()
    for _ in range(3):
        await publisher.publish_message(Add(), TopicId("numbers", "ab"))
        await publisher.publish_message(Add(), TopicId("odd", "ba"))
        await publisher.publish_message(Add(), TopicId("number", "ab"))
    client = await nats.connect(place.url)
    try:
        await client.publish(f"{place.namespace}.topic.numbers.ab", b'{"amount": 1}')
        await settled(client)
    finally:
        await client.close()
    expected = {"counting/ab": 10, "other/ab": 10, "plain/ab": 10}
    await eventually(lambda: Counter(name for name, _, _ in place.life.handled) == expected)
    await publisher.send_message(Add(0), AgentId("counting", "ab"))
    await publisher.send_message(Add(0), AgentId("other", "ab"))
    assert len(place.life.handled) == 32
    assert len(place.life.made) == 2


async def test_a_publisher_does_not_get_its_own_event_back_when_it_is_keyed(place: Place) -> None:
    @keyed
    class Telling(Counting):
        @message_handler
        async def on_hold(self, message: Hold, ctx: MessageContext) -> None:
            await self.publish_message(Add(1), TopicId("numbers", self.id.key))

    for name in ("w1", "w2"):
        runtime = await place.worker(name)
        await runtime.register_factory("telling", lambda: Telling(place.life, "w"), expected_class=Telling)
        await runtime.add_subscription(TypeSubscription("numbers", "telling"))
    caller = await place.caller()
    await caller.send_message(Hold("x"), AgentId("telling", "k"))
    await eventually(lambda: [name for name, _, _ in place.life.handled] == ["counting/k"])
    await caller.send_message(Add(0), AgentId("telling", "k"))
    assert [name for name, _, _ in place.life.handled] == ["counting/k", "telling/k"]


async def test_stopping_when_idle_waits_for_events_to_keyed_agents(place: Place) -> None:
    runtime = await place.worker("w1")
    for number in range(20):
        await runtime.publish_message(Add(), TopicId("numbers", f"k{number % 3}"))
    await runtime.stop_when_idle()
    assert len(place.life.handled) == 20


async def test_a_cancelled_call_in_the_line_lets_the_others_pass(place: Place) -> None:
    caller = await place.caller()
    await place.worker("w1")
    calls = [asyncio.ensure_future(caller.send_message(Add(number), agent("k"))) for number in range(20)]
    await asyncio.sleep(0)
    for number, call in enumerate(calls):
        if number % 3 == 0:
            call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [n % 3 == 0 for n in range(20)]
    numbers = [message.amount for _, _, message in place.life.handled]
    assert numbers == sorted(numbers)


async def test_a_failing_factory_or_load_leaves_the_agent_usable(place: Place) -> None:
    _, cls = await fussy(place, "w1", KeyedOptions(idle_timeout=0.2))
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    await eventually(lambda: len(place.life.closed) == 1)
    cls.failures["load"] = ValueError("broken")
    for _ in range(3):
        with pytest.raises(ValueError, match="broken"):
            await caller.send_message(Add(1), agent("k"))
    cls.failures.clear()
    assert (await caller.send_message(Add(1), agent("k"))).value == 6
    await eventually(lambda: len(place.life.closed) == len(place.life.made) == 5)


async def test_a_state_that_json_cannot_carry_is_the_callers_error_and_the_agent_lives_on(place: Place) -> None:
    worker = await place.worker("w1")
    caller = await place.caller()
    with pytest.raises(natsrt.CannotSerialize):
        await caller.send_message(Add(float("nan")), agent("k"))  # type: ignore[arg-type]
    await caller.send_message(Add(1), agent("k"))
    (await worker.try_get_underlying_agent_instance(agent("k"), Counting)).value = float("nan")  # type: ignore[assignment]
    with pytest.raises((natsrt.CannotSerialize, natsrt.StateNotSaved)):
        await caller.send_message(Add(1), agent("k"))
    assert worker.running.ownership.owned("counting") == 1


@dataclass
class Point:
    x: int


@pytest.mark.parametrize(
    "value",
    [(1, 2), Point(1), datetime(2026, 1, 1), uuid4(), {1: 2}, 2**64, float("inf"), "\ud800", IntFlag("F", ["A"])(1)],
)
def test_a_state_that_would_be_loaded_as_something_else_is_refused_by_name(value: Any) -> None:
    what = rf"holds a (value|key) of type {type(value).__name__} under 'place\[\].deep' that"
    if isinstance(value, dict):
        what = r"holds a key of type int under 'place\[\].deep' that"
    with pytest.raises(natsrt.CannotSerialize, match=what):
        encode_state({"name": "x", "place": [{"deep": value}]})


@pytest.mark.parametrize("state", [{}, {"a": [True, 1, 1.5, -0.0, None, 2**63, {"ä": "\U0001f600"}]}])
def test_a_state_of_json_values_comes_back_as_it_is(state: Mapping[str, Any]) -> None:
    assert json.loads(encode_state(state)) == state


FILLINGS: dict[str, Any] = {
    "one text": {"text": "x" * 6_000_000},
    "many entries": {"list": [{"id": str(number), "number": number / 3} for number in range(200_000)]},
    "many keys": {str(number): [None, True, "y" * 100] for number in range(50_000)},
    "texts of all sizes": {"list": ["z" * (number * 3000) for number in range(70)]},
}


@pytest.mark.parametrize("filling", FILLINGS.values(), ids=FILLINGS)
@pytest.mark.parametrize("first", [True, False])
def test_a_large_state_comes_back_as_it_is_or_is_refused(filling: dict[str, Any], first: bool) -> None:
    """Wherever in it the value is that JSON does not carry."""
    assert json.loads(encode_state(filling)) == filling

    class Name(StrEnum):
        A = "a"

    for value in ((1, 2), IntFlag("F", ["A"])(1), 2**64, {Name.A: 1}, Name.A):
        for inner in ({"deep": [value]}, ["a", value]):
            state = {"odd": inner, **filling} if first else {**filling, "odd": inner}
            with pytest.raises(natsrt.CannotSerialize, match="under 'odd"):
                encode_state(state)
            name = next(iter(filling))
            if isinstance(filling[name], list):
                changed = [inner, *filling[name]] if first else [*filling[name], inner]
                with pytest.raises(natsrt.CannotSerialize, match=f"under '{name}"):
                    encode_state({name: changed})


@pytest.mark.parametrize("state", [None, [["a", 1]], MappingProxyType({"a": 1}), OrderedDict(a=1)], ids=repr)
async def test_a_state_that_is_not_a_dict_is_refused(state: Any) -> None:
    with pytest.raises(natsrt.CannotSerialize, match="save_state must return a dict, but returned (None|a value)"):
        encode_state(state)
    with pytest.raises(natsrt.CannotSerialize, match="load_state takes a dict, but was given (None|a value)"):
        encode_data(LOAD_STATE, state)

    class Odd(BaseAgent):
        async def on_message_impl(self, message: Any, ctx: MessageContext) -> None: ...

        async def save_state(self) -> Mapping[str, Any]:
            return cast(Mapping[str, Any], state)

        async def load_state(self, state: Mapping[str, Any]) -> None:
            raise AssertionError

    runtime = NatsAgentRuntime()
    await natsrt.register(runtime, Odd, "odd", lambda: Odd("odd"))
    odd = await runtime.get(AgentId("odd", "x"), lazy=False)
    for attempt in (runtime.agent_save_state(odd), runtime.save_state()):
        with pytest.raises(natsrt.CannotSerialize, match="save_state must return a dict"):
            await attempt
    for attempt in (runtime.agent_load_state(odd, state), runtime.load_state({"odd/x": state})):
        with pytest.raises(natsrt.CannotSerialize, match="load_state takes a dict"):
            await attempt


def test_a_state_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(natsrt.CannotSerialize, match="under 'self'"):
        encode_state(state)


async def test_of_concurrent_handlers_a_late_save_does_not_replace_a_newer_state(place: Place) -> None:
    class Slow(Counting):
        async def save_state(self) -> Mapping[str, Any]:
            state = await super().save_state()
            if state["value"] == 1:
                self.life.gate("save began").set()
                await self.life.gate("save").wait()
            return state

    runtime = NatsAgentRuntime(place.url, namespace=place.namespace, name="w1")
    options = KeyedOptions(concurrency="concurrent")
    await runtime.register_factory("counting", lambda: Slow(place.life, "w1"), expected_class=Slow, keyed=options)
    await place._stack.enter_async_context(runtime)
    caller = await place.caller()
    first = asyncio.ensure_future(caller.send_message(Add(1), agent("k")))
    await asyncio.wait_for(place.life.gate("save began").wait(), 5)
    assert (await caller.send_message(Add(1), agent("k"))).value == 2
    place.life.gate("save").set()
    assert (await first).value == 1
    record = await caller.running.records.read(agent("k"))
    assert record is not None
    assert record.body == b'{"value":2}'


async def test_an_event_counts_once_although_its_topic_is_published_too(place: Place) -> None:
    worker = await place.worker("w1")
    caller = await place.caller()
    client = await nats.connect(place.url)
    try:
        copies = await client.subscribe(f"{place.namespace}.topic.numbers.k")
        await settled(client)
        for number in range(5):
            await caller.publish_message(Add(number), TopicId("numbers", "k"))
        for _ in range(5):
            copy = await copies.next_msg(timeout=5)
        await client.publish(copy.subject, b'{"amount": 100}')  # behind the copies, and handled
        await eventually(lambda: 100 in [message.amount for *_, message in place.life.handled])
    finally:
        await client.close()
    await eventually(lambda: worker.health().messages_handled == 6)
    assert sorted(message.amount for *_, message in place.life.handled) == [0, 1, 2, 3, 4, 100]


async def test_a_worker_forgets_what_it_only_passed_on(place: Place) -> None:
    workers = [await place.worker(name) for name in ("w1", "w2")]
    client = await nats.connect(place.url)
    try:
        for number in range(30):
            subject = f"{place.namespace}.topic.numbers.k{number % 5}"
            await client.publish(subject, b'{"amount": 1}')
        await settled(client)
        await eventually(lambda: len(place.life.handled) == 30)
    finally:
        await client.close()
    slots = [len(list(worker.running.ownership._slots)) for worker in workers]
    assert sum(slots) == len(place.life.made) == 5
    for worker in workers:
        await eventually(lambda worker=worker: not worker.running.dispatch.running)  # type: ignore[misc]
        assert not worker.running.incoming.call_log._running


async def test_an_event_that_finds_the_intake_full_is_counted(place: Place) -> None:
    worker = await place.worker("w1", max_pending_bytes=200_000)
    caller = await place.caller()
    first = asyncio.ensure_future(caller.send_message(Hold("gate"), agent("k")))
    await asyncio.wait_for(place.life.gate("gate began").wait(), 5)
    for _ in range(400):
        await caller.publish_message(Add(), TopicId("numbers", "k"))
    await caller.running.connection.barrier()
    await worker.running.connection.barrier()
    place.life.gate("gate").set()
    await first
    await eventually(lambda: not worker.running.dispatch.running)
    lost = 400 - (len(place.life.handled) - 1)
    assert lost > 0
    assert worker.health().dropped_events == lost


async def test_a_worker_that_forgot_nothing_never_received_what_it_does_not_know(place: Place) -> None:
    worker = await place.worker("w1")
    caller = await place.caller()
    question = envelope.encode(envelope.FATE, '"id":"fate","source":"/"', b'{"calls":["_INBOX.sent.before.it.began"]}')
    subject = caller.running.registry.worker_subject(worker.running.worker_id)
    answer = await caller.running.network.peers.ask(subject, question, 5)
    assert answer is not None
    body = envelope.decode(answer.data)
    assert body is not None
    assert body.json()["unknown"] == ["_INBOX.sent.before.it.began"]
    assert body.json()["remembers"] > 3600


async def test_a_message_that_waits_behind_another_tells_the_owner_which_handlers_wait_for_it(place: Place) -> None:
    """What came to the wrong worker waits there in line. The owner lets its callback in, which is not the first."""
    runtime = await place.worker("w1")
    caller = await place.caller()
    relay = await place.caller()
    await relay.register_factory("relay", lambda: Gated(place.life))
    call = asyncio.ensure_future(caller.send_message(Ask("relay/k"), agent("k")))
    await asyncio.wait_for(place.life.gate("relay began").wait(), 5)
    second = await place.worker("w2")
    stopping = asyncio.ensure_future(runtime.stop())
    await eventually(lambda: len(relay.running.registry.view.takers_of(agent("k"))) == 1)
    hosted = second.running.incoming.subscriptions._catalog.find("counting")
    assert hosted is not None

    async def nothing() -> None:
        return None

    first = asyncio.ensure_future(second.running.incoming.turns.run(hosted, "k", (), nothing))
    await asyncio.sleep(0)
    slot = second.running.ownership._slots.find("counting", "k")
    inside = runtime.running.ownership._slots.find("counting", "k")
    assert slot is not None
    assert inside is not None
    await eventually(lambda: slot.is_moving)
    [handler_id] = inside.mailbox.inside
    behind = asyncio.ensure_future(second.running.incoming.turns.run(hosted, "k", (handler_id,), nothing))
    for outcome in await asyncio.wait_for(asyncio.gather(first, behind, return_exceptions=True), 4):
        assert isinstance(outcome, OwnedElsewhere)
    place.life.gate("relay").set()
    assert (await call).value == 10
    await stopping
