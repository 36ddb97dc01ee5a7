"""NATS services as agents, and agents as NATS services, with real responders and the real ``nats`` command."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
import nats.micro
import pytest
from autogen_core import AgentId, CancellationToken, MessageContext, RoutedAgent, rpc
from nats.aio.client import Client
from nats.aio.msg import Msg
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, computed_field, field_serializer
from typing_extensions import TypedDict

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.contrib.arguments import checked_timeout
from natsrt.contrib.services import OfferedService, ServiceAgent, offer_service
from natsrt.contrib.services.json_types import JsonType
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotDecode
from natsrt.plain import PlainMessage
from tests.support.processes import Processes, eventually

Make = Callable[..., Any]
Answer = Callable[[Msg], Awaitable[None]]
AGENT = AgentId("weather", "default")


@dataclass
class Place:
    city: str
    days: list[int] = field(default_factory=list)


@dataclass
class Query:
    place: Place
    unit: str = "C"


class Weather(BaseModel):
    city: str
    degrees: float = Field(alias="temp")


@dataclass
class Snow:
    depth: int


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    """Starts runtimes."""
    async with AsyncExitStack() as stack:

        async def runtime(url: str = server.url, **settings: Any) -> NatsAgentRuntime:
            return await stack.enter_async_context(NatsAgentRuntime(url, namespace=namespace, **settings))

        yield runtime


@pytest.fixture
async def plain(server: EmbeddedServer) -> AsyncIterator[Client]:
    """A plain NATS client."""
    client = await nats.connect(server.url)
    yield client
    await client.close()


@pytest.fixture
def respond(plain: Client, namespace: str) -> Callable[[Answer], Awaitable[str]]:
    """Starts a plain responder, and returns its subject."""

    async def start(answer: Answer) -> str:
        subject = f"{namespace}.weather.get"
        await plain.subscribe(subject, cb=answer)
        await plain.flush()
        return subject

    return start


async def ask(runtime: NatsAgentRuntime, message: Any, subject: str, **arguments: Any) -> Any:
    """Register a service agent, call it, and return the reply."""
    await serve(runtime, subject, **arguments)
    return await runtime.send_message(message, AGENT)


async def serve(runtime: NatsAgentRuntime, subject: str, **arguments: Any) -> None:
    arguments = {"request_type": Query, "response_type": Weather} | arguments
    await natsrt.register(runtime, ServiceAgent, "weather", lambda: ServiceAgent(subject=subject, **arguments))


QUERY = Query(Place("Köln", [1, 2]))
WEATHER = Weather(city="Köln", temp=21.5)
ANSWER = '{"city": "Köln", "temp": 21.5, "more": null}'.encode()


async def sends(message: Msg, *replies: tuple[bytes, dict[str, str] | None] | bytes) -> None:
    for reply in replies:
        payload, headers = reply if isinstance(reply, tuple) else (reply, None)
        await message._client.publish(message.reply, payload, headers=headers)


# -- a responder as an agent -------------------------------------------------------------------------------------------


async def test_a_message_becomes_json_and_the_json_reply_an_object(make: Make, respond: Make) -> None:
    seen: list[Msg] = []

    async def answer(message: Msg) -> None:
        seen.append(message)
        await sends(message, ANSWER)

    subject = await respond(answer)
    await serve(await make(), subject, headers={"X-Caller": "natsrt"})
    assert await (await make()).send_message(QUERY, AGENT, reply_type=Weather) == WEATHER
    [request] = seen
    assert json.loads(request.data) == {"place": {"city": "Köln", "days": [1, 2]}, "unit": "C"}
    assert request.headers == {"X-Caller": "natsrt"}
    assert await (await make()).send_message(QUERY, AgentId("weather", "other"), reply_type=Weather) == WEATHER


@pytest.mark.parametrize(
    ("request_type", "message", "payload", "response_type", "reply", "result"),
    [
        (str, "ü", '"ü"'.encode(), int, b"5", 5),
        (bytes, b"\x00\xff", b"\x00\xff", bytes, b"not json", b"not json"),
        (Place, Place("a"), b'{"city":"a","days":[]}', type(None), b"", None),
        (Weather, WEATHER, '{"city":"Köln","temp":21.5}'.encode(), None, b"null", None),
        (dict, {"a": [1]}, b'{"a":[1]}', list, b'[1, "b"]', [1, "b"]),
        (int, 2**60, str(2**60).encode(), Weather | Snow, b'{"depth": 3}', Snow(3)),
    ],
)
async def test_types_travel_as_json(
    make: Make,
    respond: Make,
    request_type: Any,
    message: Any,
    payload: bytes,
    response_type: Any,
    reply: bytes,
    result: Any,
) -> None:
    seen: list[bytes] = []

    async def answer(request: Msg) -> None:
        seen.append(request.data)
        await sends(request, reply)

    subject = await respond(answer)
    got = await ask(await make(), message, subject, request_type=request_type, response_type=response_type)
    assert (seen, got) == ([payload], result)


async def test_an_agent_that_asks_a_service_is_called_by_plain_clients_too(
    make: Make, respond: Make, plain: Client, namespace: str
) -> None:
    async def answer(message: Msg) -> None:
        await sends(message, ANSWER)

    await serve(await make(), await respond(answer))
    reply = await plain.request(f"{namespace}.agent.weather", json.dumps({"place": {"city": "a"}}).encode())
    assert json.loads(reply.data) == {"city": "Köln", "temp": 21.5}


class WeatherStation(ServiceAgent):
    """A class of its own, as users write one for each service."""

    def __init__(self, subject: str) -> None:
        super().__init__(subject=subject, request_type=Query, response_type=Weather)
        self.asked = 0

    async def _items(self, message: Any, ctx: MessageContext) -> AsyncGenerator[Any, None]:
        self.asked += 1
        async for item in super()._items(message, ctx):
            yield item


async def test_a_service_agent_can_have_subclasses(make: Make, respond: Make, namespace: str) -> None:
    async def answer(request: Msg) -> None:
        await request.respond(b'{"city": "Rome", "temp": 1}')

    subject = await respond(answer)
    runtime = await make()
    await natsrt.register(runtime, WeatherStation, "weather", lambda: WeatherStation(subject))
    assert await runtime.send_message(Query(Place("Rome")), AGENT) == Weather(city="Rome", temp=1)
    station = await runtime.try_get_underlying_agent_instance(AGENT, WeatherStation)
    assert station.asked == 1


async def test_a_service_of_the_nats_library_is_an_agent(make: Make, plain: Client, namespace: str) -> None:
    service = await nats.micro.add_service(plain, name="weather", version="1.0.0")

    async def handle(request: nats.micro.Request) -> None:
        if b"nowhere" in request.data:
            await request.respond_error("404", "there is no such place")
        else:
            await request.respond(ANSWER)

    subject = f"{namespace}.weather"
    await service.add_endpoint(name="get", subject=subject, handler=handle)
    runtime = await make()
    assert await ask(runtime, QUERY, subject) == WEATHER
    with pytest.raises(natsrt.ServiceError, match="answered with error 404: there is no such place") as raised:
        await runtime.send_message(Query(Place("nowhere")), AGENT)
    assert (raised.value.subject, raised.value.code, raised.value.description) == (
        subject,
        404,
        "there is no such place",
    )
    await service.stop()


@pytest.mark.parametrize(
    ("headers", "code", "description"),
    [
        ({"Nats-Service-Error": "no"}, 500, "no"),
        ({"Nats-Service-Error": "no", "Nats-Service-Error-Code": "E17"}, 500, "no"),
        ({"Nats-Service-Error-Code": "429"}, 429, "it gives no description"),
    ],
)
async def test_errors_of_services_are_typed(
    make: Make, respond: Make, headers: dict[str, str], code: int, description: str
) -> None:
    async def answer(message: Msg) -> None:
        await sends(message, (ANSWER, headers))

    with pytest.raises(natsrt.ServiceError) as raised:
        await ask(await make(), QUERY, await respond(answer))
    assert (raised.value.code, raised.value.description) == (code, description)


@pytest.mark.parametrize(
    ("reply", "response_type", "problem"),
    [
        (b"sunny", Weather, "Invalid JSON"),
        (b"", Weather, "it is empty, and Weather was expected"),
        (b'{"city": "a"}', Weather, "temp: Field required"),
        (b'{"city": "secret", "temp": "warm"}', Weather, "temp: Input should be a valid number"),
        (b"[" * 100_000, Weather, "Invalid JSON"),
        (b"\xff", str, "Invalid JSON|Input should be a valid string"),
    ],
)
async def test_a_bad_reply_is_a_clear_error(
    make: Make, respond: Make, reply: bytes, response_type: Any, problem: str
) -> None:
    async def answer(message: Msg) -> None:
        await sends(message, reply)

    subject = await respond(answer)
    with pytest.raises(natsrt.CannotDecode, match=f"cannot decode the reply of {subject}: .*{problem}") as raised:
        await ask(await make(), QUERY, subject, response_type=response_type)
    assert "secret" not in str(raised.value) and "warm" not in str(raised.value)


async def test_a_request_that_no_json_can_hold_is_not_sent(make: Make, respond: Make) -> None:
    async def answer(message: Msg) -> None:
        pytest.fail("it was sent")

    runtime = await make()
    await serve(runtime, await respond(answer), request_type=float)
    with pytest.raises(natsrt.NatsrtError, match="cannot serialize"):
        await runtime.send_message(float("nan"), AGENT)


async def test_nobody_who_listens_is_an_error_at_once_and_silence_one_in_time(
    make: Make, respond: Make, namespace: str
) -> None:
    runtime = await make()
    began = time.monotonic()
    with pytest.raises(natsrt.NoResponders, match=f"nobody listens on the subject '{namespace}.none'") as raised:
        await ask(runtime, QUERY, f"{namespace}.none", timeout=30)
    assert raised.value.subject == f"{namespace}.none"
    assert time.monotonic() - began < 2

    async def silent(message: Msg) -> None: ...

    subject = await respond(silent)
    await natsrt.register(
        runtime,
        ServiceAgent,
        "silent",
        lambda: ServiceAgent(subject=subject, request_type=Query, response_type=Weather, timeout=0.2),
    )
    with pytest.raises(natsrt.CallTimeout, match=f"no reply from {subject} within timeout = 0.2 s"):
        await runtime.send_message(QUERY, AgentId("silent", "default"))
    assert runtime.running.plain._open == set()


async def test_a_call_that_is_cancelled_waits_no_longer(make: Make, respond: Make) -> None:
    asked = asyncio.Event()

    async def silent(message: Msg) -> None:
        asked.set()

    worker, caller = await make(), await make()
    await serve(worker, await respond(silent), timeout=60)
    token = CancellationToken()
    call = asyncio.create_task(caller.send_message(QUERY, AGENT, cancellation_token=token))
    await asked.wait()
    assert worker.running.plain._open
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await eventually(lambda: not worker.running.plain._open)


async def test_the_trace_goes_on_at_the_service(make: Make, respond: Make) -> None:
    seen: list[dict[str, str]] = []

    async def answer(message: Msg) -> None:
        seen.append(message.headers or {})
        await sends(message, ANSWER)

    provider = TracerProvider()
    worker, caller = await make(tracer_provider=provider), await make(tracer_provider=provider)
    await serve(worker, await respond(answer))
    with provider.get_tracer("test").start_as_current_span("outer") as span:
        await caller.send_message(QUERY, AGENT, reply_type=Weather)
    trace_id = trace.format_trace_id(span.get_span_context().trace_id)
    assert seen[0]["traceparent"].split("-")[1] == trace_id


async def test_a_message_that_it_does_not_take_is_refused(make: Make, respond: Make, namespace: str) -> None:
    runtime = await make()
    await serve(runtime, f"{namespace}.none")
    with pytest.raises(natsrt.UnhandledMessage, match="no handler for messages of type 'Snow'; it handles: Query"):
        await runtime.send_message(Snow(1), AGENT)


@dataclass
class Deep(Place):
    depth: float = 0.0


class Person(BaseModel):
    name: str


class Admin(Person):
    password_hash: str


class Department(BaseModel):
    boss: Person
    more: list[Person] = []


@dataclass
class Secret:
    city: str
    temp: float
    password_hash: str


@dataclass
class Callback:
    call: Callable[[int], int]


class Typed(TypedDict):
    city: str


@dataclass
class Undefined:
    place: Nowhere  # type: ignore[name-defined]  # noqa: F821


class Counted(BaseModel):
    """It is written otherwise than it is read."""

    model_config = ConfigDict(extra="forbid")
    count: int = Field(validation_alias="n", serialization_alias="total", ge=0)
    key: str = Field(default="hash", exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def double(self) -> int:
        return self.count * 2


class Hexadecimal(BaseModel):
    number: int

    @field_serializer("number")
    def _text(self, number: int) -> str:
        return hex(number)


ADMIN = Admin(name="ada", password_hash="hash")
CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("cls", "value", "problem"),
    [
        (Deep, Deep("a", depth=float("nan")), "no NaN"),
        (float | None, float("inf"), "no infinity"),
        (Weather | Snow, Secret("a", 1.0, "hash"), "it does not have the declared type"),
        (Department, Department.model_construct(boss={"name": "a", "password_hash": "hash"}), "the value of boss does"),
        (list[Person], (Admin(name="a", password_hash="hash"),), "it does not have the declared type"),
        (Place, Place(5), "city: Input should be a valid string"),  # type: ignore[arg-type]
        (Place, Snow(1), "'Snow' object has no attribute 'city'"),
        (Place, None, "Input should be"),
        (bytes, "text", "it is of type str"),
        (str, b"\xff", "utf-8|string"),
        (dict[str, Any], {"a": object()}, "Unable to serialize"),
        (list, CIRCLE, "nested too deeply, or contains itself"),
        (list, [10**4500], "number out of range"),
        (Counted, None, "Input should be"),
        (list[Counted], [Counted(n=1), None], "1: Input should be"),
        (Counted, {"n": "no number"}, "n: Input should be a valid integer"),
        (Hexadecimal, Hexadecimal.model_construct(number="hash"), "does not have the declared type|'str' object"),
    ],
)
def test_what_no_json_can_hold_is_not_written(cls: Any, value: Any, problem: str) -> None:
    with pytest.raises(natsrt.CannotSerialize, match=problem) as raised:
        JsonType(cls, "request_type").encode(value)
    assert "hash" not in str(raised.value)


@pytest.mark.parametrize(
    ("cls", "value", "written"),
    [
        (Query, Query(Deep("a", [1], 2.5)), {"place": {"city": "a", "days": [1]}, "unit": "C"}),
        (Place, Deep("a", [1], 2.5), {"city": "a", "days": [1]}),
        (Department, Department(boss=ADMIN), {"boss": {"name": "ada"}, "more": []}),
        (Department | None, Department(boss=ADMIN, more=[ADMIN]), {"boss": {"name": "ada"}, "more": [{"name": "ada"}]}),
        (Person, ADMIN, {"name": "ada"}),
        (Person | Snow, ADMIN, {"name": "ada"}),
        (dict[str, Person], {"a": ADMIN}, {"a": {"name": "ada"}}),
        (SerializeAsAny[Person], ADMIN, {"name": "ada", "password_hash": "hash"}),
        (Admin, ADMIN, {"name": "ada", "password_hash": "hash"}),
        (Counted, Counted(n=3), {"total": 3, "double": 6}),
        (Counted | None, Counted(n=3), {"total": 3, "double": 6}),
        (Hexadecimal, Hexadecimal(number=255), {"number": "0xff"}),
    ],
)
def test_what_the_declared_type_does_not_have_is_not_written(cls: Any, value: Any, written: Any) -> None:
    assert json.loads(JsonType(cls, "response_type").encode(value)) == written


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"subject": "a b"}, ValueError, "'a b' is not a subject"),
        ({"subject": "a.*"}, ValueError, "no wildcards"),
        ({"subject": ""}, ValueError, "not a subject"),
        ({"subject": "a..b"}, ValueError, "not a subject"),
        ({"subject": "a\r\nPUB b"}, ValueError, "not a subject"),
        ({"subject": "x" * 2000}, ValueError, "too long"),
        ({"timeout": 0}, ValueError, "timeout must be a number of seconds above 0"),
        ({"timeout": "5"}, ValueError, "timeout must be"),
        ({"timeout": float("nan")}, ValueError, "timeout must be"),
        ({"headers": {"a": "b\r\nc"}}, ValueError, "without line ends"),
        ({"headers": {"a b": "c"}}, ValueError, "name of a header"),
        ({"headers": {"a": "\ud800"}}, ValueError, "lone surrogates"),
        ({"headers": ["a"]}, ValueError, "headers must be a mapping"),
        ({"subject": "a.\ud800"}, ValueError, "not a subject"),
        ({"response_type": Client}, TypeError, "response_type must be a type that Pydantic can write as JSON"),
        ({"request_type": Undefined}, TypeError, "request_type must be a type that Pydantic can write as JSON"),
        *(
            ({argument: cls}, TypeError, f"{argument} must be a class or a union of classes: a dataclass, .*Pydantic")
            for argument in ("request_type", "response_type")
            for cls in (Typed, Query | Typed, list[int], dict[str, Any] | None, Any, object, "Query", ["Query"], 5)
        ),
    ],
)
def test_bad_arguments_of_an_agent_are_refused(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"subject": "a", "request_type": Query, "response_type": Weather} | arguments
    with pytest.raises(error, match=text):
        ServiceAgent(**arguments)


# -- replies in several parts ------------------------------------------------------------------------------------------


def numbered(count: int) -> list[tuple[bytes, dict[str, str]]]:
    return [(str(number).encode(), {"Natsrt-Part": str(number)}) for number in range(1, count + 1)]


@pytest.mark.parametrize("ways", ["numbered", "plain"])
async def test_several_replies_are_items(make: Make, respond: Make, ways: str) -> None:
    seen: list[dict[str, str]] = []

    async def answer(message: Msg) -> None:
        seen.append(message.headers or {})
        if ways == "numbered":
            await sends(message, *numbered(500), (b"", {"Natsrt-Parts": "500"}))
        else:
            await sends(message, *(payload for payload, _ in numbered(500)), b"")

    await serve(await make(), await respond(answer), request_type=str, response_type=int, stream=True)
    caller = await make()
    assert [item async for item in caller.stream_message("go", AGENT)] == list(range(1, 501))
    assert await caller.send_message("go", AGENT) == 500
    assert [headers["Natsrt-Stream"] for headers in seen] == ["1", "1"]


@pytest.mark.parametrize(
    ("last", "error", "text"),
    [
        (
            (b"", {"Nats-Service-Error": "no more", "Nats-Service-Error-Code": "503"}),
            natsrt.ServiceError,
            "503: no more",
        ),
        ((b"", {"Natsrt-Parts": "4"}), natsrt.CannotDecode, "only 3 of its 4 parts have arrived"),
        ((b"", {"Natsrt-Parts": "2"}), natsrt.CannotDecode, "Natsrt-Parts is 2, and 3 have arrived"),
        ((b"", {"Natsrt-Parts": "all"}), natsrt.CannotDecode, "Natsrt-Parts is all, and 3 have arrived"),
        ((b"5", {"Natsrt-Part": "5"}), natsrt.CannotDecode, "Natsrt-Part is 5, not 4: parts were lost"),
        ((b"x", {"Natsrt-Part": "4"}), natsrt.CannotDecode, "Invalid JSON"),
        (None, natsrt.CallTimeout, "within timeout = 0.3 s"),
    ],
)
async def test_a_stream_that_breaks_off_raises_after_its_items(
    make: Make, respond: Make, last: Any, error: type[Exception], text: str
) -> None:
    async def answer(message: Msg) -> None:
        await sends(message, *numbered(3), *([] if last is None else [last]))

    runtime, items = await make(), []
    await serve(runtime, await respond(answer), request_type=str, response_type=int, stream=True, timeout=0.3)
    with pytest.raises(error, match=text):
        async for item in runtime.stream_message("go", AGENT):
            items.append(item)
    assert items == [1, 2, 3]
    assert runtime.running.plain._open == set()


async def test_an_end_may_overtake_items_and_items_may_be_empty(make: Make, respond: Make) -> None:
    async def answer(message: Msg) -> None:
        first, second = (b"a", {"Natsrt-Part": "1"}), (b"", {"Natsrt-Part": "2"})
        await sends(message, first, (b"", {"Natsrt-Parts": "2"}), second, (b"c", {"Natsrt-Part": "3"}))

    runtime = await make()
    await serve(runtime, await respond(answer), request_type=str, response_type=bytes, stream=True)
    assert [item async for item in runtime.stream_message("go", AGENT)] == [b"a", b""]


async def test_an_agent_of_another_namespace_is_a_service_that_streams(
    make: Make, server: EmbeddedServer, namespace: str
) -> None:
    await host(await make())
    async with NatsAgentRuntime(server.url, namespace=f"{namespace}x") as other:
        subject = f"{namespace}.agent.forecasts"
        await serve(other, subject, request_type=Place, response_type=Weather | Snow, stream=True)
        stream = other.stream_message(Place("Rome", [1, 0]), AGENT)
        assert [item async for item in stream] == [Weather(city="Rome", temp=1), Snow(7)]
        assert await other.send_message(Place("Rome", [0]), AGENT) == Snow(7)


async def test_an_endless_responder_is_not_read_without_limit(make: Make, respond: Make) -> None:
    async def answer(message: Msg) -> None:
        for number in range(100):
            await sends(message, (b'"' + b"x" * 100_000 + b'"', {"Natsrt-Part": str(number + 1)}))

    worker, caller = await make(max_pending_bytes=2_000_000), await make()
    await serve(worker, await respond(answer), request_type=str, response_type=str, stream=True)
    async with caller.stream_message("go", AGENT, window=1, window_bytes=1) as stream:
        await anext(stream)
        await eventually(lambda: all(one._failure for one in worker.running.plain._open))
        with pytest.raises(natsrt.TooManyReplies, match="more than 2,000,000 bytes of replies"):
            while True:
                await anext(stream)


async def test_a_stream_that_is_left_early_is_read_no_more(make: Make, respond: Make) -> None:
    async def answer(message: Msg) -> None:
        await sends(message, *numbered(3))

    worker, caller = await make(), await make()
    await serve(worker, await respond(answer), request_type=str, response_type=int, stream=True, timeout=60)
    async with caller.stream_message("go", AGENT) as stream:
        assert await anext(stream) == 1
    await eventually(lambda: not worker.running.plain._open)
    replies = f"{worker.running.network.inbox.root}.r"
    assert not [subject for subject in worker.running.network.inbox.receivers if subject.startswith(replies)]


# -- an agent as a service ---------------------------------------------------------------------------------------------


class Forecasts(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("tells the weather")

    @rpc
    async def forecast(self, message: Query, ctx: MessageContext) -> Weather:
        if message.place.city == "Atlantis":
            raise LookupError('it has\r\nsunk, in \n  File "/srv/app.py"')
        if message.place.city == "Odd":
            raise ValueError("a\0b\x1b[31mc\u20ac")
        if message.place.city == "Limbo":
            raise asyncio.CancelledError
        if message.place.city == "Slow":
            await asyncio.sleep(0.5)
        return Weather(city=f"{message.place.city}/{self.id.key}", temp=1)

    @natsrt.streaming
    async def week(self, message: Place, ctx: MessageContext) -> AsyncGenerator[Weather | Snow, None]:
        for day in message.days:
            if day < 0:
                raise ValueError("no such day") if day == -1 else asyncio.CancelledError
            yield Weather(city=message.city, temp=day) if day else Snow(7)
        while message.city == "Endless":
            await asyncio.sleep(0.01)
            yield Snow(1)


async def offer(runtime: NatsAgentRuntime, subject: str, **arguments: Any) -> OfferedService:
    arguments = {"request_type": Query, "response_type": Weather} | arguments
    return await offer_service(runtime, "forecasts", subject=subject, **arguments)


async def host(runtime: NatsAgentRuntime) -> None:
    await natsrt.register(runtime, Forecasts, "forecasts", Forecasts)


def request(city: str) -> bytes:
    return json.dumps({"place": {"city": city}}).encode()


async def test_a_request_becomes_a_call_to_an_agent_on_any_worker(make: Make, plain: Client, namespace: str) -> None:
    await host(await make())
    subject = f"{namespace}.forecast"
    service = await offer(await make(), subject)  # this process has no agents
    reply = await plain.request(subject, request("Rome"))
    assert (json.loads(reply.data), reply.headers) == ({"city": "Rome/default", "temp": 1.0}, None)
    reply = await plain.request(subject, request("Rome"), headers={"Natsrt-Key": "ada"})
    assert json.loads(reply.data)["city"] == "Rome/ada"
    await service.stop()
    await service.stop()
    with pytest.raises(nats.errors.NoRespondersError):
        await plain.request(subject, request("Rome"))


@pytest.mark.parametrize(
    ("payload", "code", "description"),
    [
        (b"no json", "400", "CannotDecode: cannot decode a request on .*: Invalid JSON"),
        (b"", "400", "it is empty, and Query was expected"),
        (b"{}", "400", "place: Field required"),
        (request("Atlantis"), "500", "^LookupError: it has$"),
        (request("Limbo"), "499", "^CancelledError: the agent cancelled the call$"),
        (request("Slow"), "504", "CallTimeout: no reply from forecasts/default within timeout = 0.2 s"),
        (request("Odd"), "500", r"^ValueError: a\?b\?\[31mc\?$"),
        (b'{"place": {"city": "Rome", "days": ["x"]}}', "400", r"place\.days\.0: Input should be a valid integer"),
    ],
)
async def test_errors_are_told_in_the_headers_of_services(
    make: Make, plain: Client, namespace: str, payload: bytes, code: str, description: str
) -> None:
    runtime = await make()
    await host(runtime)
    service = await offer(runtime, f"{namespace}.forecast", timeout=0.2)
    reply = await plain.request(service.subject, payload)
    assert reply.data == b"" and reply.headers is not None
    assert reply.headers["Nats-Service-Error-Code"] == code
    assert re.search(description, reply.headers["Nats-Service-Error"])
    [stats] = service.response("STATS")["endpoints"]
    assert (stats["num_requests"], stats["num_errors"]) == (1, 1)
    kind = reply.headers["Nats-Service-Error"].partition(":")[0]
    assert stats["last_error"] == f"{code}: {kind}"  # anybody may read it, so it has no text
    reply = await plain.request(service.subject, request("Rome"))  # it goes on
    assert reply.data


@pytest.mark.parametrize("name", ["\0", "\r\nA: b", "\x1b[31m", "\ud83d", "k" * 500_000])
async def test_a_request_with_any_field_is_answered(make: Make, plain: Client, namespace: str, name: str) -> None:
    runtime = await make()
    await host(runtime)
    service = await offer(runtime, f"{namespace}.forecast", request_type=Counted)
    reply = await plain.request(service.subject, json.dumps({"n": 1, name: 2}).encode())
    assert reply.headers is not None and reply.headers["Nats-Service-Error-Code"] == "400"
    assert reply.headers["Nats-Service-Error"].startswith("CannotDecode") and len(str(reply.headers)) < 600


async def test_the_header_of_an_error_is_printable_for_plain_clients_of_agents_too(
    make: Make, plain: Client, namespace: str
) -> None:
    await host(await make())
    reply = await plain.request(f"{namespace}.agent.forecasts", request("Odd"), headers={"Natsrt-Type": "Query"})
    assert reply.headers is not None and reply.headers["Nats-Service-Error"] == "a?b?[31mc?"


async def test_a_stream_that_is_asked_for_in_other_words_is_refused(make: Make, plain: Client, namespace: str) -> None:
    runtime = await make()
    await host(runtime)
    service = await offer(runtime, f"{namespace}.forecast")
    reply = await plain.request(service.subject, request("Rome"), headers={"Natsrt-Stream": "true"})
    assert reply.headers is not None and reply.headers["Nats-Service-Error-Code"] == "400"
    assert "its header Natsrt-Stream must be 1" in reply.headers["Nats-Service-Error"]


def test_an_error_about_long_names_is_short() -> None:
    with pytest.raises(CannotDecode) as raised:
        JsonType(Counted, "request_type").decode(json.dumps({"n": 1, "k" * 500_000: 2}).encode(), "a request")
    assert "Extra inputs are not permitted" in str(raised.value) and len(str(raised.value)) < 500


def test_a_timeout_may_be_endless() -> None:
    for timeout in (float("inf"), 10**400):
        assert checked_timeout(timeout) > 86_400 * 365


async def test_an_unknown_agent_type_and_a_wrong_reply_are_errors(make: Make, plain: Client, namespace: str) -> None:
    runtime = await make()
    service = await offer(runtime, f"{namespace}.forecast")
    reply = await plain.request(service.subject, request("Rome"))
    assert reply.headers is not None and reply.headers["Nats-Service-Error-Code"] == "404"
    await service.stop()
    await host(runtime)
    service = await offer(runtime, f"{namespace}.forecast", response_type=Snow)
    reply = await plain.request(service.subject, request("Rome"))
    assert (
        reply.headers is not None and "cannot serialize a message of type Snow" in reply.headers["Nats-Service-Error"]
    )


async def items_of(client: Client, subject: str, place: Place) -> list[Msg]:
    """All replies to a request for a stream, with the end."""
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    payload = json.dumps({"city": place.city, "days": place.days}).encode()
    await client.publish(subject, payload, reply=inbox, headers={"Natsrt-Stream": "1"})
    received: list[Msg] = []
    while not received or received[-1].data:
        received.append(await subscription.next_msg(5))
    await subscription.unsubscribe()
    return received


async def test_a_stream_is_sent_item_by_item(make: Make, plain: Client, namespace: str) -> None:
    await host(await make())
    service = await offer(
        await make(), f"{namespace}.week", request_type=Place, response_type=Weather | Snow, timeout=0.5
    )
    *items, end = await items_of(plain, service.subject, Place("Rome", [3, 0, 5]))
    assert [json.loads(item.data) for item in items] == [
        {"city": "Rome", "temp": 3.0},
        {"depth": 7},
        {"city": "Rome", "temp": 5.0},
    ]
    assert [item.headers for item in items] == [{"Natsrt-Part": str(number)} for number in (1, 2, 3)]
    assert end.headers == {"Natsrt-Parts": "3"}
    *items, end = await items_of(plain, service.subject, Place("Rome", [3, -1]))
    assert len(items) == 1
    assert (end.headers or {})["Nats-Service-Error"] == "ValueError: no such day"
    assert (end.headers or {})["Natsrt-Parts"] == "1"
    *items, end = await items_of(plain, service.subject, Place("Rome", [3, -2]))
    assert len(items) == 1
    assert (end.headers or {})["Nats-Service-Error-Code"] == "499" and (end.headers or {})["Natsrt-Parts"] == "1"
    *items, end = await items_of(plain, service.subject, Place("Endless"))
    assert len(items) > 5 and (end.headers or {})["Nats-Service-Error-Code"] == "504"
    last = await plain.request(service.subject, b'{"city": "Rome", "days": [1, 2]}')  # without the header
    assert json.loads(last.data) == {"city": "Rome", "temp": 2.0}


GATE = """
import asyncio, sys
from dataclasses import dataclass
from pydantic import BaseModel
from natsrt import NatsAgentRuntime
from natsrt.contrib.services import offer_service

