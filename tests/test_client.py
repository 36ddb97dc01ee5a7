"""What natsrt overrides of nats-py, each against nats-py's own way or a real server.

A version of nats-py in which one of them means something else fails here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import time
from collections.abc import AsyncIterator
from types import MethodType
from typing import Any, cast
from urllib.request import urlopen

import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol.parser import Parser

from benchmarks.chaos.proxy import Proxy
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotDecode
from natsrt.options import Options
from natsrt.transport import connector
from natsrt.transport.client import NatsClient, Ordered
from natsrt.transport.connection import Connection
from natsrt.transport.headers import header_block
from natsrt.transport.stall_watch import StallWatch
from tests.support.processes import eventually

LONG = 10.0
ORDERED, OTHER = 1, 2
"""Subscription ids: with a sink of ours, and with a queue of nats-py's."""


class Receiver:
    """A client that was never connected, to be fed with what a server would send."""

    def __init__(self, parser: type[Parser] | None = None) -> None:
        self.unreadables: list[CannotDecode] = []
        self.round_trips: list[float] = []
        self.heard: list[tuple[str, str, bytes, dict[str, str] | None]] = []
        self.messages: list[Msg] = []
        self.errors: list[str] = []
        self.refused: dict[int, str] = {}
        self.client = NatsClient(self, StallWatch(1.0, lambda: None))
        self.client._error_cb = self.failed
        if parser is not None:
            self.client._ps = parser(self.client)
        sink = cast(Any, Ordered(self.hear, self.unreadable))
        self.client._subs[ORDERED] = Subscription(self.client, ORDERED, "a.>", future=sink)
        self.other = self.client._subs[OTHER] = Subscription(self.client, OTHER, "b.>")

    def answered(self, seconds: float, *, first: bool) -> None:
        self.round_trips.append(seconds)

    def unreadable(self, error: CannotDecode) -> None:
        self.unreadables.append(error)

    def subscriptions_refused(self, client: NatsClient, subjects: dict[int, str]) -> None:
        self.refused |= subjects

    async def failed(self, error: Exception) -> None:
        self.errors.append(str(error))

    def hear(self, message: Msg) -> None:
        self.messages.append(message)
        self.heard.append((message.subject, message.reply, message.data, message.headers))

    async def feed(self, *chunks: bytes) -> None:
        for chunk in chunks:
            await self.client._ps.parse(chunk)

    @property
    def queued(self) -> list[tuple[str, bytes]]:
        """What the subscription with a queue got."""
        queue = self.other._pending_queue
        return [(message.subject, message.data) for message in (queue.get_nowait() for _ in range(queue.qsize()))]


def frame(subject: str, sid: int, payload: bytes, reply: str = "", headers: bytes = b"") -> bytes:
    """What a server sends for one message."""
    words = ["HMSG" if headers else "MSG", subject, str(sid), *([reply] if reply else [])]
    words += [str(len(headers))] if headers else []
    return f"{' '.join(words)} {len(headers) + len(payload)}\r\n".encode() + headers + payload + b"\r\n"


def traffic(seed: int) -> bytes:
    """A stream of many messages of all kinds, with what else a server says in between."""
    chance = random.Random(seed)
    stream = b""
    for number in range(200):
        sid = OTHER if chance.random() < 0.1 else ORDERED
        reply = f"_INBOX.{number}" if chance.random() < 0.5 else ""
        headers = b"NATS/1.0\r\nName: value\r\n\r\n" if chance.random() < 0.1 else b""
        if chance.random() < 0.05:
            headers = b"NATS/1.0 503\r\n\r\n"
        payload = chance.choice([b"", b"x", b"\r\n", b"MSG a 1 2\r\n", b"PING\r\n", chance.randbytes(700)])
        stream += frame(f"a.{number}", sid, payload, reply, headers)
        if chance.random() < 0.1:
            stream += chance.choice([b"+OK\r\n", b"PONG\r\n"])
    return stream


def cut(stream: bytes, seed: int) -> list[bytes]:
    """``stream`` as it might come out of a socket."""
    chance = random.Random(seed)
    chunks = []
    while stream:
        size = chance.choice([1, 2, 7, 50, 300, 5000])
        chunks.append(stream[:size])
        stream = stream[size:]
    return chunks


