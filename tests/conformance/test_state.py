"""Metadata and state of agents, here and elsewhere, and of whole runtimes."""

from __future__ import annotations

import datetime
import enum
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
from autogen_core import AgentId

from natsrt.errors import AmbiguousAgent, CannotSerialize, NoLiveWorker, UnknownAgent, UnknownAgentType
from tests.conformance.conftest import World, natsrt_only, two_runtimes
from tests.conformance.samples import Counter, Number, Recorder

COUNTER = AgentId("counter", "k")


async def test_an_agents_metadata_can_be_read(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    assert await world.caller.agent_metadata(COUNTER) == {"type": "counter", "key": "k", "description": "counts"}


async def test_an_agents_state_can_be_saved_and_loaded(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    await world.caller.send_message(Number(5), COUNTER)
    state = await world.caller.agent_save_state(COUNTER)
    assert state == {"count": 5}
    await world.caller.send_message(Number(5), COUNTER)
    await world.caller.agent_load_state(COUNTER, state)
    assert await world.caller.send_message(Number(1), COUNTER) == Number(6)


async def test_a_state_can_be_loaded_into_an_agent_that_was_not_made_yet(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    await world.caller.agent_load_state(AgentId("counter", "new"), {"count": 10})
    assert await world.caller.send_message(Number(1), AgentId("counter", "new")) == Number(11)


async def test_an_instances_metadata_and_state_can_be_read(world: World) -> None:
    await world.host.register_agent_instance(Counter(), COUNTER)
    await world.caller.send_message(Number(5), COUNTER)
    assert (await world.caller.agent_metadata(COUNTER))["key"] == "k"
    assert await world.caller.agent_save_state(COUNTER) == {"count": 5}
    await world.caller.agent_load_state(COUNTER, {"count": 1})
    assert await world.caller.send_message(Number(1), COUNTER) == Number(2)


async def test_an_unknown_agent_has_neither_metadata_nor_state(world: World) -> None:
    caller = world.caller
    for ask in (caller.agent_metadata, caller.agent_save_state, partial(caller.agent_load_state, state={})):
        with pytest.raises(LookupError) as raised:
            await ask(COUNTER)
        assert not world.is_natsrt or isinstance(raised.value, UnknownAgentType)


@natsrt_only
async def test_an_id_without_an_instance_has_no_state(world: World) -> None:
    await world.host.register_agent_instance(Counter(), COUNTER)
    with pytest.raises(UnknownAgent):
        await world.caller.agent_save_state(AgentId("counter", "other"))


@two_runtimes
async def test_the_state_of_an_agent_whose_last_worker_stopped_is_a_typed_error(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    await world.host.stop()
    with pytest.raises(NoLiveWorker):
        await world.caller.agent_save_state(COUNTER)


class Faulty(Counter):
    async def save_state(self) -> Mapping[str, Any]:
        raise KeyError("no state")

    async def load_state(self, state: Mapping[str, Any]) -> None:
        raise ValueError("not this state")


async def test_what_an_agent_raises_while_saving_or_loading_reaches_the_caller(world: World) -> None:
    await world.host.register_factory("counter", Faulty)
    with pytest.raises(KeyError, match="no state"):
        await world.caller.agent_save_state(COUNTER)
    with pytest.raises(ValueError, match="not this state"):
        await world.caller.agent_load_state(COUNTER, {})


class Color(enum.StrEnum):
    RED = "red"


INEXACT = [
    object(),
    (1, 2),
    {1},
    b"x",
    {1: "a"},
    {None: 1},
    float("nan"),
    -(2**70),
    datetime.datetime(2026, 1, 1),
    uuid.UUID(int=1),
    Color.RED,
    Number(1),
    "\ud800",
]


@two_runtimes
@pytest.mark.parametrize("value", INEXACT, ids=lambda value: type(value).__name__)
async def test_a_remote_state_that_would_arrive_as_something_else_is_refused(world: World, value: Any) -> None:
    class Odd(Counter):
        async def save_state(self) -> Mapping[str, Any]:
            return {"count": 1, "odd": [value]}

    await world.host.register_factory("counter", Odd)
    for ask in (world.caller.agent_save_state, partial(world.caller.agent_load_state, state={"odd": [value]})):
        with pytest.raises(CannotSerialize, match=r"of type \w+ under 'odd\[\]"):
            await ask(COUNTER)


async def test_a_state_of_json_values_arrives_as_it_is(world: World) -> None:
    state = {"list": [1, 1.0, True, None, "\U0001f600", {"deep": [-0.0, 2**63]}], "$type": "Number"}
    loaded: list[Mapping[str, Any]] = []

    class Keeps(Counter):
        async def save_state(self) -> Mapping[str, Any]:
            return state

        async def load_state(self, state: Mapping[str, Any]) -> None:
            loaded.append(state)

    await world.host.register_factory("counter", Keeps)
    await world.caller.agent_load_state(COUNTER, state)
    for arrived in (loaded[0], await world.caller.agent_save_state(COUNTER)):
        assert repr(dict(arrived)) == repr(state)


@two_runtimes
async def test_an_agent_that_lives_on_two_workers_is_ambiguous(world: World) -> None:
    for runtime in (world.host, world.caller):
        await runtime.register_factory("counter", Counter)
    for runtime in (world.host, world.caller):
        for ask in (runtime.agent_metadata, runtime.agent_save_state, partial(runtime.agent_load_state, state={})):
            with pytest.raises(AmbiguousAgent) as raised:
                await ask(COUNTER)
            assert sorted(raised.value.workers) == sorted([world.host.worker_id, world.caller.worker_id])


@two_runtimes
async def test_the_second_worker_of_a_type_makes_its_agents_ambiguous_at_once(world: World) -> None:
    for n in range(50):
        agent = AgentId(f"counter{n}", "k")
        await world.host.register_factory(agent.type, Counter)
        await world.caller.register_factory(agent.type, Counter)
        with pytest.raises(AmbiguousAgent):
            await world.host.agent_load_state(agent, {"count": 1})


@two_runtimes
async def test_instances_on_two_workers_are_not_ambiguous(world: World) -> None:
    await world.host.register_agent_instance(Counter(), AgentId("counter", "a"))
    await world.caller.register_agent_instance(Counter(), AgentId("counter", "b"))
    for runtime in (world.host, world.caller):
        for key in "ab":
            assert (await runtime.agent_metadata(AgentId("counter", key)))["key"] == key


async def test_a_runtimes_state_holds_its_live_agents_and_restores_them(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    await world.caller.send_message(Number(1), AgentId("counter", "a"))
    await world.caller.send_message(Number(2), AgentId("counter", "b/c"))
    state = await world.host.save_state()
    assert state == {"counter/a": {"count": 1}, "counter/b/c": {"count": 2}}
    await world.caller.send_message(Number(10), AgentId("counter", "a"))
    await world.host.load_state({**state, "counter/new": {"count": 7}, "elsewhere/x": {"count": 1}})
    for key, count in (("a", 1), ("b/c", 2), ("new", 7)):
        assert await world.caller.send_message(Number(0), AgentId("counter", key)) == Number(count)


@two_runtimes
async def test_a_runtimes_state_holds_nothing_of_other_runtimes(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    await world.caller.send_message(Number(1), COUNTER)
    assert await world.caller.save_state() == {}


async def test_reading_metadata_makes_the_agent_as_a_message_would(world: World) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder([]))
        return made[-1]

    await Recorder.register(world.host, "recorder", factory)
    await world.caller.agent_metadata(AgentId("recorder", "k"))
    await world.caller.agent_metadata(AgentId("recorder", "k"))
    assert len(made) == 1
