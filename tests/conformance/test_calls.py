"""``send_message``: what is sent is what the handler gets, and what it returns is what the caller gets."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import orjson
import PIL.Image
import pytest
from autogen_core import AgentId, Image, MessageContext, RoutedAgent, UnknownPayload, message_handler
from google.protobuf import struct_pb2, wrappers_pb2

from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotSerialize, UnhandledMessage, UnknownAgentType
from tests.conformance.conftest import MakeWorld, World, natsrt_only, plain_client, register
from tests.conformance.samples import Circle, Drawing, Line, Number, Point, Recorder, Seen, Shape, Text

ECHO = AgentId("echo", "k")


class Echo(RoutedAgent):
    """Returns what it gets, of any type that can be a message."""

    def __init__(self) -> None:
        super().__init__("echo")
        self.got: list[Any] = []

    @message_handler
    async def on_plain(
        self, message: str | int | float | bool | bytes | list | dict | None, ctx: MessageContext
    ) -> str | int | float | bool | bytes | list | dict | None:
        self.got.append(message)
        return message

    @message_handler
    async def on_structured(
        self, message: Text | Line | Drawing | Image, ctx: MessageContext
    ) -> Text | Line | Drawing | Image:
        self.got.append(message)
        return message

    @message_handler
    async def on_protobuf(
        self, message: wrappers_pb2.StringValue | struct_pb2.Struct, ctx: MessageContext
    ) -> wrappers_pb2.StringValue | struct_pb2.Struct:
        self.got.append(message)
        return message


def _struct() -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update({"name": "x", "values": [1, 2], "nested": {"flag": True}})
    return struct


MESSAGES: dict[str, Any] = {
    "a dataclass": Text("hello\n\x00 \U0001f600"),
    "a nested dataclass": Line(Point(1, 2.5), Point(3, 4.0), [Point(5, 6.0)], {"a": Point(7, 8.0)}),
    "a nested dataclass with its defaults": Line(Point(0, 0.0)),
    "a Pydantic model": Drawing(background=Shape(name="sky"), shapes=[Shape(name="s")]),
    "a Pydantic model with a subclass in a field": Drawing(
        background=Circle(name="sun", radius=1.5), shapes=[Shape(name="s"), Circle(name="c", radius=2.0)]
    ),
    "a protobuf wrapper": wrappers_pb2.StringValue(value="hello"),
    "a protobuf struct": _struct(),
    "str": "hello",
    "an empty str": "",
    "int": 2**63 - 1,
    "float": 0.1,
    "bool": False,
    "bytes": bytes(range(256)),
    "no bytes": b"",
    "list": [1, "two", None, [3.5, {"four": True}]],
    "dict": {"a": 1, "b": {"c": [None]}},
    "None": None,
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
async def test_a_message_arrives_and_its_reply_returns_as_what_they_were(world: World, message: Any) -> None:
    await register(world.host, Echo, "echo", Echo)
    reply = await world.caller.send_message(message, ECHO)
    assert type(reply) is type(message)
    assert reply == message
    agent = await world.host.try_get_underlying_agent_instance(ECHO, Echo)
    assert [type(got) for got in agent.got] == [type(message)]
    assert agent.got == [message]


async def test_an_image_arrives_pixel_by_pixel(world: World) -> None:
    await register(world.host, Echo, "echo", Echo)
    picture = PIL.Image.new("RGB", (4, 3), (10, 200, 30))
    picture.putpixel((1, 2), (255, 0, 7))
    reply = await world.caller.send_message(Image(picture), ECHO)
    assert isinstance(reply, Image)
    assert reply.image.convert("RGB").tobytes() == picture.tobytes()


async def test_a_subclass_in_a_field_of_its_base_class_keeps_its_type(world: World) -> None:
    await register(world.host, Echo, "echo", Echo)
    reply = await world.caller.send_message(
        Drawing(background=Shape(name="b"), shapes=[Circle(name="c", radius=2.0)]), ECHO
    )
    assert type(reply.background) is Shape
    assert type(reply.shapes[0]) is Circle
    assert reply.shapes[0].radius == 2.0


@natsrt_only
@pytest.mark.parametrize("value", [math.nan, [math.inf], 2**64, {1: "key"}, {"deep": [-math.inf]}], ids=repr)
async def test_what_json_cannot_carry_exactly_is_refused_before_it_is_sent(world: World, value: Any) -> None:
    await register(world.host, Echo, "echo", Echo)
    with pytest.raises(CannotSerialize):
        await world.caller.send_message(value, ECHO)
    agent = await world.host.try_get_underlying_agent_instance(ECHO, Echo)
    assert agent.got == []


@natsrt_only
async def test_an_object_that_is_no_message_is_refused_before_it_is_sent(world: World) -> None:
    with pytest.raises(CannotSerialize, match="object"):
        await world.caller.send_message(object(), ECHO)


@natsrt_only
async def test_a_reply_that_cannot_be_serialized_is_an_error_at_the_caller(world: World) -> None:
    class Bad(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Any:
            return object()

    await Bad.register(world.host, "bad", lambda: Bad("bad"))
    with pytest.raises(CannotSerialize):
        await world.caller.send_message(Text("x"), AgentId("bad", "k"))


class _WithUnknownHandler(Recorder):
    async def on_unhandled_message(self, message: Any, ctx: MessageContext) -> Any:
        self.seen.append(Seen(self.id, message, ctx))
        return Text(f"unhandled {type(message).__name__}")


@natsrt_only
async def test_a_type_that_the_receiver_does_not_know_is_a_typed_error_to_the_caller(world: World) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    with pytest.raises(UnhandledMessage) as raised:
        await world.caller.send_message(Number(1), AgentId("recorder", "k"))
    assert raised.value.type_name == "Number"
    assert raised.value.handled == ["Text"]
    assert world.host.running.counters.unknown_payloads == 1


@natsrt_only
async def test_a_call_of_a_type_that_only_another_process_knows_reaches_on_unhandled_message_with_its_body(
    world: World, server: EmbeddedServer, namespace: str
) -> None:
    seen: list[Seen] = []
    await _WithUnknownHandler.register(world.host, "recorder", lambda: _WithUnknownHandler(seen))
    await world.caller.wait_for("recorder")
    async with plain_client(server) as client:
        named = {"Natsrt-Type": "Foreign"}
        reply = await client.request(f"{namespace}.agent.recorder", b'{"value":1}', timeout=5, headers=named)
    assert orjson.loads(reply.data) == {"content": "unhandled UnknownPayload"}
    assert seen[0].message == UnknownPayload("Foreign", "application/json", b'{"value":1}')


async def test_a_known_type_without_a_handler_reaches_on_unhandled_message(world: World) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    await register(world.host, Echo, "echo", Echo)
    with_handler = await world.caller.send_message(Line(Point(1, 1.0)), ECHO)
    assert with_handler == Line(Point(1, 1.0))
    assert await world.caller.send_message(Line(Point(1, 1.0)), AgentId("recorder", "k")) is None


async def test_the_handler_sees_the_message_id_that_was_given(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    await world.caller.send_message(Text("a"), AgentId("recorder", "k"), message_id='my "id" \\ ü')
    assert seen[0].context.message_id == 'my "id" \\ ü'


async def test_a_message_without_an_id_gets_one_of_its_own(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    for _ in range(3):
        await world.caller.send_message(Text("a"), AgentId("recorder", "k"))
    ids = [one.context.message_id for one in seen]
    assert all(ids)
    assert len(set(ids)) == 3


async def test_two_calls_may_have_the_same_message_id(world: World) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    replies = [
        await world.caller.send_message(Text(str(n)), AgentId("recorder", "k"), message_id="same") for n in range(2)
    ]
    assert replies == [Text("k got 0"), Text("k got 1")]


@pytest.mark.parametrize("sender", [None, AgentId("boss", "k"), AgentId("boss", "a/b c.*>")], ids=str)
async def test_the_handler_sees_the_sender(world: World, sender: AgentId | None) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    await Recorder.register(world.host, "boss", lambda: Recorder([]))
    await world.caller.send_message(Text("a"), AgentId("recorder", "k"), sender=sender)
    context = seen[0].context
    assert (context.sender, context.topic_id, context.is_rpc) == (sender, None, True)


async def test_an_agent_that_sends_is_the_sender(world: World) -> None:
    seen: list[Seen] = []

    class Forwarder(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            return await self.send_message(message, AgentId("recorder", "inner"))

    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    await Forwarder.register(world.host, "forwarder", lambda: Forwarder("forwards"))
    reply = await world.caller.send_message(Text("a"), AgentId("forwarder", "outer"))
    assert reply == Text("inner got a")
    assert seen[0].context.sender == AgentId("forwarder", "outer")


async def test_each_key_is_an_agent_of_its_own(world: World) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    for key in ("a", "b", "a.b *>", "x" * 300):
        assert await world.caller.send_message(Text("hi"), AgentId("recorder", key)) == Text(f"{key} got hi")
    agents = [await world.host.try_get_underlying_agent_instance(AgentId("recorder", key), Recorder) for key in "ab"]
    assert agents[0] is not agents[1]


async def test_an_unknown_agent_type_is_an_error(world: World) -> None:
    error = UnknownAgentType if world.is_natsrt else Exception
    with pytest.raises(error):
        await world.caller.send_message(Text("a"), AgentId("nobody", "k"))


async def test_two_natsrt_runtimes_call_each_other_at_once(make_world: MakeWorld) -> None:
    world = await make_world()
    await Recorder.register(world.host, "first", lambda: Recorder([]))
    await Recorder.register(world.caller, "second", lambda: Recorder([]))
    replies = await asyncio.gather(
        *(world.caller.send_message(Text(f"c{n}"), AgentId("first", f"k{n}")) for n in range(50)),
        *(world.host.send_message(Text(f"h{n}"), AgentId("second", f"k{n}")) for n in range(50)),
    )
    assert replies == [Text(f"k{n} got c{n}") for n in range(50)] + [Text(f"k{n} got h{n}") for n in range(50)]
