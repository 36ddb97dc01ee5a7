"""Plain NATS clients that want every item: the header ``Natsrt-Stream``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import MessageContext, RoutedAgent, rpc
from nats.aio.client import Client
from nats.aio.msg import Msg

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.hosting import plain_streams
from natsrt.wire import part_messages
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER
from natsrt.wire.part_messages import PART_HEADER, PARTS_HEADER, STREAM_HEADER
from tests.programs.stream_worker import Count, Streams
from tests.support.processes import eventually

PLAIN: dict[str, Any] = json.loads((Path(__file__).parent / "vectors/streams.json").read_text())["plain"]
Make = Callable[..., Any]
KEYED = pytest.mark.parametrize("keyed", [None, True], ids=["plain", "keyed"])


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def runtime(ended: list[str], keyed: bool | None = None) -> NatsAgentRuntime:
            made = NatsAgentRuntime(server.url, namespace=namespace)
            await made.register_factory("streams", lambda: Streams(ended), expected_class=Streams, keyed=keyed)
            await made.register_factory("other", Other, expected_class=Other, keyed=keyed)
            return await stack.enter_async_context(made)

        yield runtime


@pytest.fixture
async def client(server: EmbeddedServer) -> AsyncIterator[Client]:
    connection = await nats.connect(server.url)
    yield connection
    await connection.close()


class Other(RoutedAgent):
    """Handles what does not fit into the agents of other tests."""

    def __init__(self) -> None:
        super().__init__("other")

    @natsrt.streaming
    async def on_number(self, message: int, ctx: MessageContext) -> AsyncGenerator[bytes | None, None]:
        for number in range(message):
            yield b"" if number == 1 else b"x" * number

    @rpc
    async def on_size(self, message: Count, ctx: MessageContext) -> str:
        await natsrt.emit("x" * message.size)
        return "not so large"


async def replies(client: Client, subject: str, body: Any, key: str = "k", **headers: str) -> list[Msg]:
    """All replies to a plain call, up to the one that ends them."""
    inbox = client.new_inbox()
    arrived = await client.subscribe(inbox)
    sent = {STREAM_HEADER: "1", KEY_HEADER: key, **headers}
    await client.publish(subject, json.dumps(body).encode(), reply=inbox, headers=sent)
    got: list[Msg] = []
    while not got or got[-1].data or PART_HEADER in (got[-1].headers or {}):
        got.append(await arrived.next_msg(timeout=10))
    if len(got) > 1 and "Nats-Service-Error" in (got[-2].headers or {}):
        empty = got.pop()
        assert (empty.headers or {}).get(PARTS_HEADER) == got[-1].headers.get(PARTS_HEADER)
    return got


def data_of(messages: list[Msg]) -> list[Any]:
    return [json.loads(message.data) for message in messages]


def parts_of(messages: list[Msg]) -> list[str]:
    return [message.headers[PART_HEADER] for message in messages]


@KEYED
async def test_items_are_plain_messages_and_an_empty_one_ends_them(
    make: Make, client: Client, namespace: str, keyed: bool | None
) -> None:
    await make([], keyed)
    *items, end = await replies(client, f"{namespace}.agent.streams", {"to": 3})
    assert data_of(items) == [{"number": number, "text": ""} for number in (1, 2, 3)] + [{"total": 1}]
    assert parts_of(items) == ["1", "2", "3", "4"]
    assert [item.headers[TYPE_HEADER] for item in items] == ["Item"] * 3 + ["Sum"]
    assert end.data == b"" and end.headers == {PARTS_HEADER: "4"}


@KEYED
async def test_the_result_of_an_ordinary_handler_is_the_last_item(
    make: Make, client: Client, namespace: str, keyed: bool | None
) -> None:
    ended: list[str] = []
    await make(ended, keyed)
    *items, end = await replies(client, f"{namespace}.agent.streams", "text")
    assert data_of(items) == [{"number": number, "text": "text"} for number in (1, 2, 3)] + ["last"]
    assert end.headers == {PARTS_HEADER: "4"}
    assert ended == ["True"] * 3


async def test_a_conversation_is_as_the_vectors_say(make: Make, client: Client, namespace: str) -> None:
    await make([])
    request = PLAIN["request"]
    messages = await replies(client, f"{namespace}.{request['subject']}", request["data"], **request["headers"])
    came = [{"headers": message.headers, "data": message.data.decode()} for message in messages]
    assert came == PLAIN["replies"]


async def test_an_empty_item_is_no_end(make: Make, client: Client, namespace: str) -> None:
    await make([])
    *items, end = await replies(client, f"{namespace}.agent.other", 3)
    assert [item.data for item in items] == [b"", b"", b"xx"]
    assert end.headers == {PARTS_HEADER: "3"}


@KEYED
async def test_a_failure_comes_after_the_items(make: Make, client: Client, namespace: str, keyed: bool | None) -> None:
    await make([], keyed)
    *items, end = await replies(client, f"{namespace}.agent.streams", {"to": 2, "what": "fail"})
    assert parts_of(items) == ["1", "2"]
    assert end.headers["Nats-Service-Error"] == "after the items"
    assert end.headers[PARTS_HEADER] == "2"
    assert json.loads(end.data)["type"].endswith("Odd")


async def test_an_error_before_the_handler_is_followed_by_the_end_too(
    make: Make, client: Client, namespace: str
) -> None:
    await make([])
    (failure,) = await replies(client, f"{namespace}.agent.streams", {"nothing": "fits"})
    assert "fits none of the message types" in failure.headers["Nats-Service-Error"]


async def test_forwarded_to_its_owner_an_error_is_followed_by_one_end(
    make: Make, client: Client, namespace: str
) -> None:
    for _ in range(3):
        await make([], True)
    for _ in range(6):
        inbox = client.new_inbox()
        arrived = await client.subscribe(inbox)
        body = json.dumps({"to": 2, "what": "fail"}).encode()
        headers = {STREAM_HEADER: "1", KEY_HEADER: "k"}
        await client.publish(f"{namespace}.agent.streams", body, reply=inbox, headers=headers)
        came = [await arrived.next_msg(timeout=10) for _ in range(4)]
        assert [message.headers.get(PARTS_HEADER) for message in came] == [None, None, "2", "2"]
        assert "Nats-Service-Error" in came[2].headers and came[3].data == b""
        with pytest.raises(nats.errors.TimeoutError):
            await arrived.next_msg(timeout=0.1)


async def test_forwarded_to_its_owner_a_call_has_its_items_all_the_same(
    make: Make, client: Client, namespace: str
) -> None:
    for _ in range(3):
        await make([], True)
    for number in range(12):
        *items, end = await replies(client, f"{namespace}.agent.streams", {"to": 5}, key=f"k{number % 2}")
        assert parts_of(items) == [str(part) for part in range(1, 7)]
        assert end.headers[PARTS_HEADER] == "6"


@pytest.mark.parametrize("value", ["yes", "", "2", "$JS.API.INFO", "some.subject"])
@KEYED
async def test_another_value_is_refused(
    make: Make, client: Client, namespace: str, value: str, keyed: bool | None
) -> None:
    await make([], keyed)
    *items, end = await replies(client, f"{namespace}.agent.streams", {"to": 2}, **{STREAM_HEADER: value})
    assert not items
    assert "its header Natsrt-Stream must be 1" in end.headers["Nats-Service-Error"]


@KEYED
@pytest.mark.parametrize(
    "reply",
    ["$JS.API.STREAM.PURGE.KV_{namespace}_natsrt_registry", "{namespace}.natsrt.cancel", "$SYS.REQ.SERVER.PING"],
)
async def test_nothing_is_published_on_a_reserved_reply_subject(
    make: Make, client: Client, namespace: str, keyed: bool | None, reply: str
) -> None:
    ended: list[str] = []
    worker = await make(ended, keyed)
    subject = reply.format(namespace=namespace)
    seen = await client.subscribe(subject)
    headers = {STREAM_HEADER: "1", KEY_HEADER: "k"}
    sent = client.publish(f"{namespace}.agent.streams", b'{"to":1}', reply=subject, headers=headers)
    await sent
    await eventually(lambda: worker.running.counters.refused_replies == 1)
    assert ended == []
    with pytest.raises(nats.errors.TimeoutError):
        raise AssertionError(await seen.next_msg(timeout=0.3))


@pytest.mark.parametrize("subject", ["$SYS.REQ.SERVER.PING", "natsrt.worker.w", "with blank", "wild.*"])
async def test_to_an_owner_no_reserved_subject_may_be_named(
    make: Make, client: Client, namespace: str, subject: str
) -> None:
    await make([], True)
    reserved = subject.replace("natsrt.", f"{namespace}.natsrt.")
    await replies(client, f"{namespace}.agent.streams", {"to": 1})  # now it has an owner
    *items, end = await replies(client, f"{namespace}.agent.streams.k", {"to": 2}, **{STREAM_HEADER: reserved})
    assert not items
    assert "its header Natsrt-Stream must be 1" in end.headers["Nats-Service-Error"]


async def test_a_plain_client_is_not_asked(make: Make, client: Client, namespace: str) -> None:
    class Asks(RoutedAgent):
        def __init__(self) -> None:
            super().__init__("asks")

        @rpc
        async def on_text(self, message: str, ctx: MessageContext) -> str:
            return str(await natsrt.ask("?"))

    worker = await make([])
    await worker.register_factory("asks", Asks, expected_class=Asks)
    *_, end = await replies(client, f"{namespace}.agent.asks", "x")
    assert "its caller gave no on_question" in end.headers["Nats-Service-Error"]


@pytest.mark.parametrize("limit", ["MOST_ITEMS", "MOST_BYTES"])
async def test_a_client_that_says_nothing_gets_no_endless_stream(
    make: Make, client: Client, namespace: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_streams, limit, 100)
    ended: list[str] = []
    await make(ended)
    *items, end = await replies(client, f"{namespace}.agent.streams", {"to": 1_000_000})
    assert 0 < len(items) <= 100 and len(items) == int(end.headers[PARTS_HEADER])
    assert "a plain client gets" in end.headers["Nats-Service-Error"]
    await eventually(lambda: ended == ["GeneratorExit"])
    assert part_messages.MOST_ITEMS == 65_536


async def test_an_item_that_is_too_large_for_a_message_is_the_handlers_error(
    make: Make, client: Client, namespace: str
) -> None:
    await make([])
    *_, end = await replies(client, f"{namespace}.agent.other", {"to": 1, "size": client.max_payload + 1})
    assert end.headers[PARTS_HEADER] == "0"
    assert "but the server accepts at most" in end.headers["Nats-Service-Error"]


@pytest.mark.slow  # the worker looks for its clients every three seconds
@KEYED
@pytest.mark.parametrize("pattern", ["{inbox}.1", "{inbox}.*", "{inbox}.>"])
async def test_the_handler_of_a_client_that_is_gone_is_stopped(
    make: Make, client: Client, namespace: str, keyed: bool | None, pattern: str
) -> None:
    ended: list[str] = []
    worker = await make(ended, keyed)
    inbox = f"{client.new_inbox()}.1"
    arrived = await client.subscribe(pattern.format(inbox=inbox.rpartition(".")[0]))
    body = json.dumps({"to": 1_000_000, "pause": 0.01}).encode()
    headers = {STREAM_HEADER: "1", KEY_HEADER: "k"}
    await client.publish(f"{namespace}.agent.streams", body, reply=inbox, headers=headers)
    await arrived.next_msg(timeout=10)
    await asyncio.sleep(2 * plain_streams._LOOK_EVERY)  # a client that is there is left alone
    assert not ended
    await arrived.unsubscribe()
    await eventually(lambda: ended != [], timeout=10)
    await eventually(lambda: not worker.running.incoming.streams._plain)


@pytest.mark.slow  # the nats CLI
async def test_the_nats_cli_prints_the_items(
    make: Make, server: EmbeddedServer, namespace: str, nats_cli: Path
) -> None:
    await make([])
    command = ["--server", server.url, "request", "--raw", "--wait-for-empty", "--reply-timeout=10s"]
    said = ["-H", f"{STREAM_HEADER}:1", f"{namespace}.agent.streams", '{"to":3,"pause":0.5}']
    failing = [*said[:-1], '{"to":0,"what":"fail"}']
    process = await asyncio.create_subprocess_exec(nats_cli, *command, *failing, stdout=asyncio.subprocess.PIPE)
    assert b"after the items" in (await asyncio.wait_for(process.communicate(), 5))[0]  # an empty message ends it, too
    process = await asyncio.create_subprocess_exec(nats_cli, *command, *said, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    assert [json.loads(line) for line in output.split()[:4]] == [
        {"number": 1, "text": ""},
        {"number": 2, "text": ""},
        {"number": 3, "text": ""},
        {"total": 2},
    ]
