"""Objects inside messages, classes of one name, and classes that are defined again."""

from __future__ import annotations

import datetime
import enum
import types
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import orjson
import pytest
from autogen_core import (
    AgentId,
    ClosureAgent,
    ClosureContext,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    message_handler,
)
from pydantic import BaseModel

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotDecode, CannotSerialize, UnhandledMessage
from natsrt.jetstream.registry.entries import TypeEntry
from tests.conformance.conftest import World, natsrt_only, plain_client, register, two_runtimes
from tests.programs import orders, payments
from tests.support.processes import Processes, eventually

T = TypeVar("T")
WORKER = Path(__file__).parents[1] / "programs" / "classes_worker.py"


# -- objects where the declaration does not name their class ---------------------------------------------------------


@dataclass
class Piece:
    name: str


@dataclass(frozen=True)
class Frozen:
    name: str


class Model(BaseModel):
    content: Any


class Outer:
    @dataclass
    class Inner:
        name: str


class Place(NamedTuple):
    name: str


class Color(enum.Enum):
    RED = "red"


class Names(list[str]):
    pass


@dataclass
class Parcel:
    content: Any


@dataclass
class Crate(Generic[T]):
    content: T


@dataclass
class Undeclared:
    rows: list  # type: ignore[type-arg]
    by_name: dict  # type: ignore[type-arg]


@dataclass
class Shelves:
    pair: tuple[Any, ...]
    frozen: frozenset[Any]
    either: Any | None = None


CONTENTS = [
    [Piece("a")],
    {"x": Piece("a"), "y": [Piece("b")]},
    [[Piece("a")], {}],
    [Model(content=[Piece("a")])],
    {"deep": Parcel(Model(content={"k": Crate(Piece("a"))}))},
    [Outer.Inner("a")],
    {"$type": "mine", "n": 1},
    [{"$type": 1}, {"$type": "Piece", "name": "a"}, {"$type": "dict", "value": {}}],
    {"$type": "Piece", "$class": "x.Piece", "name": "a"},
    {"$class": "x.Piece"},
]
MESSAGES = [
    *map(Parcel, CONTENTS),
    *CONTENTS[:6],
    Crate(Piece("a")),
    Crate([Crate(Piece("a"))]),
    Undeclared([Piece("a"), (1)], {"a": Piece("b"), "b": {"$type": "x"}}),
    Shelves((Piece("a"), 1), frozenset({Frozen("a")}), {"k": Piece("b")}),
    Model(content=(Piece("a"))),
]


class Echo(RoutedAgent):
    """Returns what it gets, and keeps it."""

    def __init__(self) -> None:
        super().__init__("returns what it gets")
        self.kept: list[Any] = []

    @message_handler
    async def on_message(
        self,
        message: Parcel | Crate | Undeclared | Shelves | Model | list | dict,  # type: ignore[type-arg]
        ctx: MessageContext,
    ) -> Any:
        self.kept.append(message)
        return message


@natsrt.keyed
class KeyedEcho(Echo):
    pass


@pytest.mark.parametrize("agent_class", [Echo, KeyedEcho])
async def test_objects_in_messages_events_and_replies_arrive_as_they_were_sent(
    world: World, agent_class: type[Echo]
) -> None:
    await register(world.host, agent_class, "echo", agent_class)
    await world.host.add_subscription(TypeSubscription("parcels", "echo"))
    for message in MESSAGES:
        reply = await world.caller.send_message(message, AgentId("echo", "k"))
        assert type(reply) is type(message) and repr(reply) == repr(message)
        await world.caller.publish_message(message, TopicId("parcels", "k"))
    await world.idle()
    agent = await world.host.try_get_underlying_agent_instance(AgentId("echo", "k"), Echo)
    expected = [repr(message) for message in MESSAGES for _ in range(2)]
    await eventually(lambda: len(agent.kept) == len(expected))
    assert [repr(message) for message in agent.kept] == expected


