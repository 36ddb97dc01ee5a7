"""``register_factory``, ``register_agent_instance``, ``get`` and ``try_get_underlying_agent_instance``."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from autogen_core import (
    AgentId,
    AgentInstantiationContext,
    AgentRuntime,
    AgentType,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypePrefixSubscription,
    default_subscription,
    message_handler,
)
from autogen_core.exceptions import NotAccessibleError

import natsrt
from natsrt.errors import CannotSerialize, UnknownAgent, UnknownAgentType
from tests.conformance.conftest import MakeRuntime, World, natsrt_only, two_runtimes
from tests.conformance.samples import Counter, Number, Recorder, Seen, Text, contents


async def test_a_type_registered_twice_is_a_value_error(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    with pytest.raises(ValueError, match="counter.* already exists"):
        await world.host.register_factory("counter", Counter)
    assert await world.caller.send_message(Number(2), AgentId("counter", "k")) == Number(2)


async def test_registering_returns_the_agent_type(world: World) -> None:
    assert await world.host.register_factory("one", Counter) == AgentType("one")
    assert await world.host.register_factory(AgentType("two"), Counter) == AgentType("two")


@two_runtimes
async def test_two_runtimes_may_host_one_type(world: World) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    await Recorder.register(world.caller, "recorder", lambda: Recorder([]))
    for n in range(20):
        assert await world.caller.send_message(Text(str(n)), AgentId("recorder", "k")) == Text(f"k got {n}")


async def test_an_async_factory_makes_the_agent_once(world: World) -> None:
    made: list[Counter] = []

    async def factory() -> Counter:
        await asyncio.sleep(0.01)
        made.append(Counter())
        return made[-1]

    await Counter.register(world.host, "counter", factory)
    await world.caller.send_message(Number(0), AgentId("counter", "first"))
    assert len(made) == 1
    await asyncio.gather(*(world.caller.send_message(Number(1), AgentId("counter", "first")) for _ in range(5)))
    assert len(made) == 1
    assert made[0].count == 5


@natsrt_only
async def test_concurrent_first_messages_of_an_agent_wait_for_one_factory_call(world: World) -> None:
    made: list[Recorder] = []
    seen: list[Seen] = []

    async def factory() -> Recorder:
        await asyncio.sleep(0.02)
        made.append(Recorder(seen))
        return made[-1]

    await Recorder.register(world.host, "recorder", factory)
    await asyncio.gather(*(world.caller.send_message(Text(str(n)), AgentId("recorder", "k")) for n in range(50)))
    assert len(made) == 1
    assert contents(seen) == [str(n) for n in range(50)]


async def test_an_agent_of_another_class_than_expected_is_a_value_error(world: World) -> None:
    await world.host.register_factory("counter", lambda: Recorder([]), expected_class=Counter)
    with pytest.raises(ValueError, match="expected Counter, got Recorder"):
        await world.caller.send_message(Text("a"), AgentId("counter", "k"))


@natsrt_only  # the other runtime wraps every factory in one without arguments
async def test_a_factory_with_two_arguments_gets_runtime_and_id_and_warns(world: World) -> None:
    given: list[tuple[AgentRuntime, AgentId]] = []

    def factory(runtime: AgentRuntime, agent_id: AgentId) -> Counter:
        given.append((runtime, agent_id))
        return Counter()

    await world.host.register_factory("counter", factory)
    with pytest.warns(DeprecationWarning, match="two arguments"):
        assert await world.caller.send_message(Number(1), AgentId("counter", "k")) == Number(1)
    assert given == [(world.host, AgentId("counter", "k"))]


class Greeter(RoutedAgent):
    def __init__(self, greeting: str = "Hi", name: str = "nobody") -> None:
        super().__init__("greets")
        self.says = f"{greeting}, {name}"

    @message_handler
    async def greet(self, message: Text, ctx: MessageContext) -> Text:
        return Text(self.says)


def any_arguments(*args: Any, **kwargs: Any) -> Greeter:
    return Greeter(*args, **kwargs)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (Greeter, "Hi, nobody"),
        (lambda greeting="Hello": Greeter(greeting), "Hello, nobody"),
        (lambda greeting="Hello", name="Ada": Greeter(greeting, name), "Hello, Ada"),
        (lambda greeting="Hello", name="Ada", more=3: Greeter(greeting, name), "Hello, Ada"),
        (lambda *, name="Ada": Greeter(name=name), "Hi, Ada"),
        (partial(Greeter, "Hello"), "Hello, nobody"),
        (partial(Greeter, greeting="Hello"), "Hello, nobody"),
        (partial(Greeter, "Hello", "Ada"), "Hello, Ada"),
        (any_arguments, "Hi, nobody"),
    ],
)
async def test_arguments_with_defaults_keep_them(world: World, factory: Any, expected: str) -> None:
    await world.host.register_factory("greeter", factory, expected_class=Greeter)
    assert await world.caller.send_message(Text("x"), AgentId("greeter", "k")) == Text(expected)


@natsrt_only
async def test_a_factory_that_needs_other_arguments_is_refused(world: World) -> None:
    for factory in (lambda one: Counter(), lambda one, two, three: Counter(), lambda *, one: Counter()):
        with pytest.raises(ValueError, match="0 or 2 arguments"):
            await world.host.register_factory("counter", factory)
    await world.host.register_factory("counter", Counter)


async def test_a_factory_knows_its_runtime_and_agent_id(world: World) -> None:
    given: list[tuple[AgentRuntime, AgentId]] = []

    def factory() -> Recorder:
        given.append((AgentInstantiationContext.current_runtime(), AgentInstantiationContext.current_agent_id()))
        return Recorder([])

    await Recorder.register(world.host, "recorder", factory)
    await world.caller.send_message(Text("a"), AgentId("recorder", "k"))
    assert given == [(world.host, AgentId("recorder", "k"))]
    agent = await world.host.try_get_underlying_agent_instance(AgentId("recorder", "k"), Recorder)
    assert (agent.id, agent.runtime) == (AgentId("recorder", "k"), world.host)
    with pytest.raises(RuntimeError):
        AgentInstantiationContext.current_agent_id()


# -- failed registrations --------------------------------------------------------------------------------------------


def _agent_for(*types: Any) -> type[RoutedAgent]:
    """An agent class with one handler for ``types``."""

    class Agent(RoutedAgent):
        pass

    async def handle(self: Any, message: Any, ctx: MessageContext) -> None:
        return None

    union = types[0]
    for other in types[1:]:
        union = union | other
    handle.__annotations__ = {"message": union, "ctx": MessageContext, "return": None}
    Agent.handle = message_handler(handle)  # type: ignore[attr-defined]
    return Agent


def _message_class(name: str, **fields: type) -> type:
    return dataclass(type(name, (), {"__annotations__": fields}))


class NoMessage:
    pass


@natsrt_only
async def test_a_handler_for_what_cannot_travel_is_refused(world: World) -> None:
    agent = _agent_for(NoMessage)
    with pytest.raises(CannotSerialize, match="NoMessage"):
        await natsrt.register(world.host, agent, "agent", lambda: agent("a"))
    with pytest.raises(UnknownAgentType):
        await world.caller.send_message(Text("a"), AgentId("agent", "k"))


@pytest.mark.parametrize(
    "types",
    [(int,), (_message_class("Nesting", number=Number),), (Text, str), (Any,)],
    ids=["int", "nested", "str", "Any"],
)
async def test_what_only_autogens_register_refuses_is_explained(make_runtime: MakeRuntime, types: Any) -> None:
    agent = _agent_for(*types)
    with pytest.raises(ValueError) as raised:
        async with make_runtime() as runtime:
            await agent.register(runtime, "agent", lambda: agent("a"))
    (note,) = raised.value.__notes__
    assert note == (
        "AutoGen's Agent.register does not accept this message type; natsrt.register(runtime, Agent, …) does"
    )
    async with make_runtime() as runtime:
        await natsrt.register(runtime, agent, "agent", lambda: agent("a"))


async def test_what_natsrt_refuses_too_is_not_explained(make_runtime: MakeRuntime) -> None:
    agent = _agent_for(NoMessage)
    with pytest.raises(ValueError, match="No serializers") as raised:
        async with make_runtime() as runtime:
            await agent.register(runtime, "agent", lambda: agent("a"))
    assert not hasattr(raised.value, "__notes__")


@natsrt_only
async def test_a_registration_whose_subscription_fails_leaves_nothing_behind(world: World) -> None:
    @default_subscription
    class Wrong(Recorder):
        pass

    Wrong.internal_unbound_subscriptions_list.append(lambda: [TypePrefixSubscription("no topic>", "recorder")])
    seen: list[Seen] = []
    with pytest.raises(ValueError, match="prefix"):
        await natsrt.register(world.host, Wrong, "recorder", lambda: Wrong(seen))
    with pytest.raises(LookupError):
        await world.host.try_get_underlying_agent_instance(AgentId("recorder", "k"))

    @default_subscription
    class Right(Recorder):
        pass

    await natsrt.register(world.host, Right, "recorder", lambda: Right(seen))
    await world.caller.publish_message(Text("a"), TopicId("default", "k"))
    await world.idle()
    assert contents(seen) == ["a"]


@natsrt_only
async def test_an_unregistered_type_is_no_longer_served_and_may_be_registered_again(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    await world.caller.send_message(Number(3), AgentId("counter", "k"))
    await world.host.unregister("counter")
    with pytest.raises(natsrt.NoLiveWorker):
        await world.caller.send_message(Number(3), AgentId("counter", "k"))
    await world.host.register_factory("counter", Counter)
    assert await world.caller.send_message(Number(1), AgentId("counter", "k")) == Number(1)


@natsrt_only
async def test_a_type_with_its_subscriptions_may_be_registered_again_after_it_was_unregistered(world: World) -> None:
    @default_subscription
    class Default(Recorder):
        pass

    seen: list[Seen] = []
    for n in range(2):
        await Default.register(world.host, "recorder", lambda: Default(seen))
        await world.caller.publish_message(Text(str(n)), TopicId("default", "k"))
        await world.idle()
        await world.host.unregister("recorder")
    assert contents(seen) == ["0", "1"]


# -- instances -------------------------------------------------------------------------------------------------------


async def test_a_registered_instance_is_called_by_its_id(world: World) -> None:
    agent = Counter()
    agent_id = AgentId("counter", "mine")
    assert await world.host.register_agent_instance(agent, agent_id) == agent_id
    assert await world.caller.send_message(Number(2), agent_id) == Number(2)
    assert agent.count == 2
    assert (agent.id, agent.runtime) == (agent_id, world.host)


async def test_two_instances_of_one_type_are_each_called_by_their_id(world: World) -> None:
    first, second = Counter(), Counter()
    await world.host.register_agent_instance(first, AgentId("counter", "first"))
    await world.host.register_agent_instance(second, AgentId("counter", "second"))
    for n in range(1, 11):
        await world.caller.send_message(Number(1), AgentId("counter", "first"))
        await world.caller.send_message(Number(10), AgentId("counter", "second"))
        assert (first.count, second.count) == (n, 10 * n)


@two_runtimes
async def test_instances_of_one_type_on_two_workers_are_each_called_by_their_id(world: World) -> None:
    first, second = Counter(), Counter()
    await world.host.register_agent_instance(first, AgentId("counter", "a.1"))
    await world.caller.register_agent_instance(second, AgentId("counter", "b *>"))
    for _ in range(10):
        for runtime in (world.host, world.caller):
            await runtime.send_message(Number(1), AgentId("counter", "a.1"))
            await runtime.send_message(Number(10), AgentId("counter", "b *>"))
    assert (first.count, second.count) == (20, 200)


async def test_an_instance_registered_by_itself_gets_events_of_its_key(world: World) -> None:
    seen: list[Seen] = []
    first, second = Recorder(seen), Recorder(seen)
    await first.register_instance(world.host, AgentId("recorder", "first"))
    await second.register_instance(world.host, AgentId("recorder", "second"))
    await world.caller.publish_message(Text("a"), TopicId("first", "first"))
    await world.caller.publish_message(Text("b"), TopicId("recorder:", "second"))
    await world.caller.publish_message(Text("c"), TopicId("second", "second"))
    await world.idle()
    assert sorted((one.message.content, one.agent.key) for one in seen) == [
        ("a", "first"),
        ("b", "second"),
        ("c", "second"),
    ]


@two_runtimes
async def test_instances_on_two_workers_get_the_events_of_their_own_key_once(world: World) -> None:
    @default_subscription
    class Default(Recorder):
        pass

    seen: list[Seen] = []
    for runtime, key in ((world.host, "first"), (world.caller, "second")):
        await Default(seen).register_instance(runtime, AgentId("recorder", key), skip_class_subscriptions=False)
    for n in range(20):
        for key in ("first", "second", "third"):
            await world.caller.publish_message(Text(f"{key} {n}"), TopicId("default", key))
    await world.idle()
    got = [(one.agent.key, one.message.content) for one in seen]
    for key in ("first", "second"):
        assert [content for agent, content in got if agent == key] == [f"{key} {n}" for n in range(20)]
    assert len(got) == 40


async def test_an_id_that_has_an_instance_cannot_get_another(world: World) -> None:
    await world.host.register_agent_instance(Counter(), AgentId("counter", "k"))
    with pytest.raises(ValueError, match="already exists"):
        await world.host.register_agent_instance(Counter(), AgentId("counter", "k"))


async def test_instances_of_one_type_have_one_class(world: World) -> None:
    await world.host.register_agent_instance(Counter(), AgentId("counter", "k"))
    with pytest.raises(ValueError, match="same object type"):
        await world.host.register_agent_instance(Recorder([]), AgentId("counter", "l"))


async def test_a_type_has_a_factory_or_instances_and_never_both(world: World) -> None:
    await world.host.register_factory("made", Counter)
    with pytest.raises(ValueError, match="cannot be registered to the same type"):
        await world.host.register_agent_instance(Counter(), AgentId("made", "k"))
    await world.host.register_agent_instance(Counter(), AgentId("given", "k"))
    with pytest.raises(ValueError, match=r"already exists|same type"):
        await world.host.register_factory("given", Counter)


@two_runtimes
async def test_conflicts_of_instances_and_factories_are_found_over_workers(world: World) -> None:
    await world.host.register_factory("made", Counter)
    with pytest.raises(ValueError, match="cannot be registered to the same type"):
        await world.caller.register_agent_instance(Counter(), AgentId("made", "k"))
    await world.host.register_agent_instance(Counter(), AgentId("given", "k"))
    with pytest.raises(ValueError, match="cannot be registered to the same type"):
        await world.caller.register_factory("given", Counter)
    with pytest.raises(ValueError, match="already exists"):
        await world.caller.register_agent_instance(Counter(), AgentId("given", "k"))


@natsrt_only
async def test_an_id_without_an_instance_is_unknown_and_the_error_lists_those_that_exist(world: World) -> None:
    await world.host.register_agent_instance(Counter(), AgentId("counter", "here"))
    with pytest.raises(UnknownAgent) as raised:
        await world.caller.send_message(Number(1), AgentId("counter", "there"))
    assert raised.value.known == ["counter/here"]


@natsrt_only
async def test_an_instance_bound_to_another_id_is_refused_and_leaves_nothing_behind(world: World) -> None:
    agent = Counter()
    await world.host.register_agent_instance(agent, AgentId("counter", "first"))
    with pytest.raises(RuntimeError, match="bound to a different ID"):
        await world.host.register_agent_instance(agent, AgentId("counter", "second"))
    with pytest.raises(RuntimeError, match="bound to a different ID"):
        await world.host.register_agent_instance(agent, AgentId("other", "k"))
    assert await world.caller.send_message(Number(1), AgentId("counter", "first")) == Number(1)
    with pytest.raises(UnknownAgent):
        await world.caller.send_message(Number(1), AgentId("counter", "second"))
    with pytest.raises(LookupError):
        await world.caller.send_message(Number(1), AgentId("other", "k"))
    await world.host.register_factory("other", Counter)


# -- get and try_get_underlying_agent_instance -----------------------------------------------------------------------


@pytest.mark.parametrize("given", ["counter", AgentType("counter")], ids=repr)
async def test_get_makes_an_id_of_type_and_key(world: World, given: str | AgentType) -> None:
    await world.host.register_factory("counter", Counter)
    assert await world.caller.get(given) == AgentId("counter", "default")
    assert await world.caller.get(given, "k") == AgentId("counter", "k")
    assert await world.caller.get(AgentId("counter", "x")) == AgentId("counter", "x")


async def test_get_makes_the_agent_only_when_asked_not_to_be_lazy(world: World) -> None:
    made: list[Counter] = []

    def factory() -> Counter:
        made.append(Counter())
        return made[-1]

    await world.host.register_factory("counter", factory)
    await world.caller.get("counter")
    assert made == []
    for _ in range(2):
        assert await world.caller.get("counter", lazy=False) == AgentId("counter", "default")
    assert len(made) == 1


async def test_get_of_an_unknown_type_that_is_not_lazy_is_a_lookup_error(world: World) -> None:
    assert await world.caller.get("nobody") == AgentId("nobody", "default")
    with pytest.raises(LookupError):
        await world.caller.get("nobody", lazy=False)


async def test_the_agent_behind_an_id_can_be_reached_in_its_own_runtime(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    agent = await world.host.try_get_underlying_agent_instance(AgentId("counter", "k"), Counter)
    assert type(agent) is Counter
    assert await world.host.try_get_underlying_agent_instance(AgentId("counter", "k")) is agent
    assert await world.caller.send_message(Number(4), AgentId("counter", "k")) == Number(4)
    assert agent.count == 4


async def test_the_agent_behind_an_id_must_be_of_the_type_asked_for(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    with pytest.raises(TypeError, match="not of type Recorder. It is of type Counter"):
        await world.host.try_get_underlying_agent_instance(AgentId("counter", "k"), Recorder)


async def test_the_agent_behind_an_unknown_type_is_a_lookup_error(world: World) -> None:
    with pytest.raises(LookupError, match="nobody"):
        await world.caller.try_get_underlying_agent_instance(AgentId("nobody", "k"))


@two_runtimes
async def test_the_agent_behind_an_id_is_not_accessible_from_another_runtime(world: World) -> None:
    await world.host.register_factory("counter", Counter)
    await world.host.register_agent_instance(Recorder([]), AgentId("instance", "k"))
    await world.caller.send_message(Number(4), AgentId("counter", "k"))
    for agent_id in (AgentId("counter", "k"), AgentId("instance", "k")):
        with pytest.raises(NotAccessibleError):
            await world.caller.try_get_underlying_agent_instance(agent_id)


@two_runtimes
async def test_an_agent_registered_elsewhere_a_moment_ago_is_not_accessible_rather_than_unknown(
    world: World,
) -> None:
    for n in range(50):
        await world.host.register_factory(f"counter-{n}", Counter)
        with pytest.raises(NotAccessibleError):
            await world.caller.try_get_underlying_agent_instance(AgentId(f"counter-{n}", "k"))


@two_runtimes
async def test_conflicts_are_found_over_workers_the_moment_after(world: World) -> None:
    for n in range(50):
        await world.host.register_agent_instance(Counter(), AgentId(f"given{n}", "k"))
        with pytest.raises(ValueError, match="cannot be registered to the same type"):
            await world.caller.register_factory(f"given{n}", Counter)
        with pytest.raises(ValueError, match="already exists"):
            await world.caller.register_agent_instance(Counter(), AgentId(f"given{n}", "k"))
