"""``add_message_serializer``: what the user's own serializers write is what they read."""

from __future__ import annotations

from typing import Any

import pytest
from autogen_core import (
    AgentId,
    MessageContext,
    MessageSerializer,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    message_handler,
    try_get_known_serializers_for_type,
)

from natsrt.errors import CannotDecode, CannotSerialize
from tests.conformance.conftest import World, natsrt_only, register, two_runtimes
from tests.conformance.samples import Number, Recorder, Text


class Secret:
    """No message class by itself: only its serializer can send it."""

    def __init__(self, value: bytes) -> None:
        self.value = value


class SecretSerializer(MessageSerializer[Secret]):
    """Writes what ``content_type`` does not promise, byte for byte, and keeps what it reads."""

    def __init__(self, content_type: str) -> None:
        self._content_type = content_type
        self.read: list[bytes] = []

    @property
    def data_content_type(self) -> str:
        return self._content_type

    @property
    def type_name(self) -> str:
        return "Secret"

    def serialize(self, message: Secret) -> bytes:
        return message.value

    def deserialize(self, payload: bytes) -> Secret:
        self.read.append(payload)
        return Secret(payload)


class Keeper(RoutedAgent):
    def __init__(self, kept: list[bytes]) -> None:
        super().__init__("keeps secrets")
        self.kept = kept

    @message_handler
    async def on_secret(self, message: Secret, ctx: MessageContext) -> Secret:
        self.kept.append(message.value)
        return Secret(message.value[::-1])


JSON_BYTES = b' { "b" :1.0,\t"a": [ ],"data":"x" , "\\u00e9": 12345678901234567890123 } '


@natsrt_only
@pytest.mark.parametrize(
    ("content_type", "value"),
    [
        ("application/json", JSON_BYTES),
        ("application/json", b'"quoted \\" ,\\"data\\":1"'),
        ("application/octet-stream", bytes(range(256))),
        ('application/x-own; charset="odd"', b'\x00,"data":}'),
        ("application/x-own", b""),
    ],
)
async def test_a_serializer_of_ones_own_gets_back_exactly_the_bytes_it_wrote(
    world: World, content_type: str, value: bytes
) -> None:
    serializers = {runtime: SecretSerializer(content_type) for runtime in {world.host, world.caller}}
    for runtime, serializer in serializers.items():
        runtime.add_message_serializer(serializer)
    kept: list[bytes] = []
    await world.host.register_factory("keeper", lambda: Keeper(kept))
    await world.host.add_subscription(TypeSubscription("secrets", "keeper"))
    if content_type == "application/octet-stream" or not value.strip().startswith((b"{", b'"')):
        reply = await world.caller.send_message(Secret(value), AgentId("keeper", "k"))
        assert reply.value == value[::-1]
    await world.caller.publish_message(Secret(value), TopicId("secrets", "k"))
    await world.idle()
    assert kept[-1] == value
    assert value in serializers[world.host].read


@natsrt_only
async def test_a_serializer_that_raises_is_a_typed_error(world: World) -> None:
    class Broken(SecretSerializer):
        def serialize(self, message: Secret) -> bytes:
            raise RuntimeError("the secret")

    world.caller.add_message_serializer(Broken("application/json"))
    with pytest.raises(CannotSerialize, match="RuntimeError"):
        await world.caller.send_message(Secret(b"1"), AgentId("keeper", "k"))


@two_runtimes
async def test_a_serializer_that_cannot_read_is_a_typed_error_at_the_caller(world: World) -> None:
    class Broken(SecretSerializer):
        def deserialize(self, payload: bytes) -> Secret:
            raise RuntimeError("the secret")

    world.caller.add_message_serializer(SecretSerializer("application/json"))
    world.host.add_message_serializer(Broken("application/json"))
    await world.host.register_factory("keeper", lambda: Keeper([]))
    with pytest.raises(CannotDecode, match="RuntimeError"):
        await world.caller.send_message(Secret(b"1"), AgentId("keeper", "k"))
    assert world.host.running.counters.undecodable == 1


@natsrt_only
async def test_a_serializer_that_the_agent_class_names_is_registered_with_the_agent(world: World) -> None:
    class WithSerializer(Keeper):
        pass

    WithSerializer.internal_extra_handles_types.append((Secret, [SecretSerializer("application/x-own")]))

    kept: list[bytes] = []
    world.caller.add_message_serializer(SecretSerializer("application/x-own"))
    await world.host.register_factory("keeper", lambda: WithSerializer(kept), expected_class=WithSerializer)
    assert (await world.caller.send_message(Secret(b"ab"), AgentId("keeper", "k"))).value == b"ba"
    assert kept == [b"ab"]


@natsrt_only
async def test_a_serializer_of_autogen_is_replaced_by_one_that_keeps_nested_types(world: World) -> None:
    world.host.add_message_serializer(try_get_known_serializers_for_type(Text))
    world.host.add_message_serializer(try_get_known_serializers_for_type(Text)[0])
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    assert await world.caller.send_message(Text("a"), AgentId("recorder", "k")) == Text("k got a")


@two_runtimes
async def test_a_reply_that_only_its_sender_can_read_names_what_to_do_and_works_after_it_was_done(world: World) -> None:
    class Answerer(RoutedAgent):
        @message_handler
        async def on_number(self, message: Number, ctx: MessageContext) -> Any:
            return Secret(b'"a"')

    world.host.add_message_serializer(SecretSerializer("application/json"))
    await register(world.host, Answerer, "answerer", lambda: Answerer("answers"))
    with pytest.raises(CannotDecode, match="add_message_serializer"):
        await world.caller.send_message(Number(1), AgentId("answerer", "k"))
    world.caller.add_message_serializer(SecretSerializer("application/json"))
    assert (await world.caller.send_message(Number(1), AgentId("answerer", "k"))).value == b'"a"'
