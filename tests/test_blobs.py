"""Payloads that do not fit into one message are sent by reference, in both directions."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import nats.js.errors
import pytest
import pytest_asyncio
from autogen_core import (
    AgentId,
    CancellationToken,
    DefaultInterventionHandler,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    rpc,
)
from autogen_core import event as event_handler
from nats.aio.client import Client
from nats.js import api
from natsrt_cli.declaration import parse
from natsrt_cli.exits import Exit
from opentelemetry.sdk.trace import TracerProvider

from natsrt import NatsAgentRuntime, register
from natsrt.embedded import EmbeddedServer
from natsrt.errors import BlobDamaged, BlobLost, JetStreamFull, MessageTooLarge, StreamUnavailable
from natsrt.jetstream.blobs import Blobs
from natsrt.wire import envelope
from natsrt.wire.references import Reference
from tests.support.cli import Ended, natsrt
from tests.support.permission_scene import Case, Scene, configuration, in_namespace
from tests.support.permission_scene import Text as SceneText
from tests.support.processes import Processes, eventually

MB = 1_000_000
DEFAULT_MAX_PAYLOAD = "max_payload: 1MB\n"
SIZES = [
    pytest.param(2 * MB, id="2MB"),
    pytest.param(20 * MB, id="20MB"),
    # They take several seconds, most of it to make and to compare the payloads.
    pytest.param(50 * MB, id="50MB", marks=pytest.mark.slow),
    pytest.param(200 * MB, id="200MB", marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
]


@dataclass
class Text:
    text: str


@dataclass
class Ask:
    size: int


def text_of(size: int) -> str:
    """A text in which no two chunks are the same."""
    return "".join(f"{number:08x}" for number in range(size // 8))


class Desk(RoutedAgent):
    """Answers with what it gets, and remembers it."""

    seen: defaultdict[AgentId, list[str]] = defaultdict(list)

    def __init__(self) -> None:
        super().__init__("a desk")

    @rpc
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        self.seen[self.id].append(message.text)
        return message

    @rpc
    async def on_ask(self, message: Ask, ctx: MessageContext) -> Text:
        return Text(text_of(message.size))

    @event_handler
    async def on_event(self, message: dict, ctx: MessageContext) -> None:
        self.seen[self.id].append(message["text"])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    """A server with the max_payload that nats-server has by default."""
    config = tmp_path_factory.mktemp("server") / "nats.conf"
    config.write_text(f"{DEFAULT_MAX_PAYLOAD}jetstream {{ store_dir: '{config.parent / 'js'}' }}\n")
    async with EmbeddedServer(config=config, port=-1) as shared:
        yield shared


class Place:
    """The runtimes of one namespace. ``desk`` is a type that is not keyed, ``safe`` is keyed."""

    def __init__(self, url: str, namespace: str, stack: AsyncExitStack, client: Client) -> None:
        self.url, self.namespace, self._stack, self.client = url, namespace, stack, client
        self.stream = f"{namespace}_natsrt_blobs"

    async def runtime(self, **settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.url, namespace=self.namespace, **settings)
        return await self._stack.enter_async_context(runtime)

    async def worker(self, *types: str, **settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.url, namespace=self.namespace, keyed=["safe"], **settings)
        for agent_type in types or ("desk", "safe"):
            await register(runtime, Desk, agent_type, Desk)
            await runtime.add_subscription(TypeSubscription("news", agent_type))
        return await self._stack.enter_async_context(runtime)

    async def pair(self, **settings: Any) -> tuple[NatsAgentRuntime, NatsAgentRuntime]:
        return await self.worker(), await self.runtime(**settings)

    async def stored(self) -> int | None:
        """How many chunks are stored; None without a stream."""
        try:
            return (await self.client.jetstream().stream_info(self.stream)).state.messages
        except nats.js.errors.NotFoundError:
            return None

    async def is_empty(self) -> None:
        async def is_empty() -> bool:
            return await self.stored() == 0

        await eventually(is_empty)

    async def has(self, chunks: int) -> None:
        async def has() -> bool:
            return await self.stored() == chunks

        await eventually(has)

    async def command(self, *words: str, stdin: bytes) -> Ended:
        """The end of a command, with a body at its standard input."""
        here = ("--server", self.url, "--namespace", self.namespace)
        return await natsrt(*words, "-", *here, stdin=stdin.decode())

    def call(self, key: str, reference: Reference, **more: str) -> bytes:
        """A call by reference, as a participant of another language may send it."""
        named = {"id": "m1", "source": "/", "messagetype": "Text", "subject": key, **more}
        attributes = ",".join(envelope.attribute(name, value) for name, value in named.items())
        return envelope.encode(envelope.CALL, f"{attributes},{reference.attributes}", envelope.NO_DATA)


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    Desk.seen.clear()
    async with AsyncExitStack() as stack:
        client = await nats.connect(server.url)
        stack.push_async_callback(client.close)
        yield Place(server.url, namespace, stack, client)
    Desk.seen.clear()


def blobs(runtime: NatsAgentRuntime) -> Blobs:
    return runtime.running.network.blobs


def payload(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


class Gate:
    """Holds the loads of one runtime back until it is opened."""

    def __init__(self, runtime: NatsAgentRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        self._load, self.begun, self.opened = blobs(runtime).load, 0, asyncio.Event()
        monkeypatch.setattr(blobs(runtime), "load", self._held)

    async def _held(self, reference: Reference) -> bytes:
        self.begun += 1
        await self.opened.wait()
        return await self._load(reference)


# -- in both directions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("agent_type", ["desk", "safe"])
async def test_a_call_and_its_reply_are_of_any_size(place: Place, agent_type: str, size: int) -> None:
    _, caller = await place.pair()
    await caller.send_message(Text("small"), AgentId(agent_type, "k"))  # now the agent is there
    text = text_of(size)
    assert await caller.send_message(Text(text), AgentId(agent_type, "k")) == Text(text)
    await place.is_empty()


async def test_a_reply_alone_may_be_large(place: Place) -> None:
    _, caller = await place.pair()
    reply = await caller.send_message(Ask(2 * MB), AgentId("desk", "k"))
    assert reply == Text(text_of(2 * MB))
    await place.is_empty()


@pytest.mark.parametrize("size", SIZES)
async def test_an_event_reaches_all_subscribers_once(place: Place, size: int) -> None:
    await place.worker("desk")
    await place.worker("safe")
    await place.worker("other")
    publisher = await place.runtime()
    text = text_of(size)
    await publisher.publish_message({"text": text}, TopicId("news", "k"))
    await publisher.publish_message({"text": "later"}, TopicId("news", "k"))
    agents = [AgentId(agent_type, "k") for agent_type in ("desk", "safe", "other")]
    await eventually(lambda: all(len(Desk.seen[agent]) == 2 for agent in agents), timeout=60)
    for agent in agents:
        assert Desk.seen[agent] == [text, "later"]


async def test_spans_are_made_for_large_messages_too(place: Place) -> None:
    await place.worker(tracer_provider=TracerProvider())
    caller = await place.runtime(tracer_provider=TracerProvider())
    text = text_of(2 * MB)
    assert await caller.send_message(Text(text), AgentId("desk", "k")) == Text(text)
    await caller.publish_message({"text": text}, TopicId("news", "k"))
    assert await _texts(AgentId("desk", "k"), 2) == [text, text]


async def test_the_payload_of_an_event_expires(place: Place) -> None:
    await place.worker("desk")
    publisher = await place.runtime(blob_ttl=1)
    await publisher.publish_message({"text": text_of(2 * MB)}, TopicId("news", "k"))
    await eventually(lambda: Desk.seen[AgentId("desk", "k")])
    await place.is_empty()


async def test_a_forwarded_call_carries_its_reference(place: Place) -> None:
    """Half of these calls come to the worker that does not own the agent."""
    first, caller = await place.worker("safe"), await place.runtime()
    await caller.send_message(Text("now it has an owner"), AgentId("safe", "k"))
    await place.worker("safe")
    subject = f"{place.namespace}.agent.safe"
    for _ in range(12):
        reference = await blobs(caller).store(payload("x" * 2 * MB))
        answer = await place.client.request(subject, place.call("k", reference, features="blobs"), timeout=10)
        body = envelope.decode(answer.data)
        assert body is not None and body.type == envelope.REPLY and body.text("workerid") == first.worker_id
        assert body.reference is not None
        assert await blobs(caller).load(body.reference) == b'{"text":"' + b"x" * 2 * MB + b'"}'


# -- what fits, and what is too large ----------------------------------------------------------------------------------


async def test_a_payload_that_fits_never_touches_the_stream(place: Place) -> None:
    worker, caller = await place.pair()
    room = caller.running.connection.max_payload - 2000
    for agent_type in ("desk", "safe"):
        assert await caller.send_message(Text("x" * room), AgentId(agent_type, "k")) == Text("x" * room)
    await caller.publish_message({"text": "x" * room}, TopicId("news", "k"))
    await eventually(lambda: len(Desk.seen[AgentId("desk", "k")]) == len(Desk.seen[AgentId("safe", "k")]) == 2)
    assert await place.stored() is None


async def test_the_largest_message_that_fits_is_sent_in_one(place: Place) -> None:
    _, caller = await place.pair()
    connection = caller.running.connection

    async def call(size: int) -> None:
        await caller.send_message(Text("x" * size), AgentId("desk", "k"), message_id="the same")

    await call(connection.max_payload - 1000)
    longest = 2 * connection.max_payload - 1000 - connection.client.largest
    await call(longest)
    assert connection.client.largest == connection.max_payload and await place.stored() is None
    await call(longest + 1)
    assert await place.stored() is not None and connection.reconnects == 0


async def test_each_size_around_the_limit_is_sent(place: Place) -> None:
    """Also the sizes at which an event fits on its topic, and not as it is sent to the keyed agent."""
    _, caller = await place.pair()
    limit = caller.running.connection.max_payload
    sizes = [limit - less for less in (0, 10, 100, 150, 200, 250, 300, 350, 400, 450, 500)]
    for size in sizes:
        text = "x" * size
        assert await caller.send_message(Text(text), AgentId("safe", "k")) == Text(text)
        await caller.publish_message({"text": text}, TopicId("news", "k"))
    seen = [len(text) for text in await _texts(AgentId("safe", "k"), 2 * len(sizes))]
    assert seen == [size for size in sizes for _ in range(2)]
    assert [len(text) for text in await _texts(AgentId("desk", "k"), len(sizes))] == sizes


async def _texts(agent: AgentId, count: int) -> list[str]:
    await eventually(lambda: len(Desk.seen[agent]) >= count)
    return Desk.seen[agent]


async def test_a_lower_threshold_can_be_set(place: Place) -> None:
    _, caller = await place.pair(blob_threshold=1000)
    await caller.publish_message({"text": "x" * 900}, TopicId("news", "k"))
    assert await place.stored() is None
    await caller.publish_message({"text": "x" * 1000}, TopicId("news", "k"))
    assert await place.stored() == 1


async def test_a_payload_over_max_blob_size_is_refused_before_anything_is_sent(place: Place) -> None:
    _, caller = await place.pair(max_blob_size=3 * MB)
    for sending in (
        caller.send_message(Text("x" * 3 * MB), AgentId("desk", "k")),
        caller.publish_message({"text": "x" * 3 * MB}, TopicId("news", "k")),
    ):
        with pytest.raises(MessageTooLarge, match="3,000,011 bytes, and the setting max_blob_size is 3,000,000"):
            await sending
    assert await place.stored() is None and not Desk.seen


async def test_a_receiver_reads_nothing_over_its_max_blob_size(place: Place) -> None:
    await place.worker("desk", max_blob_size=2 * MB)
    caller = await place.runtime()
    with pytest.raises(MessageTooLarge, match="the receiver's setting max_blob_size is 2,000,000"):
        await caller.send_message(Text("x" * 2 * MB), AgentId("desk", "k"))
    await place.is_empty()


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interventions", [[], [DefaultInterventionHandler()]], ids=["directly", "intervened"])
@pytest.mark.parametrize("agent_type", ["desk", "safe"])
async def test_what_is_sent_after_a_large_message_starts_after_it(
    place: Place, agent_type: str, interventions: list[DefaultInterventionHandler]
) -> None:
    _, caller = await place.pair(intervention_handlers=interventions)
    agent, large = AgentId(agent_type, "k"), text_of(3 * MB)
    sending: list[Awaitable[Any]] = []
    for number in range(3):
        sending.append(caller.send_message(Text(f"a{number}"), agent))
        sending.append(caller.send_message(Text(large), agent))
        sending.append(caller.publish_message({"text": f"b{number}"}, TopicId("news", "k")))
        sending.append(caller.publish_message({"text": large}, TopicId("news", "k")))
    await asyncio.gather(*sending)
    expected = [text for number in range(3) for text in (f"a{number}", large, f"b{number}", large)]
    assert await _texts(agent, len(expected)) == expected


@pytest.mark.parametrize("agent_type", ["desk", "safe"])
async def test_only_messages_for_the_same_agent_wait_for_a_payload(
    place: Place, agent_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, caller = await place.pair()
    gate = Gate(worker, monkeypatch)
    agent, other, large = AgentId(agent_type, "k"), AgentId(agent_type, "other"), text_of(2 * MB)
    await caller.send_message(Text("first"), agent)
    calls = [asyncio.ensure_future(caller.send_message(Text(text), agent)) for text in (large, "later")]
    await eventually(lambda: gate.begun)
    await caller.send_message(Text("passes"), other)
    assert Desk.seen[agent] == ["first"] and Desk.seen[other] == ["passes"]
    gate.opened.set()
    await asyncio.gather(*calls)
    assert Desk.seen[agent] == ["first", large, "later"]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


async def test_a_chunk_that_is_missing_is_named(place: Place) -> None:
    worker, caller = await place.pair()
    reference = await blobs(caller).store(bytes(2 * MB))
    await place.client.jetstream().purge_stream(
        place.stream, subject=f"{place.namespace}.natsrt.blob.{reference.blob_id}.2"
    )
    with pytest.raises(BlobLost, match=f"chunk 2 of 4 of the blob {reference.blob_id}") as lost:
        await blobs(worker).load(reference)
    assert (lost.value.chunk, lost.value.chunks) == (2, 4)


@pytest.mark.parametrize("changed", [b"x" * 524_288, b"x", b"x" * 900_000], ids=["other", "shorter", "longer"])
async def test_a_chunk_that_was_changed_is_found(place: Place, changed: bytes) -> None:
    worker, caller = await place.pair()
    reference = await blobs(caller).store(bytes(2 * MB))
    await place.client.jetstream().publish(f"{place.namespace}.natsrt.blob.{reference.blob_id}.1", changed)
    with pytest.raises(BlobDamaged, match=reference.blob_id):
        await blobs(worker).load(reference)


async def test_no_more_is_read_than_the_reference_says(place: Place) -> None:
    worker, caller = await place.pair()
    stored = await blobs(caller).store(bytes(1000))
    with pytest.raises(BlobDamaged, match="do not have 999 bytes together"):
        await blobs(worker).load(stored._replace(size=999, chunks=5))  # the others are not there


async def test_the_caller_is_told_that_its_payload_was_lost(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    _, caller = await place.pair()
    store = blobs(caller).store

    async def stored_and_lost(data: bytes, *more: Any) -> Reference:
        reference = await store(data, *more)
        await place.client.jetstream().purge_stream(place.stream)
        return reference

    monkeypatch.setattr(blobs(caller), "store", stored_and_lost)
    for agent_type in ("desk", "safe"):
        with pytest.raises(BlobLost, match="chunk 0 of 4") as lost:
            await caller.send_message(Text("x" * 2 * MB), AgentId(agent_type, "k"))
        assert lost.value.chunks == 4
    assert not Desk.seen
    assert await caller.send_message(Text("small"), AgentId("safe", "k")) == Text("small")


WRITER = """
import asyncio, sys
from natsrt import NatsAgentRuntime