class Weather(BaseModel):
    city: str

@dataclass
class Snow:
    depth: int

async def main(url, namespace):
    async with NatsAgentRuntime(url, namespace=namespace) as runtime:
        await offer_service(
            runtime, "texts", subject=f"{namespace}.texts", request_type=str, response_type=Weather | Snow
        )
        print("ready", flush=True)
        await runtime.stop_when_signal()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_process_that_only_offers_reads_all_replies(
    make: Make, server: EmbeddedServer, plain: Client, namespace: str, processes: Processes, tmp_path: Path
) -> None:
    class Texts(RoutedAgent):
        @natsrt.streaming
        async def tell(self, message: str, ctx: MessageContext) -> AsyncGenerator[Weather | Snow, None]:
            yield Snow(3)
            yield Weather(city=message, temp=1)

    await natsrt.register(await make(), Texts, "texts", lambda: Texts("tells"))
    program = tmp_path / "gate.py"
    program.write_text(GATE)
    gate = processes.python(program, server.url, namespace)
    await gate.wait_for_line("ready")
    reply = await plain.request(f"{namespace}.texts", b'"Rome"')
    assert (reply.data, reply.headers) == (b'{"city":"Rome"}', None)
    inbox = await plain.subscribe(f"{namespace}.heard")
    await plain.publish(f"{namespace}.texts", b'"Rome"', reply=f"{namespace}.heard", headers={"Natsrt-Stream": "1"})
    assert [(await inbox.next_msg(5)).data for _ in range(3)] == [b'{"depth":3}', b'{"city":"Rome"}', b""]
    gate.terminate()
    assert await gate.wait() == 0


