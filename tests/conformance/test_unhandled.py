"""Messages that an agent has no handler for, and events for agents that do not exist."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from typing import Any

import pytest
from autogen_core import (
    EVENT_LOGGER_NAME,
    AgentId,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
    UnknownPayload,
    message_handler,
    type_subscription,
)
from autogen_core.logging import DeliveryStage, MessageEvent

from natsrt.embedded import EmbeddedServer
from natsrt.errors import UnhandledMessage, UnknownAgent
from natsrt.observe.first import FirstIsWarning
from natsrt.wire.serialization import Serialization
from tests.conformance.conftest import MakeWorld, World, natsrt_only, plain_client
from tests.conformance.samples import Number, Recorder, Text
from tests.support.clients import settled

NEWS = TopicId("news", "k")


@type_subscription("news")
class Quiet(RoutedAgent):
    """Has no handler for numbers."""

    def __init__(self) -> None:
        super().__init__("quiet")

    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> None: ...


class Keeper(Quiet):
    """Keeps what it has no handler for."""

    kept: list[Any]

    async def on_unhandled_message(self, message: Any, ctx: MessageContext) -> None:
        self.kept.append(message)


@dataclass
class Rare:
    """No other test has a class of this name."""

    value: int


async def publish_foreign(server: EmbeddedServer, namespace: str, body: bytes, times: int = 1) -> None:
    """Publish events of a type that no class in this process has."""
    async with plain_client(server) as client:
        for _ in range(times):
            await client.publish(f"{namespace}.topic.news.k", body, headers={"Natsrt-Type": "Foreign"})
        await settled(client)


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """The lines of all loggers, from DEBUG on."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    root, levels = logging.getLogger(), {}
    for name in ("natsrt", "autogen_core", EVENT_LOGGER_NAME):
        levels[name] = logging.getLogger(name).level
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(handler)
    yield records
    root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def of_natsrt(lines: list[logging.LogRecord], level: int) -> list[str]:
    return [one.getMessage() for one in lines if one.name.startswith("natsrt") and one.levelno == level]


async def test_on_unhandled_message_gets_the_object_where_its_class_is_known(world: World) -> None:
    @type_subscription("news")
    class Own(Keeper):
        kept = []

    await Own.register(world.host, "keeper", Own)
    await world.caller.publish_message(Rare(3), NEWS)
    await world.idle()
    assert Own.kept == [Rare(3)]


@natsrt_only
async def test_on_unhandled_message_gets_what_another_process_sent_with_its_type_and_body(
    world: World, server: EmbeddedServer, namespace: str
) -> None:
    @type_subscription("news")
    class Own(Keeper):
        kept = []

    await Own.register(world.host, "keeper", Own)
    await publish_foreign(server, namespace, b'{"value":3}')
    await world.idle()
    assert Own.kept == [UnknownPayload("Foreign", "application/json", b'{"value":3}')]


async def test_an_object_that_another_agents_handler_returns_is_known(world: World) -> None:
    @type_subscription("news")
    class Own(Keeper):
        kept = []

    class Maker(RoutedAgent):
        @message_handler
        async def make(self, message: Text, ctx: MessageContext) -> Number:
            return Number(1)

    await Own.register(world.host, "keeper", Own)
    await Maker.register(world.host, "maker", lambda: Maker("makes"))
    await world.caller.publish_message(Number(3), NEWS)
    await world.idle()
    assert Own.kept == [Number(3)]


async def test_events_without_a_handler_are_no_warning_each(world: World, lines: list[logging.LogRecord]) -> None:
    await Quiet.register(world.host, "quiet", Quiet)
    await Quiet.register(world.host, "other", Quiet)
    for n in range(20):
        await world.caller.publish_message(Rare(n), NEWS)
    await world.idle()
    unhandled = [one for one in lines if one.name == "autogen_core" and "Unhandled message" in one.getMessage()]
    assert [one.levelno for one in unhandled] == [logging.INFO] * 40
    delivered = [
        one.msg
        for one in lines
        if isinstance(one.msg, MessageEvent) and one.msg.kwargs["delivery_stage"] == str(DeliveryStage.DELIVER)
    ]
    assert len(delivered) == 40
    assert of_natsrt(lines, logging.WARNING) == []


@natsrt_only
async def test_events_of_an_unknown_type_are_one_warning_for_each_agent_type(
    world: World, server: EmbeddedServer, namespace: str, lines: list[logging.LogRecord]
) -> None:
    await Quiet.register(world.host, "quiet", Quiet)
    await Quiet.register(world.host, "other", Quiet)
    await publish_foreign(server, namespace, b"{}", times=20)
    await world.idle()
    warned = of_natsrt(lines, logging.WARNING)  # the class may be missing by mistake
    assert len(warned) == 2 and all("does not know messages of type Foreign" in text for text in warned)
    assert sum("does not know messages" in text for text in of_natsrt(lines, logging.DEBUG)) == 38