@pytest.mark.parametrize("seed", range(20))
async def test_the_parser_hands_over_what_nats_py_would_however_the_stream_is_cut(seed: int) -> None:
    ours, theirs = Receiver(), Receiver(Parser)
    assert type(ours.client._ps) is not Parser
    stream = traffic(seed)
    await theirs.feed(stream)
    await ours.feed(*cut(stream, seed))
    assert len(ours.heard) > 150
    assert ours.heard == theirs.heard
    assert ours.queued == theirs.queued
    assert (ours.client.stats["in_msgs"], ours.client.stats["in_bytes"]) == (
        theirs.client.stats["in_msgs"],
        theirs.client.stats["in_bytes"],
    )


async def test_a_message_arrives_once_and_whole_wherever_it_is_cut() -> None:
    stream = frame("a.1", ORDERED, b"one", "r.1") + frame("a.2", ORDERED, b"two\r\n")
    for at in range(len(stream) + 1):
        receiver = Receiver()
        await receiver.feed(stream[:at], stream[at:])
        assert receiver.heard == [("a.1", "r.1", b"one", None), ("a.2", "", b"two\r\n", None)]


async def test_a_message_has_all_that_nats_py_gives_it() -> None:
    ours, theirs = Receiver(), Receiver(Parser)
    theirs.client._build_message = MethodType(Client._build_message, theirs.client)  # type: ignore[method-assign]
    stream = frame("a.1", ORDERED, b"data", "answer")
    await theirs.feed(stream)
    await ours.feed(stream)
    (mine,), (other,) = ours.messages, theirs.messages
    assert dataclasses.replace(mine, _client=other._client) == other
    assert mine._client is ours.client


async def test_what_was_begun_is_forgotten_when_the_connection_is_lost() -> None:
    receiver = Receiver()
    await receiver.feed(frame("a.lost", ORDERED, b"half of it")[:-5])
    receiver.client._ps.reset()
    await receiver.feed(frame("a.new", ORDERED, b"whole"))
    assert receiver.heard == [("a.new", "", b"whole", None)]


@pytest.mark.parametrize(
    "line", [b"MSG a.1 1 many\r\n", b"MSG a.1\r\n", b"HMSG a.1 one 12 14\r\n", b"WHAT\r\n", b"\r\n"]
)
async def test_what_is_no_frame_is_a_protocol_error_as_in_nats_py(line: bytes) -> None:
    with pytest.raises(nats.errors.ProtocolError):
        await Receiver().feed(line)


async def test_a_subject_that_is_not_utf_8_is_reported_and_the_next_message_is_heard() -> None:
    receiver = Receiver()
    await receiver.feed(frame("a.X", ORDERED, b"1").replace(b"X", b"\xff") + frame("a.2", ORDERED, b"2"))
    assert [error.what for error in receiver.unreadables] == ["a message"]
    assert receiver.heard == [("a.2", "", b"2", None)]


async def test_messages_of_a_subscription_that_ended_are_left_out() -> None:
    receiver = Receiver()
    del receiver.client._subs[ORDERED]
    await receiver.feed(frame("a.1", ORDERED, b"1") + frame("b.1", OTHER, b"2"))
    assert receiver.heard == []
    assert receiver.queued == [("b.1", b"2")]


@pytest.fixture
async def connection(server: EmbeddedServer) -> AsyncIterator[Connection]:
    connection = Connection(Options(servers=[server.url]), client_name="test")
    await connection.open()
    yield connection
    await connection.close()


async def test_what_is_posted_arrives_in_order_with_what_is_published(connection: Connection, namespace: str) -> None:
    heard: list[tuple[str, bytes]] = []
    await connection.subscribe(f"{namespace}.>", lambda message: heard.append((message.reply, message.data)))
    client = cast(NatsClient, connection.client)
    before = client.stats["out_msgs"], client.stats["out_bytes"]
    for number in range(1000):
        payload, reply = b"%d\r\n" % number, "" if number % 2 else f"answer.{number}"
        if number % 3:
            assert client.post(f"{namespace}.x", payload, reply)
        else:
            await client.publish(f"{namespace}.x", payload, reply)
    expected = [("" if number % 2 else f"answer.{number}", b"%d\r\n" % number) for number in range(1000)]
    assert client.stats["out_msgs"] - before[0] == 1000
    assert client.stats["out_bytes"] - before[1] == sum(len(payload) for _, payload in expected)
    await connection.barrier()
    assert heard == expected