@natsrt_only
@pytest.mark.parametrize(
    "content",
    [
        (1, 2),
        {1, 2},
        [Place("a")],
        [Color.RED],
        {"k": datetime.datetime(2026, 1, 1)},
        uuid.UUID(int=1),
        [b"x"],
        [Names(["a"])],
        Parcel((1,)),
    ],
    ids=repr,
)
async def test_what_would_arrive_as_something_else_is_refused_with_its_place_and_type(
    world: World, content: Any
) -> None:
    await register(world.host, Echo, "echo", Echo)
    inner = content
    while isinstance(inner, list | dict | Parcel) and type(inner) is not Names:
        inner = inner.content if isinstance(inner, Parcel) else [*(inner.values() if type(inner) is dict else inner)][0]
    with pytest.raises(CannotSerialize, match=f"content.*{type(inner).__name__}"):
        await world.caller.send_message(Parcel(content), AgentId("echo", "k"))


@natsrt_only
async def test_a_plain_body_that_names_an_unknown_class_is_an_error_with_its_name(
    world: World, server: EmbeddedServer, namespace: str
) -> None:
    await register(world.host, Echo, "echo", Echo)
    async with plain_client(server) as client:
        for body in ({"content": [{"$type": "Nowhere", "n": 1}]}, {"content": {"$type": "Nowhere"}}):
            headers = {"Natsrt-Type": "Parcel"}
            reply = await client.request(f"{namespace}.agent.echo", orjson.dumps(body), headers=headers, timeout=5)
            error = orjson.loads(reply.data)
            assert error["type"] == "natsrt.errors.CannotDecode"
            assert "content" in error["message"] and "names Nowhere" in error["message"]
    assert world.host.running.counters.undecodable == 2


# -- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def remote(server: EmbeddedServer, namespace: str, processes: Processes) -> NatsAgentRuntime:
    """A runtime that calls the agents of ``classes_worker.py``."""
    worker = processes.python(WORKER, server.url, namespace)
    await eventually(lambda: "ready" in worker.stdout, 20)
    return NatsAgentRuntime(server.url, namespace=namespace)


async def test_a_worker_hosts_two_services_whose_classes_have_the_same_names_and_fields(
    remote: NatsAgentRuntime,
) -> None:
    async with remote:
        for service, agent, said in ((orders, "orders", "ordered 7"), (payments, "payments", "paid 7")):
            for content in (None, [service.Item("a")], {"both": [orders.Item("a"), payments.Item("a")]}):
                for reply_type in (None, service.Response):
                    reply = await remote.send_message(
                        service.Request("7", content), AgentId(agent, "k"), reply_type=reply_type
                    )
                    assert type(reply) is service.Response
                    assert reply == service.Response(said, content)
            assert await remote.send_message(service.Request("7"), AgentId("either", "k")) == service.__name__
        batch = orders.Batch([orders.Item("a")])
        assert await remote.send_message(batch, AgentId("orders", "k")) == batch


async def test_the_class_of_another_service_is_not_converted(remote: NatsAgentRuntime) -> None:
    async with remote:
        assert await remote.send_message(payments.Request("7"), AgentId("orders", "k")) is None  # as in AutoGen


async def test_a_reply_with_a_class_that_is_unknown_here_names_it_and_what_to_do(remote: NatsAgentRuntime) -> None:
    stranger = AgentId("stranger", "k")
    async with remote:
        for kind, name in (("alone", "Alone"), ("in a list", "Inside")):
            with pytest.raises(CannotDecode, match=rf"{name}.*reply_type"):
                await remote.send_message(kind, stranger)
            local = make_dataclass(name, [("name", str)])
            reply_type, expected = (local, local("a")) if kind == "alone" else (list[local], [local("a")])  # type: ignore[valid-type]
            assert await remote.send_message(kind, stranger, reply_type=reply_type) == expected


async def test_a_plain_body_names_its_class_in_full_where_one_agent_handles_two(
    remote: NatsAgentRuntime, server: EmbeddedServer, namespace: str
) -> None:
    async def ask(agent: str, type_name: str) -> Any:
        headers = {"Natsrt-Type": type_name}
        reply = await client.request(f"{namespace}.agent.{agent}", b'{"text":"7"}', headers=headers, timeout=5)
        return orjson.loads(reply.data)

    async with plain_client(server) as client:
        assert (await ask("orders", "Request"))["text"] == "ordered 7"
        assert (await ask("payments", "Request"))["text"] == "paid 7"
        for module in (orders, payments):
            assert await ask("either", f"{module.__name__}.Request") == module.__name__
        undecided = await ask("either", "Request")
        assert undecided["type"] == "natsrt.errors.CannotDecode"
        for expected in ("tests.programs.orders.Request", "tests.programs.payments.Request", "Natsrt-Type"):
            assert expected in undecided["message"]
        reply = await client.request(f"{namespace}.agent.either", b'{"text":"7"}', timeout=5)
        assert "tests.programs.payments.Request" in orjson.loads(reply.data)["message"]


