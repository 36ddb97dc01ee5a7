"""Errors that name what is wrong: a field, the path to a value, one of two classes with the same name."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, make_dataclass
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from pydantic import BaseModel, ConfigDict

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotDecode, CannotSerialize, UnhandledMessage
from natsrt.sending.replies import unknown_type
from natsrt.wire.serialization import JSON, Serialization


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str


@dataclass
class Holder:
    value: Any


@dataclass
class Declared:
    value: dict[str, list[Any]]


DAY = datetime.date(2026, 1, 1)


def test_a_field_that_a_model_forbids_is_named_and_its_value_is_not() -> None:
    serialization = Serialization()
    serialization.add_class(Closed)
    with pytest.raises(CannotDecode, match="type Closed: colour: extra_forbidden$"):
        serialization.decode("Closed", JSON, b'{"name": "a", "colour": "secret"}')
    with pytest.raises(CannotDecode) as error:
        serialization.decode("Closed", JSON, b'{"name": "a", "%s": 1}' % (b"k" * 1000))
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"a": {"b": [{"c": DAY}]}}, "a.b[].c"),
        ([1, {"k": [DAY]}], "[].k[]"),
        (Holder({"q": {"b": [DAY]}}), "value.q.b[]"),
        ({"anna@example.org": DAY, "b": 1}, "[]"),
        ({"k" * 61: DAY}, "[]"),
        (Declared({"anna": [{"born": DAY}]}), "value[][].born"),
    ],
    ids=repr,
)
def test_the_path_to_a_value_names_the_keys_that_are_names(message: Any, path: str) -> None:
    with pytest.raises(CannotSerialize) as error:
        Serialization().encode(message)
    assert error.value.reason.startswith(f"{path}: declared Any, but a value of type date")


def inner() -> type:
    return make_dataclass("Inner", [("n", int, 1)], namespace={"__module__": __name__})


@pytest.mark.parametrize("many", [False, True])
def test_a_value_of_a_later_definition_of_the_declared_class_is_explained(many: bool) -> None:
    first, second = inner(), inner()
    outer = make_dataclass("Outer", [("i", first | str if many else first)])
    serialization = Serialization()
    serialization.encode(outer(first()))
    with pytest.raises(CannotSerialize, match="if Inner was defined again, .* define the class that declares it again"):
        serialization.encode(outer(second()))


def test_a_reply_of_a_class_with_type_arguments_says_what_to_do() -> None:
    text = str(unknown_type(AgentId("a", "x"), "Box[In]", b"{}"))
    assert "reply_type=Box[In], or have the agent return Box(...)" in text
    assert "add_message_serializer" in str(unknown_type(AgentId("a", "x"), "Box", b"{}"))


OrderRequest: Any = make_dataclass("Request", [("n", int, 0)], namespace={"__module__": "orders"})
PaymentRequest: Any = make_dataclass("Request", [("n", int, 0)], namespace={"__module__": "payments"})


class Orders(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("handles orders")

    @message_handler
    async def order(self, message: OrderRequest, ctx: MessageContext) -> str:
        return "order"


class Payments(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("handles payments")

    @message_handler
    async def pay(self, message: PaymentRequest, ctx: MessageContext) -> str:
        return "payment"


@dataclass
class Basic:
    n: int


@dataclass
class Special(Basic):
    z: int = 0


class TakesBasic(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("handles the base class")

    @message_handler
    async def basic(self, message: Basic, ctx: MessageContext) -> str:
        return repr(message)


async def test_a_body_that_names_a_class_that_nothing_handles_is_unhandled(
    server: EmbeddedServer, namespace: str
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        await natsrt.register(worker, TakesBasic, "basic", TakesBasic)
        client = await nats.connect(server.url)
        try:
            data = '{"$type":"Special","n":1,"z":2}'
            call = '{"specversion":"1.0","type":"natsrt.call","id":"m","source":"/","messagetype":"Basic","data":%s}'
            for body in (data, call % data):
                reply = await client.request(f"{namespace}.agent.basic", body.encode(), timeout=5)
                assert b"natsrt.errors.UnhandledMessage" in reply.data and b"'Special'" in reply.data, reply.data
            for body in ('{"n":1}', '{"$type":"Basic","n":1}', call % '{"$type":"Basic","n":1}'):
                reply = await client.request(f"{namespace}.agent.basic", body.encode(), timeout=5)
                assert b"Basic(n=1)" in reply.data, reply.data
        finally:
            await client.close()


async def test_classes_with_the_same_name_have_full_names_in_errors(server: EmbeddedServer, namespace: str) -> None:
    async with (
        NatsAgentRuntime(server.url, namespace=namespace) as worker,
        NatsAgentRuntime(server.url, namespace=namespace) as caller,
    ):
        await natsrt.register(worker, Orders, "orders", Orders)
        with pytest.raises(UnhandledMessage, match="type 'payments.Request'; it handles: orders.Request$"):
            await caller.send_message(PaymentRequest(1), AgentId("orders", "x"))
        # A class that another agent of the worker handles is known there: the agent itself passes it over.
        await natsrt.register(worker, Payments, "payments", Payments)
        assert await caller.send_message(PaymentRequest(1), AgentId("orders", "x")) is None