async def test_one_posted_message_is_sent_without_anything_else(connection: Connection, namespace: str) -> None:
    heard: list[bytes] = []
    await connection.subscribe(namespace, lambda message: heard.append(message.data))
    await connection.barrier()
    for sent in range(1, 4):
        assert cast(NatsClient, connection.client).post(namespace, b"", "")
        while len(heard) < sent:
            await asyncio.sleep(0)


async def test_a_posted_message_has_the_headers_that_a_published_one_has(
    connection: Connection, namespace: str
) -> None:
    heard: list[tuple[str, bytes, dict[str, str] | None]] = []
    await connection.subscribe(namespace, lambda message: heard.append((message.reply, message.data, message.headers)))
    headers = {"Natsrt-Record": '{"key":"k"}', "Nats-Expected-Last-Subject-Sequence": "7", "Other": "grüß: dich"}
    assert connection.client.post(namespace, b"payload\r\n", "answer", header_block(headers))
    await connection.client.publish(namespace, b"payload\r\n", "answer", headers)
    await connection.barrier()
    assert heard == [("answer", b"payload\r\n", headers)] * 2


async def test_headers_count_for_what_is_too_large_to_be_posted(connection: Connection, namespace: str) -> None:
    payload = bytes(connection.client.max_payload - 100)
    assert connection.client.post(namespace, payload, "", header_block({"A": "a"}))
    assert not connection.client.post(namespace, payload, "", header_block({"A": "a" * 100}))
    await connection.barrier()


async def test_a_sink_hears_without_a_queue_of_its_own_until_it_is_drained(
    connection: Connection, namespace: str
) -> None:
    heard: list[bytes] = []
    one = await connection.subscribe(namespace, lambda message: heard.append(message.data))
    other = await connection.subscribe(f"{namespace}.other", lambda message: heard.append(message.data))
    assert one.current is not None and other.current is not None
    assert one.current._pending_queue is other.current._pending_queue
    for number in range(100):
        await connection.publish(namespace, b"%d" % number)
    await connection.unsubscribe(one)
    assert heard == [b"%d" % number for number in range(100)]
    assert one.current is None
    await connection.publish(namespace, b"late")
    await connection.publish(f"{namespace}.other", b"other")
    await connection.barrier()
    assert heard[100:] == [b"other"]


async def test_commands_wait_for_no_server_and_can_be_cancelled(own_server: EmbeddedServer) -> None:
    connection = Connection(Options(servers=[own_server.url]), client_name="test")
    await connection.open()
    client = cast(NatsClient, connection.client)
    own_server.pause()
    client.doubt()  # the flusher now waits for the server's answer
    begun = [asyncio.ensure_future(client.subscribe(f"a.{number}")) for number in range(3000)]
    await asyncio.wait(begun, timeout=2)
    assert all(one.done() for one in begun)
    assert client._flush_queue is not None and client._flush_queue.qsize() <= 1
    own_server.resume()
    await connection.barrier()
    assert not client.keeps_back
    await connection.close()


async def full(connection: Connection, namespace: str, count: int, pause: float = 0.0) -> list[asyncio.Task[None]]:
    """Let ``count`` publishers wait for room in the buffer of a client that writes nothing.

    Each blocks the event loop for ``pause`` seconds when it goes on, as publishers with much to send do.
    """
    client = cast(NatsClient, connection.client)
    client.doubt()  # the flusher now waits for the server's answer
    while client.post(namespace, bytes(1_000_000), ""):
        pass

    async def publish(number: int) -> None:
        await connection.publish(namespace, b"%d" % number)
        time.sleep(pause)

    waiting = [asyncio.create_task(publish(number)) for number in range(count)]
    done, _ = await asyncio.wait(waiting, timeout=0.1)
    assert not done
    return waiting


async def test_all_who_wait_for_room_go_on_at_once_when_their_client_is_replaced(
    own_server: EmbeddedServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "_ONE_CLOSE", 0.2)  # seconds; then nobody cares for the old client any more
    connection = Connection(Options(servers=[own_server.url]), client_name="test")
    await connection.open()
    old, heard = cast(NatsClient, connection.client), list[int]()
    await connection.subscribe(namespace, lambda message: heard.append(len(message.data)))
    await connection.barrier()
    own_server.pause()
    waiting = await full(connection, namespace, 1500, pause=0.001)  # nats-py's queue has room for 1,024
    connection._replace.set()
    done, hanging = await asyncio.wait(waiting, timeout=LONG)
    assert not hanging and connection._client is not old
    for one in done:
        one.result()
    own_server.resume()
    await eventually(lambda: connection.reconnects == 1, LONG)
    await connection.barrier()
    assert len(heard) == 1503  # what they had queued is not lost
    await connection.close()