# -- several classes of one name -------------------------------------------------------------------------------------


class Both(RoutedAgent):
    """Handles the requests of both services, and keeps them."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__("both")
        self.kept = kept

    @message_handler
    async def on_order(self, message: orders.Request, ctx: MessageContext) -> orders.Response:
        self.kept.append(message)
        return orders.Response("order", message.content)

    @message_handler
    async def on_payment(self, message: payments.Request, ctx: MessageContext) -> payments.Response:
        self.kept.append(message)
        return payments.Response("payment", message.content)


async def test_one_agent_handles_two_classes_of_one_name(world: World) -> None:
    kept: list[Any] = []
    await register(world.host, Both, "both", lambda: Both(kept))
    await world.host.add_subscription(TypeSubscription("requests", "both"))
    sent = [service.Request("7", [orders.Item("a"), payments.Item("a")]) for service in (orders, payments)]
    replies = [await world.caller.send_message(message, AgentId("both", "k")) for message in sent]
    assert [(type(reply), reply.text) for reply in replies] == [
        (orders.Response, "order"),
        (payments.Response, "payment"),
    ]
    for reply in replies:
        assert reply.content == sent[0].content
    for message in sent:
        await world.caller.publish_message(message, TopicId("requests", "k"))
    await world.idle()
    assert kept == sent * 2


async def test_a_closure_agent_gets_the_class_of_its_own(world: World) -> None:
    got: list[Any] = []

    async def on_payment(context: ClosureContext, message: payments.Request, ctx: MessageContext) -> None:
        got.append(message)

    await register(world.host, orders.Orders, "orders", orders.Orders)
    subscriptions = [TypeSubscription("requests", "closure"), TypeSubscription("requests", "orders")]
    await ClosureAgent.register_closure(world.host, "closure", on_payment, subscriptions=lambda: subscriptions[:1])
    await world.caller.publish_message(payments.Request("7"), TopicId("requests", "k"))
    await world.idle()
    assert got == [payments.Request("7")]


async def test_a_handler_never_gets_an_object_of_another_class_of_the_same_name(world: World) -> None:
    await register(world.host, orders.Orders, "orders", orders.Orders)
    try:
        reply = await world.caller.send_message(payments.Request("7"), AgentId("orders", "k"))
    except UnhandledMessage:
        reply = None
    assert reply is None


@natsrt_only
async def test_the_registry_lists_each_name_once(world: World) -> None:
    await register(world.host, Both, "both", lambda: Both([]))
    entry = world.host.running.registry.view.entry(f"r.type.both.{world.host.worker_id}")
    assert isinstance(entry, TypeEntry)
    assert (entry.handles, entry.produces) == (("Request",), ("Response",))


@two_runtimes
async def test_a_serializer_of_ones_own_is_for_its_class_only(world: World) -> None:
    class Reversed:
        cls = payments.Request
        type_name = "Request"
        data_content_type = "application/json"

        def serialize(self, message: payments.Request) -> bytes:
            return orjson.dumps(message.text[::-1])

        def deserialize(self, payload: bytes) -> payments.Request:
            return payments.Request(orjson.loads(payload)[::-1])

    for runtime in (world.caller, world.host):
        runtime.add_message_serializer(Reversed())
    kept: list[Any] = []
    await register(world.host, Both, "both", lambda: Both(kept))
    for service in (orders, payments):
        await world.caller.send_message(service.Request("abc"), AgentId("both", "k"))
    assert kept == [orders.Request("abc"), payments.Request("abc")]


ELSEWHERE = types.SimpleNamespace(Made=make_dataclass("OnlyMadeElsewhere", [("n", int)]))
"""Not in the namespace of this module, where it would be found."""
ELSEWHERE.Made.__module__ = "elsewhere"


class Maker(RoutedAgent):
    @message_handler
    async def make(self, message: Piece, ctx: MessageContext) -> ELSEWHERE.Made:  # type: ignore[valid-type]
        return ELSEWHERE.Made(1)


@natsrt_only
async def test_a_class_that_only_a_handler_returns_is_found(
    world: World, server: EmbeddedServer, namespace: str
) -> None:
    await register(world.host, Maker, "maker", lambda: Maker("makes"))
    await register(world.host, Echo, "echo", Echo)
    async with plain_client(server) as client:
        body, headers = b'[{"$type":"OnlyMadeElsewhere","n":1}]', {"Natsrt-Type": "list"}
        reply = await client.request(f"{namespace}.agent.echo", body, headers=headers, timeout=5)
    assert orjson.loads(reply.data) == orjson.loads(body)


# -- classes that are defined again ----------------------------------------------------------------------------------

CELL = """
from dataclasses import dataclass, make_dataclass
from typing import Any
from autogen_core import MessageContext, RoutedAgent, message_handler