async def test_the_agent_of_one_namespace_uses_the_service_of_another(
    make: Make, server: EmbeddedServer, namespace: str
) -> None:
    await host(await make())
    subject = f"{namespace}.week"
    await offer(await make(), subject, request_type=Place, response_type=Weather | Snow)
    async with NatsAgentRuntime(server.url, namespace=f"{namespace}x") as other:
        await serve(other, subject, request_type=Place, response_type=Weather | Snow, stream=True)
        stream = other.stream_message(Place("Rome", [1, 0]), AGENT)
        assert [item async for item in stream] == [Weather(city="Rome", temp=1), Snow(7)]


async def test_several_offers_share_the_requests(make: Make, plain: Client, namespace: str) -> None:
    await host(await make())
    services = [await offer(await make(), f"{namespace}.forecast") for _ in range(2)]
    for _ in range(40):
        await plain.request(services[0].subject, request("Rome"))
    counts = [service.response("STATS")["endpoints"][0]["num_requests"] for service in services]
    assert sum(counts) == 40 and min(counts) > 3


async def test_a_stop_answers_what_was_taken(server: EmbeddedServer, plain: Client, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    await host(runtime)
    service = await offer(runtime, f"{namespace}.forecast")  # before the start
    await runtime.start()
    waiting = asyncio.create_task(plain.request(service.subject, request("Slow"), timeout=5))
    await eventually(lambda: runtime.running.dispatch.running)
    await runtime.stop()
    assert json.loads((await waiting).data)["city"] == "Slow/default"
    with pytest.raises(nats.errors.NoRespondersError):
        await plain.request(service.subject, request("Rome"))
    await runtime.start()  # it is offered again
    assert json.loads((await plain.request(service.subject, request("Rome"))).data)["city"] == "Rome/default"
    await runtime.close()


async def test_a_request_that_a_stop_cuts_short_is_answered_nevertheless(
    server: EmbeddedServer, plain: Client, namespace: str
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        await host(worker)
        runtime = NatsAgentRuntime(server.url, namespace=namespace, drain_timeout=0.1)
        await runtime.start()
        service = await offer(runtime, f"{namespace}.forecast")
        waiting = asyncio.create_task(plain.request(service.subject, request("Slow"), timeout=5))
        await eventually(lambda: worker.running.dispatch.running)
        await runtime.close()
        assert runtime.cut_short == 1
        reply = await waiting
        assert (reply.headers or {})["Nats-Service-Error-Code"] == "503"
        assert "WorkerStopped" in (reply.headers or {})["Nats-Service-Error"]


async def test_too_many_requests_are_answered_with_busy(make: Make, plain: Client, namespace: str) -> None:
    await host(await make())
    runtime = await make(max_pending_bytes=4096)
    service = await offer(runtime, f"{namespace}.forecast")
    replies = await asyncio.gather(*(plain.request(service.subject, request("Slow"), timeout=5) for _ in range(20)))
    codes = [(reply.headers or {}).get("Nats-Service-Error-Code") for reply in replies]
    assert codes.count("429") >= 10 and codes.count(None) >= 4


async def test_services_publish_nothing_where_only_natsrt_may(make: Make, plain: Client, namespace: str) -> None:
    runtime = await make()
    await host(runtime)
    service = await offer(runtime, f"{namespace}.forecast")
    heard: list[Msg] = []

    async def hear(message: Msg) -> None:
        heard.append(message)

    root = runtime.running.network.inbox.root  # that of a worker
    forged = [f"{namespace}.topic.forged.a", f"{namespace}.agent.other", f"{root}.0a1b", f"{root}.s0a1b"]
    for subject in forged:
        await plain.subscribe(subject, cb=hear)
        await plain.publish(service.subject, request("Rome"), reply=subject)
    await eventually(lambda: runtime.running.connection.undecodable == len(forged))
    await plain.request(service.subject, request("Rome"))
    assert heard == []


async def test_a_message_without_a_reply_subject_is_handled(make: Make, plain: Client, namespace: str) -> None:
    runtime = await make()
    await host(runtime)
    service = await offer(runtime, f"{namespace}.forecast")
    for city in ("Rome", "Atlantis"):
        await plain.publish(service.subject, request(city))
    await eventually(lambda: service.response("STATS")["endpoints"][0]["num_requests"] == 2)
    assert service.response("STATS")["endpoints"][0]["num_errors"] == 1


async def test_the_key_can_come_from_the_subject(make: Make, plain: Client, namespace: str) -> None:
    runtime = await make()
    await host(runtime)

    def last_token(message: PlainMessage) -> str:
        return message.subject.rpartition(".")[2]

    await offer(runtime, f"{namespace}.forecast.*", key=last_token)
    assert json.loads((await plain.request(f"{namespace}.forecast.ada", request("Rome"))).data)["city"] == "Rome/ada"


async def test_the_trace_goes_on_at_the_agent(make: Make, plain: Client, namespace: str) -> None:
    seen: list[str] = []

    class Traced(RoutedAgent):
        @rpc
        async def forecast(self, message: Query, ctx: MessageContext) -> Weather:
            seen.append(trace.format_trace_id(trace.get_current_span().get_span_context().trace_id))
            return WEATHER

    provider = TracerProvider()
    await natsrt.register(await make(tracer_provider=provider), Traced, "forecasts", lambda: Traced("traced"))
    service = await offer(await make(tracer_provider=provider), f"{namespace}.forecast")
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    await plain.request(service.subject, request("Rome"), headers=headers)
    assert seen == [trace_id]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"subject": "$SRV.PING"}, ValueError, "a subject of the server"),
        *(
            ({"subject": subject}, ValueError, "a subject of natsrt, or includes some")
            for subject in (
                "ns.agent.forecasts",
                "ns.agent",
                "ns.topic.a.b",
                "ns.natsrt",
                "ns.>",
                "ns.*",
                "ns.*.x",
                "ns.*.>",
                "ns.topic.>",
                "agent.forecasts",
                "agent.*",
                "topic.>",
                "natsrt.worker.*",
            )
        ),
        *(
            ({"subject": subject}, ValueError, "a subject for replies, or includes some")
            for subject in ("_INBOX.>", "_INBOX", "_INBOX.a.*", "desk.in.>", "desk.>", "desk.*.x", "desk.*")
        ),
        ({"subject": ">"}, ValueError, "begins with a wildcard"),
        ({"subject": "a b"}, ValueError, "not a subject"),
        ({"name": "my service"}, ValueError, "letters, digits, _ and -"),
        ({"version": "1"}, ValueError, "semantic version"),
        ({"timeout": -1}, ValueError, "timeout must be"),
        ({"queue": "a b"}, ValueError, "queue must be the name of a queue group"),
        ({"queue": None}, ValueError, "queue must be the name of a queue group"),
        ({"name": 5}, ValueError, "letters, digits, _ and -"),
        ({"version": None}, ValueError, "semantic version"),
        ({"key": "ada"}, TypeError, "key must be a function"),
        ({"request_type": Client}, TypeError, "request_type must be"),
        ({"request_type": Callback}, TypeError, "request_type must have a JSON schema"),
        ({"response_type": list[Callback]}, TypeError, "response_type must have a JSON schema"),
        ({"metadata": {"a": object()}}, TypeError, "metadata must have texts as names and values, not 'a'"),
        ({"metadata": {1: "a"}}, TypeError, "metadata must have texts"),
        ({"metadata": [("a", "b")]}, TypeError, "metadata must be a mapping"),
        ({"description": None}, TypeError, "description must be a text"),
    ],
)
async def test_bad_arguments_of_an_offer_are_refused(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    runtime = NatsAgentRuntime(namespace="ns", inbox_prefix="desk.in")
    with pytest.raises(error, match=text):
        await offer(runtime, **{"subject": "a"} | arguments)


@pytest.mark.parametrize(
    "subject", ["ns", "ns.x.>", "ns.x.*.agent", "nsx.agent.a", "desk.out.*", "agents.>", "other.agent.a"]
)
async def test_subjects_beside_those_of_natsrt_can_be_offered(subject: str) -> None:
    await offer(NatsAgentRuntime(namespace="ns", inbox_prefix="desk.in"), subject)


@pytest.mark.slow
async def test_the_nats_command_lists_shows_and_uses_it(
    make: Make, server: EmbeddedServer, namespace: str, nats_cli: Path, processes: Processes
) -> None:
    runtime = await make()
    await host(runtime)
    service = await offer(
        runtime,
        f"{namespace}.forecast",
        name=f"weather-{namespace}",
        version="1.2.3",
        description="tells the weather",
        metadata={"team": "north"},
    )

    async def said(*arguments: str) -> str:
        process = processes.start([nats_cli, "-s", server.url, *arguments])
        assert await process.wait() == 0, process.describe()
        return process.stdout + process.stderr

    assert service.name in await said("service", "ls")
    info = await said("service", "info", service.name, service.id)
    for text in ("1.2.3", "tells the weather", service.subject, "north", "request_schema", "Place", "response_schema"):
        assert text in info, text
    [found] = json.loads(await said("service", "info", service.name, service.id, "--json"))["info"]["endpoints"]
    assert json.loads(found["metadata"]["response_schema"])["required"] == ["city", "temp"]
    assert found["queue_group"] == "q"
    assert '"city":"Rome/default"' in await said("req", "--raw", service.subject, request("Rome").decode())
    assert service.name in await said("service", "ping", service.name)
    stats = await said("service", "stats", service.name)
    assert "1" in stats and service.id in stats


# -- plain messages of a runtime ---------------------------------------------------------------------------------------


async def test_plain_requests_need_a_runtime_that_is_started(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    with pytest.raises(RuntimeError, match="not started"):
        runtime.request_plain("a", b"")


async def test_a_runtime_that_handles_plain_messages_is_not_idle(
    server: EmbeddedServer, plain: Client, namespace: str
) -> None:
    runtime, ended = NatsAgentRuntime(server.url, namespace=namespace), []

    async def slow(message: PlainMessage) -> None:
        await asyncio.sleep(0.3)
        ended.append(message.payload)
        await message.respond(b"done")

    await runtime.subscribe_plain(f"{namespace}.slow", slow)
    await runtime.start()
    waiting = asyncio.create_task(plain.request(f"{namespace}.slow", b"x", timeout=5))
    await eventually(lambda: runtime.running.plain.handling)
    assert not await runtime.running.is_idle()
    await runtime.stop_when_idle()
    assert ended == [b"x"] and (await waiting).data == b"done"


async def test_a_handler_of_plain_messages_may_stop_its_runtime(
    server: EmbeddedServer, plain: Client, namespace: str
) -> None:
    runtime, ended = NatsAgentRuntime(server.url, namespace=namespace, drain_timeout=30), asyncio.Event()

    async def stop(message: PlainMessage) -> None:
        await message.respond(b"stopping")
        await runtime.stop()
        ended.set()

    await runtime.start()
    await runtime.subscribe_plain(f"{namespace}.stop", stop)
    assert (await plain.request(f"{namespace}.stop", b"")).data == b"stopping"
    await asyncio.wait_for(ended.wait(), 10)
    assert runtime.worker_id is None and runtime.cut_short == 0


async def test_a_message_is_shown_without_its_contents(make: Make, plain: Client, namespace: str) -> None:
    seen: list[str] = []

    async def show(message: PlainMessage) -> None:
        seen.append(repr(message))
        with pytest.raises(ValueError, match="wants no answer"):
            await message.respond(b"")

    await (await make()).subscribe_plain(f"{namespace}.a", show)
    await plain.publish(f"{namespace}.a", b"secret", headers={"Authorization": "secret"})
    await eventually(lambda: seen)
    assert "secret" not in seen[0] and f"{namespace}.a" in seen[0]


async def test_what_a_handler_of_plain_messages_raises_is_logged(
    make: Make, plain: Client, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(message: PlainMessage) -> None:
        raise ValueError("of no use")

    subscription = await (await make()).subscribe_plain(f"{namespace}.a", broken)
    await plain.publish(f"{namespace}.a", b"x")
    await eventually(lambda: "a plain message could not be handled" in caplog.text)
    await subscription.unsubscribe()


async def test_subscriptions_and_requests_outlive_a_restart_of_the_server(
    own_server: EmbeddedServer, namespace: str
) -> None:
    async with NatsAgentRuntime(own_server.url, namespace=namespace) as runtime:
        await host(runtime)
        subject = f"{namespace}.forecast"
        await offer(runtime, subject)
        await serve(runtime, subject)
        assert (await runtime.send_message(QUERY, AGENT)).city == "Köln/default"
        await own_server.restart()
        assert (await runtime.send_message(QUERY, AGENT)).city == "Köln/default"