async def main():
    async with NatsAgentRuntime(sys.argv[1], namespace=sys.argv[2], blob_ttl=1) as runtime:
        blobs = runtime.running.network.blobs
        store, number, stored = blobs.stream._acks.publish, 0, 0

        async def some(*arguments):
            nonlocal number, stored
            number += 1
            if number > 5:
                await asyncio.Event().wait()
            sequence = await store(*arguments)
            stored += 1
            if stored == 5:
                print("half", flush=True)
            return sequence

        blobs.stream._acks.publish = some
        await blobs.store(bytes(20_000_000))

asyncio.run(main())
"""


async def test_a_writer_that_is_killed_leaves_nothing(place: Place, processes: Processes, tmp_path: Path) -> None:
    await place.worker("desk")
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    writer = processes.python(script, place.url, place.namespace)
    await writer.wait_for_line("half")
    writer.send_signal(signal.SIGKILL)
    await place.is_empty()
    assert (await place.client.jetstream().stream_info(place.stream)).state.last_seq


async def test_a_call_that_is_cancelled_stops_uploading(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    _, caller = await place.pair()
    publish, begun, opened = blobs(caller).stream._acks.publish, 0, asyncio.Event()

    async def held(*arguments: Any) -> int:
        nonlocal begun
        begun += 1
        if begun > 2:
            await opened.wait()
        return await publish(*arguments)

    monkeypatch.setattr(blobs(caller).stream._acks, "publish", held)
    token = CancellationToken()
    call = asyncio.ensure_future(
        caller.send_message(Text("x" * 20 * MB), AgentId("desk", "k"), cancellation_token=token)
    )
    await place.has(2)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await caller.send_message(Text("small"), AgentId("desk", "k")) == Text("small")
    opened.set()
    await place.is_empty()
    assert begun <= 10 and Desk.seen[AgentId("desk", "k")] == ["small"]


async def test_the_payload_of_a_call_that_nobody_waits_for_is_deleted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, caller = await place.pair()
    gate = Gate(worker, monkeypatch)
    call = asyncio.ensure_future(caller.send_message(Text("x" * 2 * MB), AgentId("desk", "k")))
    await eventually(lambda: gate.begun)
    assert await place.stored() == 4
    call.cancel()
    await place.is_empty()
    gate.opened.set()


@pytest.mark.parametrize("through_workers", [False, True])
async def test_where_jetstream_is_full_the_sender_is_told_and_nothing_is_sent(
    tmp_path: Path, namespace: str, monkeypatch: pytest.MonkeyPatch, through_workers: bool
) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(f"{DEFAULT_MAX_PAYLOAD}jetstream {{ max_file_store: 8MB, store_dir: '{tmp_path / 'js'}' }}\n")
    async with EmbeddedServer(config=config, port=-1) as small, AsyncExitStack() as stack:
        client = await nats.connect(small.url)
        stack.push_async_callback(client.close)
        place = Place(small.url, namespace, stack, client)
        _, caller = await place.pair()
        own = blobs(caller)
        if through_workers:
            source = property(lambda self: self._served if self is own else self.stream)
            monkeypatch.setattr(Blobs, "_source", source)
        Desk.seen.clear()
        with pytest.raises(JetStreamFull, match="max_file_store"):
            await caller.send_message(Text("x" * 20 * MB), AgentId("desk", "k"))
        await place.is_empty()
        assert not Desk.seen
        assert await caller.send_message(Text("x" * 2 * MB), AgentId("desk", "k")) == Text("x" * 2 * MB)


async def test_a_stream_that_somebody_else_configured_is_not_used(place: Place) -> None:
    _, caller = await place.pair()
    await place.client.jetstream().add_stream(
        api.StreamConfig(name=place.stream, subjects=[f"{place.namespace}.natsrt.blob.*.*"], allow_direct=True)
    )
    with pytest.raises(
        StreamUnavailable, match=f"allow_msg_ttl is false and must be true.*nats stream .* {place.stream}"
    ):
        await caller.send_message(Text("x" * 2 * MB), AgentId("desk", "k"))
    assert not Desk.seen


async def test_doctor_examines_the_stream(place: Place) -> None:
    _, caller = await place.pair()
    js = place.client.jetstream()

    async def found() -> list[tuple[str, str]]:
        ended = await natsrt("doctor", "--json", "--server", place.url, "--namespace", place.namespace)
        return [(one["level"], one["text"]) for one in ended.json if one["check"] == "large payloads"]

    assert await found() == []
    await blobs(caller).store(bytes(2 * MB))
    ((level, text),) = await found()
    assert level == "ok" and text.startswith(f"the stream {place.stream} has 2,000,") and text.endswith("in 4 chunks")
    config = (await js.stream_info(place.stream)).config
    await js.update_stream(config.evolve(discard=api.DiscardPolicy.OLD))
    assert await found() == [
        ("problem", f"the settings of {place.stream} are not natsrt's: discard is old and must be new")
    ]


async def test_a_stream_that_was_deleted_is_made_again(place: Place) -> None:
    _, caller = await place.pair()
    for _ in range(2):
        assert await caller.send_message(Text("x" * 2 * MB), AgentId("desk", "k")) == Text("x" * 2 * MB)
        await place.is_empty()
        await place.client.jetstream().delete_stream(place.stream)


# -- participants of other versions ------------------------------------------------------------------------------------


async def test_a_worker_of_an_older_version_is_sent_no_reference(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsrt.membership.FEATURES", ("peer", "cancel"))
    worker, caller = await place.pair()
    for sending in (
        caller.send_message(Text("x" * 2 * MB), AgentId("desk", "k")),
        caller.publish_message({"text": "x" * 2 * MB}, TopicId("news", "k")),
    ):
        with pytest.raises(MessageTooLarge, match=f"the worker {worker.worker_id} has an older version"):
            await sending
    assert await place.stored() is None and not Desk.seen


@pytest.mark.parametrize("features", [{}, {"features": "others"}])
async def test_a_caller_of_an_older_version_gets_no_reference(place: Place, features: dict[str, str]) -> None:
    _, caller = await place.pair()
    reference = await blobs(caller).store(payload("x" * 2 * MB))
    answer = await place.client.request(
        f"{place.namespace}.agent.desk", place.call("k", reference, **features), timeout=10
    )
    assert answer.headers is not None and answer.headers["Nats-Service-Error-Code"] == "413"
    assert "did not say that it reads payloads by reference" in answer.headers["Nats-Service-Error"]


async def test_a_plain_caller_is_limited_by_the_server(place: Place) -> None:
    await place.worker()
    question = json.dumps({"size": 2 * MB}).encode()
    answer = await place.client.request(f"{place.namespace}.agent.desk", question, timeout=10)
    assert answer.headers is not None and answer.headers["Nats-Service-Error-Code"] == "413"


# -- on the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_type", ["desk", "safe"])
@pytest.mark.parametrize("times", [0.9, 1, 20])
async def test_send_takes_a_body_of_any_size_and_prints_the_reply(place: Place, agent_type: str, times: float) -> None:
    await place.worker()
    size = int(times * place.client.max_payload)
    body = payload(text_of(size))
    ended = await place.command("send", f"{agent_type}/k", "--type-name", "Text", stdin=body)
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.json == json.loads(body)
    assert Desk.seen[AgentId(agent_type, "k")] == [ended.json["text"]]
    if times < 1:
        assert await place.stored() is None
    else:
        await place.is_empty()


async def test_send_reports_the_error_of_a_large_call_as_that_of_a_small_one(place: Place) -> None:
    await place.worker()
    for size in (10, 2 * MB):
        body = json.dumps({"txt": "x" * size}).encode()
        ended = await place.command("send", "desk/k", "--type-name", "Text", stdin=body)
        assert ended.code == Exit.REMOTE_ERROR and "text: the field is missing" in ended.stderr, ended.stderr
    assert not Desk.seen
    await place.is_empty()


@pytest.mark.parametrize("times", [0.9, 1, 20])
async def test_publish_takes_a_body_of_any_size(place: Place, times: float) -> None:
    await place.worker()
    body = payload(text_of(int(times * place.client.max_payload)))
    ended = await place.command("publish", "news/k", "--type-name", "dict", stdin=body)
    assert ended.code == 0 and f"published {len(body):,} bytes" in ended.stderr, ended.stderr

    async def seen() -> bool:
        return all(Desk.seen[AgentId(agent_type, "k")] for agent_type in ("desk", "safe"))

    await eventually(seen)
    assert all(texts == [json.loads(body)["text"]] for texts in Desk.seen.values())


@pytest.mark.parametrize("words", [("send", "desk/k"), ("publish", "news/k")], ids=["send", "publish"])
async def test_a_large_body_needs_the_name_of_its_type(place: Place, words: tuple[str, ...]) -> None:
    await place.worker()
    body = payload("x" * place.client.max_payload)
    ended = await place.command(*words, stdin=body)
    assert ended.code == Exit.USAGE
    assert f"the body has {len(body):,} bytes" in ended.stderr and "--type-name" in ended.stderr
    assert not Desk.seen and await place.stored() is None


# -- permissions -------------------------------------------------------------------------------------------------------

DECLARATION = parse(
    """
    [types.echo]
    subscribes = ["news"]
    [types.ledger]
    keyed = true
    subscribes = ["news"]
    [users.bank]
    role = "worker"
    hosts = ["echo", "ledger"]
    [users.web]
    role = "caller"
    calls = ["echo", "ledger"]
    publishes = ["news"]
    """,
    "blobs",
)


async def test_a_caller_with_its_permissions_sends_and_receives_any_size(tmp_path: Path, namespace: str) -> None:
    """It may send no request to JetStream: a worker makes the stream, reads the replies, and deletes for it."""
    case = Case(in_namespace(DECLARATION, namespace), "web", None)
    async with EmbeddedServer(config=configuration([case], tmp_path), port=-1) as own, AsyncExitStack() as stack:
        scene = Scene(own.url, case, stack)
        bank, web = await scene.worker("bank"), await scene.runtime("web")
        assert not web.running.registry.reads_bucket
        text = SceneText(text_of(10 * MB))
        for agent_type in ("echo", "ledger"):
            assert await web.send_message(text, AgentId(agent_type, "one")) == text
        js = bank.running.connection.jetstream

        async def is_empty() -> bool:
            return not (await js.stream_info(f"{namespace}_natsrt_blobs")).state.messages

        await eventually(is_empty)
        scene.seen.clear()
        await web.publish_message({"text": text.text}, TopicId("news", "one"))
        await eventually(lambda: scene.seen == [{"text": text.text}] * 2)
        assert web.running.connection.undecodable == bank.running.connection.undecodable == 0


async def test_a_caller_stores_no_chunk_itself(tmp_path: Path, namespace: str) -> None:
    """The server sends an acknowledgement to any subject that the publisher names, and checks no permission for it."""
    case = Case(in_namespace(DECLARATION, namespace), "web", None)
    bucket = f"$KV.{namespace}_natsrt_registry.r.worker.forged"
    async with EmbeddedServer(config=configuration([case], tmp_path), port=-1) as own, AsyncExitStack() as stack:
        scene = Scene(own.url, case, stack)
        bank, web = await scene.worker("bank"), await scene.client("web")
        await blobs(bank).store(b"makes the stream")
        js = bank.running.connection.jetstream
        await web.publish(f"{namespace}.natsrt.blob.{'x' * 32}.0", b"chunk", reply=bucket)
        await web.flush()
        await eventually(lambda: scene.violations)
        assert "natsrt.blob" in scene.violations[0]
        assert (await js.stream_info(f"{namespace}_natsrt_blobs")).state.messages == 1
        with pytest.raises(nats.js.errors.NotFoundError):
            await js.get_last_msg(f"KV_{namespace}_natsrt_registry", bucket, direct=True)


async def test_a_worker_stores_for_callers_no_longer_than_for_itself(place: Place) -> None:
    worker = await place.worker("desk", blob_ttl=5)
    subject = f"{place.namespace}.natsrt.blobs"
    headers = {"Natsrt-Blob": "x" * 32, "Natsrt-Chunk": "0", "Natsrt-TTL": "9000"}
    for wrong in ({"Natsrt-Blob": "*"}, {"Natsrt-Chunk": "-1"}, {"Natsrt-Chunk": ">"}, {"Natsrt-TTL": "never"}):
        answer = await place.client.request(subject, b"chunk", headers={**headers, **wrong}, timeout=5)
        assert answer.headers is not None and answer.headers["Nats-Service-Error-Code"] == "400"
    assert not await place.stored()
    answer = await place.client.request(subject, b"chunk", headers=headers, timeout=5)
    assert answer.headers is None and await place.stored() == 1
    stored = await worker.running.connection.jetstream.get_last_msg(
        place.stream, f"{place.namespace}.natsrt.blob.{'x' * 32}.0"
    )
    assert stored.headers is not None and stored.headers["Nats-TTL"] == "5s"


async def test_nobody_reads_or_deletes_a_blob_by_a_pattern(place: Place) -> None:
    _, caller = await place.pair()
    reference = await blobs(caller).store(bytes(MB))
    for blob_id in ("*", ">", "", f"{reference.blob_id}.0", 7, None):
        assert await _asked(place, "delete", id=blob_id) == 400
        assert await _asked(place, "read", id=blob_id, chunk=0) == 400
    for chunk in ("*", -1, True, None):
        assert await _asked(place, "read", id=reference.blob_id, chunk=chunk) == 400
    assert await _asked(place, "purge", id=reference.blob_id) == 400
    assert await place.stored() == 2
    assert await _asked(place, "delete", id=reference.blob_id) == 200
    assert await place.stored() == 0


async def _asked(place: Place, want: str, **more: Any) -> int:
    """The code of a worker's answer to a question about blobs; 200 if it is no error."""
    body = envelope.encode(envelope.BLOBS, '"id":"q","source":"/"', json.dumps({"want": want, **more}).encode())
    answer = await place.client.request(f"{place.namespace}.natsrt.blobs", body, timeout=5)
    return int((answer.headers or {}).get("Nats-Service-Error-Code", 200))