@natsrt_only
async def test_calls_without_a_handler_are_errors_to_their_callers_and_one_warning(
    world: World, lines: list[logging.LogRecord]
) -> None:
    await Quiet.register(world.host, "quiet", Quiet)
    for n in range(5):
        with pytest.raises(UnhandledMessage):
            await world.caller.send_message(Number(n), AgentId("quiet", "k"))
    assert len([text for text in of_natsrt(lines, logging.WARNING) if "does not know" in text]) == 1


@pytest.mark.parametrize("kind", ["type", "prefix"])
async def test_an_event_for_an_instance_that_does_not_exist_is_raised_where_asked_for(
    make_world: MakeWorld, kind: str, lines: list[logging.LogRecord]
) -> None:
    world = await make_world(ignore_unhandled_exceptions=False)
    seen: list[Any] = []
    await world.host.register_agent_instance(Recorder(seen), AgentId("one", "here"))
    subscription = TypeSubscription("news", "one") if kind == "type" else TypePrefixSubscription("ne", "one")
    await world.host.add_subscription(subscription)
    await world.caller.publish_message(Text("a"), TopicId("news", "here"))
    await world.idle()
    assert [one.message for one in seen] == [Text("a")]
    for _ in range(3):
        await world.caller.publish_message(Text("b"), TopicId("news", "elsewhere"))
    if world.is_natsrt:
        assert world.caller.health().undelivered_events == 3
        assert (
            len([text for text in of_natsrt(lines, logging.WARNING) if "there is no agent one/elsewhere" in text]) == 1
        )
    with pytest.raises(LookupError if world.is_natsrt else RuntimeError) as raised:
        await world.caller.stop_when_idle()
    if world.is_natsrt:
        assert isinstance(raised.value, UnknownAgent) and raised.value.known == ["one/here"]
    assert len(seen) == 1


@natsrt_only
async def test_an_event_for_an_instance_that_does_not_exist_is_otherwise_only_counted(world: World) -> None:
    seen: list[Any] = []
    await world.host.register_agent_instance(Recorder(seen), AgentId("one", "here"))
    await world.host.add_subscription(TypeSubscription("news", "one"))
    await world.caller.publish_message(Text("b"), TopicId("news", "elsewhere"))
    await world.caller.publish_message(Text("b"), TopicId("news", "here"), sender=AgentId("one", "here"))
    await world.idle()
    assert world.caller.health().undelivered_events == 1
    await world.host.register_agent_instance(Recorder(seen), AgentId("one", "elsewhere"))
    await world.idle()
    await world.caller.publish_message(Text("c"), TopicId("news", "elsewhere"))
    await world.idle()
    assert world.caller.health().undelivered_events == 1
    assert [one.message for one in seen] == [Text("c")]


def class_of(module: str, name: str) -> type:
    made = make_dataclass(name, [("n", int)])
    made.__module__ = module  # an argument of make_dataclass since Python 3.12 only
    return made


def test_a_class_is_known_in_the_whole_process_while_only_one_has_its_name() -> None:
    first, receiver = class_of("first", "Sibling"), Serialization()
    unknown = receiver.decode(*Serialization().encode(first(1)))
    assert receiver.decode_unregistered(unknown) == first(1)
    second, other = class_of("second", "Sibling"), Serialization()
    other.add_class(second)
    assert receiver.decode_unregistered(unknown) is unknown
    assert receiver.decode_unregistered(unknown, "second.Sibling") == second(1)
    assert receiver.decode_unregistered(unknown, "first.Sibling") == first(1)
    del second, other, receiver
    gc.collect()
    assert Serialization().decode_unregistered(unknown) == first(1)


def test_a_class_that_is_defined_again_takes_the_place_of_the_former_one() -> None:
    former, receiver = class_of("notebook", "Cell"), Serialization()
    unknown = receiver.decode(*Serialization().encode(former(1)))
    again = class_of("notebook", "Cell")
    Serialization().encode(again(1))
    assert receiver.decode_unregistered(unknown) == again(1)


def test_the_first_line_about_a_subject_is_a_warning() -> None:
    first = FirstIsWarning()
    assert [first.level("a", 1), first.level("a", 1), first.level("a", 2)] == [30, 10, 30]
    for number in range(20_000):
        first.level("many", number)
    assert len(first._seen) <= 10_000