async def test_those_who_wait_for_room_go_on_when_their_client_is_closed(
    own_server: EmbeddedServer, namespace: str
) -> None:
    connection = Connection(Options(servers=[own_server.url]), client_name="test")
    await connection.open()
    own_server.pause()
    waiting = await full(connection, namespace, 3000)
    closing = asyncio.create_task(connection.client.close())
    done, hanging = await asyncio.wait(waiting, timeout=1.0)
    assert not hanging and all(one.exception() is None for one in done)
    own_server.resume()
    await closing
    await connection.close()


async def test_those_who_wait_for_room_go_on_when_the_connection_is_lost_and_nothing_of_theirs_is_lost(
    server: EmbeddedServer, namespace: str
) -> None:
    async with Proxy(server.url) as proxy:
        connection = Connection(Options(servers=[proxy.url], reconnect_wait=0.05), client_name="test")
        await connection.open()
        heard = list[int]()
        await connection.subscribe(namespace, lambda message: heard.append(len(message.data)))
        await connection.barrier()
        proxy.freeze()
        waiting = await full(connection, namespace, 3000)
        proxy.cut()
        done, hanging = await asyncio.wait(waiting, timeout=LONG)
        assert not hanging and all(one.exception() is None for one in done)
        assert not connection.connected
        await proxy.restore()
        await connection.round_trip(LONG)
        assert len(heard) == 3003 and connection.client.pending_data_size == 0
        await connection.close()


async def test_who_waits_for_room_can_be_cancelled(own_server: EmbeddedServer, namespace: str) -> None:
    connection = Connection(Options(servers=[own_server.url]), client_name="test")
    await connection.open()
    own_server.pause()
    one, other = await full(connection, namespace, 2)
    one.cancel()
    await asyncio.wait({one}, timeout=1.0)
    assert one.cancelled() and not other.done()
    own_server.resume()
    async with asyncio.timeout(LONG):
        await other
    await connection.close()


async def test_those_who_wait_for_room_go_on_when_the_flusher_ends(own_server: EmbeddedServer, namespace: str) -> None:
    connection = Connection(Options(servers=[own_server.url]), client_name="test")
    await connection.open()
    own_server.pause()
    waiting = await full(connection, namespace, 3)
    flusher = connection.client._flusher_task
    assert flusher is not None
    flusher.cancel()
    done, hanging = await asyncio.wait(waiting, timeout=1.0)
    assert not hanging and all(one.exception() is None for one in done)
    own_server.resume()
    await connection.close()