class Failed(Exception):
    pass

@dataclass
class Part:
    name: str

@dataclass
class Ask:
    text: str
    content: Any = None

@dataclass
class Answer:
    text: str
    content: Any = None

class Agent(RoutedAgent):
    def __init__(self):
        super().__init__("agent")

    @message_handler
    async def answer(self, message: Ask, ctx: MessageContext) -> Answer:
        if message.text == "fail":
            raise Failed("failed")
        return Answer(message.text, message.content)
"""


SIMPLE = CELL.replace("-> Answer", "-> str").replace(
    "return Answer(message.text, message.content)", "return message.text"
)
"""AutoGen refuses what a handler of the former agent class returns if that is of the later class."""


class Notebook:
    """A module whose one cell runs again and again."""

    def __init__(self, name: str) -> None:
        self.names: dict[str, Any] = {"__name__": name}

    def run(self, cell: str = CELL) -> None:
        exec(compile(cell, "<cell>", "exec", dont_inherit=True), self.names)

    def __getattr__(self, name: str) -> Any:
        return self.names[name]


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    notebook = Notebook("notebook_of_a_test")
    notebook.run()
    yield notebook


@pytest.mark.parametrize("again", ["first", "second"])
async def test_a_class_that_is_defined_again_takes_the_place_of_the_former_one(
    world: World, notebook: Notebook, again: str
) -> None:
    if not world.is_natsrt and again == "first":
        pytest.skip("AutoGen's runtime cannot unregister")
    await register(world.host, notebook.Agent, "first", notebook.Agent)
    await world.caller.send_message(notebook.Ask("a"), AgentId("first", "k"))
    notebook.run()
    if again == "first":
        await world.host.unregister("first")
    await register(world.host, notebook.Agent, again, notebook.Agent)
    reply = await world.caller.send_message(notebook.Ask("b", [notebook.Part("x")]), AgentId(again, "k"))
    assert reply == notebook.Answer("b", [notebook.Part("x")])


@natsrt_only
async def test_agents_of_the_former_class_go_on_working(world: World, notebook: Notebook) -> None:
    notebook.run(SIMPLE)
    await register(world.host, notebook.Agent, "first", notebook.Agent)
    notebook.run(SIMPLE)
    assert await world.caller.send_message(notebook.Ask("a"), AgentId("first", "k")) == "a"
    await register(world.host, notebook.Agent, "second", notebook.Agent)
    for agent in ("first", "second", "first"):
        reply = await world.caller.send_message(notebook.Ask(agent, [notebook.Part("x")]), AgentId(agent, "k"))
        assert reply == agent


@natsrt_only
async def test_two_definitions_are_in_use_in_one_agent_type(world: World, notebook: Notebook) -> None:
    notebook.run(SIMPLE)
    await world.host.register_factory("agents", lambda: notebook.Agent())
    assert (await world.caller.send_message(notebook.Ask("a"), AgentId("agents", "old"))) == "a"
    notebook.run(SIMPLE.replace("content: Any = None", "content: Any = None\n    more: int = 0"))
    for key in ("new", "old"):
        reply = await world.caller.send_message(notebook.Ask("b", more=1), AgentId("agents", key))
        assert reply == "b"


@natsrt_only
async def test_the_last_definition_of_an_error_is_raised(world: World, notebook: Notebook) -> None:
    world.caller.add_error_type(notebook.Failed)
    notebook.run()
    world.caller.add_error_type(notebook.Failed)
    await register(world.host, notebook.Agent, "agent", notebook.Agent)
    with pytest.raises(notebook.Failed):
        await world.caller.send_message(notebook.Ask("fail"), AgentId("agent", "k"))