async def test_many_flushes_at_once_are_few_round_trips_and_each_covers_what_was_sent_before_it(
    connection: Connection, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, heard, pings = connection.client, set[bytes](), list[asyncio.Task[float]]()
    real = client.ping

    def counted() -> asyncio.Task[float]:
        pings.append(real())
        return pings[-1]

    monkeypatch.setattr(client, "ping", counted)
    await connection.subscribe(namespace, lambda message: heard.add(message.data))

    async def publish_and_flush(number: int) -> None:
        for _ in range(number % 7):
            await asyncio.sleep(0)
        await connection.publish(namespace, b"%d" % number)
        await client.flush()
        assert b"%d" % number in heard

    await asyncio.gather(*(publish_and_flush(number) for number in range(100)))
    assert len(pings) < 20


async def test_a_flush_that_is_given_up_ends_no_other_flush(connection: Connection) -> None:
    flushes = [asyncio.create_task(connection.client.flush()) for _ in range(3)]
    await asyncio.sleep(0)
    flushes[0].cancel()
    outcomes = await asyncio.gather(*flushes, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert outcomes[1:] == [None, None]


async def test_flushes_end_when_the_client_is_closed(connection: Connection) -> None:
    client = connection.client
    flushes = [asyncio.create_task(client.flush()) for _ in range(2)]
    await asyncio.sleep(0)
    await connection.close()
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(*flushes, return_exceptions=True)
    assert all(outcome is None or isinstance(outcome, nats.errors.Error) for outcome in outcomes)


async def has_no_client_named(server: EmbeddedServer, name: str) -> bool:
    def read() -> bool:
        with urlopen(f"{server.monitor_url}/connz?limit=4096") as page:
            return name not in [client.get("name") for client in json.load(page)["connections"]]

    return await asyncio.to_thread(read)


async def test_a_closed_client_never_connects_again_although_a_cancellation_was_ignored(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = Connection(Options(servers=[own_server.url]), client_name="test")
    await connection.open()
    client = cast(NatsClient, connection.client)
    entered, real = asyncio.Event(), client._process_connect_init

    async def ignore_the_first_cancellation() -> None:
        entered.set()
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:  # as asyncio.wait_for, before Python 3.12
            monkeypatch.setattr(client, "_process_connect_init", real)
        await real()

    monkeypatch.setattr(client, "_process_connect_init", ignore_the_first_cancellation)
    client.cut()
    async with asyncio.timeout(LONG):
        await entered.wait()
    await connection.close()
    assert client.is_closed
    assert [task for task in asyncio.all_tasks() if "_attempt_reconnect" in repr(task)] == []
    await eventually(lambda: has_no_client_named(own_server, "test"))


async def test_the_next_reconnect_waits_for_an_attempt_that_ignores_its_cancellation(connection: Connection) -> None:
    client, released = cast(NatsClient, connection.client), asyncio.Event()

    async def ignore_cancellations() -> None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()

    former = asyncio.create_task(ignore_cancellations())
    client._reconnecting.add(former)
    client.cut()
    await eventually(lambda: client.is_reconnecting)
    for _ in range(5):
        assert (await asyncio.wait({former}, timeout=0.1))[1]
        assert client.is_reconnecting
    released.set()
    await eventually(lambda: connection.reconnects == 1)


async def test_closing_drops_what_a_closed_socket_cannot_send(connection: Connection, namespace: str) -> None:
    client = connection.client
    assert client.post(f"{namespace}.x", b"never sent", "") and client.pending_data_size > 0
    client._transport.close()  # type: ignore[no-untyped-call]
    await client.close()  # nats-py alone: TypeError on Python 3.12 and newer
    assert client.is_closed and client.pending_data_size == 0


async def test_messages_with_some_reply_subjects_are_withdrawn_and_others_are_sent(
    connection: Connection, namespace: str
) -> None:
    client = connection.client
    heard: list[bytes] = []
    await connection.subscribe(f"{namespace}.>", lambda message: heard.append(message.data))
    await connection.barrier()
    assert client.post(f"{namespace}.a", b"1", "_INBOX.mine.1", header_block({"A": "a"}))
    assert client.post(f"{namespace}.a", b"2", "_INBOX.other.1")
    assert client.post(f"{namespace}.a", b"3 _INBOX.mine.", "")
    assert client.post(f"{namespace}.a", b"4", "_INBOX.mine.2")
    client.withdraw("_INBOX.mine.")
    assert client.pending_data_size == sum(map(len, client._pending))
    await connection.barrier()
    assert heard == [b"2", b"3 _INBOX.mine."]


async def test_a_message_that_would_have_to_wait_or_be_refused_is_not_posted(
    connection: Connection, namespace: str
) -> None:
    client = cast(NatsClient, connection.client)
    assert not client.post(namespace, bytes(client.max_payload + 1), "")
    posted = 0
    while client.post(namespace, bytes(1_000_000), ""):
        posted += 1
    assert client.pending_data_size > client._max_pending_size
    assert posted == 3  # 2 MiB is what nats-py keeps at most
    await connection.publish(namespace, b"after them")  # waits until they are written
    assert client.pending_data_size == 0
    assert client.post(namespace, b"room again", "")
    await connection.barrier()
    await connection.close()
    assert not client.post(namespace, b"nobody there", "")


async def test_a_large_message_arrives_whole_among_small_ones(connection: Connection, namespace: str) -> None:
    heard: list[bytes] = []
    await connection.subscribe(namespace, lambda message: heard.append(message.data))
    payloads = [bytes([number]) * size for number, size in enumerate([1, 1_000_000, 0, 65_536, 7, 1_000_000, 3])]
    for payload in payloads:
        await connection.publish(namespace, payload)
    await connection.barrier()
    assert heard == payloads
