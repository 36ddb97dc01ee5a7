"""Events on durable topics, and delayed ones, whose payloads do not fit into one message of the server."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
import nats.js.errors
import pytest
import pytest_asyncio
from autogen_core import MessageContext, RoutedAgent, TopicId, TypeSubscription, event
from nats.aio.client import Client
from nats.aio.msg import Msg
from natsrt_cli.declaration import parse

import natsrt
from natsrt import DurableTopics, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import BlobLost, CannotSchedule, EventNotStored, JetStreamFull, MessageTooLarge
from natsrt.jetstream.blobs import Blobs
from tests.support.cli import natsrt as natsrt_command
from tests.support.permission_scene import Case, Scene, configuration, in_namespace
from tests.support.processes import eventually

MB = 1_000_000
TOPIC = TopicId("work.jobs", "a")
LARGE = "".join(f"{number:08x}" for number in range(2 * MB // 8))
CHUNKS = 4
DAY = 86400.0


@dataclass
class Note:
    text: str


@dataclass
class Seen:
    begun: int = 0
    fails: int = 0
    """How often the handler is still to raise."""
    texts: list[str] = field(default_factory=list)


class Works(RoutedAgent):
    def __init__(self, seen: Seen) -> None:
        super().__init__("works")
        self._seen = seen

    @event
    async def on_note(self, message: Note, ctx: MessageContext) -> None:
        assert natsrt.current_delivery() is not None
        self._seen.begun += 1
        if self._seen.fails:
            self._seen.fails -= 1
            raise ValueError("not now")
        self._seen.texts.append(message.text)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    """A server with the max_payload that nats-server has by default."""
    config = tmp_path_factory.mktemp("server") / "nats.conf"
    config.write_text(f"max_payload: 1MB\njetstream {{ store_dir: '{config.parent / 'js'}' }}\n")
    async with EmbeddedServer(config=config, port=-1) as shared:
        yield shared


class Place:
    """The runtimes of one namespace, in which topics that start with ``work.`` are durable."""

    def __init__(self, url: str, namespace: str, stack: AsyncExitStack, client: Client) -> None:
        self.url, self.namespace, self._stack = url, namespace, stack
        self.js = client.jetstream()
        self.blobs, self.events = f"{namespace}_natsrt_blobs", f"{namespace}_natsrt_events"
        self.seen = Seen()

    async def runtime(self, **settings: Any) -> NatsAgentRuntime:
        settings = {"durable": ["work."], "retry_delay": 0.05, "namespace": self.namespace} | settings
        return await self._stack.enter_async_context(NatsAgentRuntime(self.url, **settings))

    async def worker(self, **settings: Any) -> NatsAgentRuntime:
        settings = {"durable": ["work."], "retry_delay": 0.05, "namespace": self.namespace} | settings
        runtime = NatsAgentRuntime(self.url, **settings)
        await natsrt.register(runtime, Works, "jobs", lambda: Works(self.seen))
        await runtime.add_subscription(TypeSubscription("work.jobs", "jobs"))
        return await self._stack.enter_async_context(runtime)

    async def enter(self, runtime: NatsAgentRuntime) -> None:
        await self._stack.enter_async_context(runtime)

    async def chunks(self) -> list[Msg]:
        """What is stored of payloads: the messages of the stream."""
        try:
            state = (await self.js.stream_info(self.blobs)).state
        except nats.js.errors.NotFoundError:
            return []
        found = []
        for sequence in range(state.first_seq, state.last_seq + 1):
            try:
                found.append(await self.js.get_msg(self.blobs, sequence))
            except nats.js.errors.NotFoundError:
                continue
        return found  # type: ignore[return-value]

    async def lives(self) -> set[str]:
        """The times to live of all chunks."""
        return {(chunk.headers or {})["Nats-TTL"] for chunk in await self.chunks()}

    async def has(self, chunks: int) -> None:
        async def has() -> bool:
            return len(await self.chunks()) == chunks

        await eventually(has, 30.0)

    async def stored(self) -> int:
        return (await self.js.stream_info(self.events)).state.messages

    async def dead_again(self, letters: int) -> None:
        """Wait until there have been so many dead letters."""
        stream = f"{self.namespace}_natsrt_dead"

        async def were() -> bool:
            return (await self.js.stream_info(stream)).state.last_seq == letters

        await eventually(were)

    async def dead(self) -> Any:
        """The only dead letter, when it is there."""
        stream = f"{self.namespace}_natsrt_dead"

        async def is_there() -> bool:
            return (await self.js.stream_info(stream)).state.messages == 1

        await eventually(is_there)
        return await self.js.get_msg(stream, 1)


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        client = await nats.connect(server.url)
        stack.push_async_callback(client.close)
        yield Place(server.url, namespace, stack, client)


def blobs(runtime: NatsAgentRuntime) -> Blobs:
    return runtime.running.network.blobs


async def test_a_large_event_is_stored_and_handled_and_its_payload_outlives_it(place: Place) -> None:
    worker = await place.worker(max_deliver=5)
    await worker.publish_message(Note(LARGE), TOPIC)
    await eventually(lambda: place.seen.texts)
    assert place.seen.texts == [LARGE] and await place.stored() == 1
    assert await place.lives() == {f"{30 * 86400 + 3600}s"} and len(await place.chunks()) == CHUNKS


async def test_each_size_around_the_limit_is_stored(place: Place) -> None:
    worker = await place.worker()
    limit = worker.running.connection.max_payload
    for less in range(0, 1200, 60):
        await worker.publish_message(Note("x" * (limit - less)), TOPIC)
    await eventually(lambda: len(place.seen.texts) == 20)
    assert sorted(map(len, place.seen.texts)) == [limit - less for less in range(1140, -1, -60)]
    assert worker.running.connection.reconnects == 0


async def test_events_are_stored_in_their_order_whatever_their_sizes(place: Place) -> None:
    runtime = await place.runtime()
    texts = ["a", LARGE, "b", "c", LARGE, "d"]
    ids = [f"id-{number}" for number in range(len(texts))]
    publishes = (
        runtime.publish_message(Note(text), TOPIC, message_id=one) for text, one in zip(texts, ids, strict=True)
    )
    await asyncio.gather(*publishes)
    for sequence, one in enumerate(ids, 1):
        stored = await place.js.get_msg(place.events, sequence)
        assert (stored.headers or {})["Nats-Msg-Id"].startswith(f"{one}@")


async def test_keyed_agents_get_large_events_in_order_whichever_worker_feeds_them(place: Place) -> None:
    limit = 0
    for name in ("one", "two"):
        settings: dict[str, Any] = {"durable": ["work."], "keyed": ["jobs"], "namespace": place.namespace}
        runtime = NatsAgentRuntime(place.url, name=name, **settings)
        await natsrt.register(runtime, Works, "jobs", lambda: Works(place.seen))
        await runtime.add_subscription(TypeSubscription("work.jobs", "jobs"))
        await place.enter(runtime)
        limit = runtime.running.connection.max_payload
    publisher = await place.runtime()
    sizes = [10, 2 * MB, 20, *range(limit - 2000, limit, 250), 3 * MB, 30]
    for source in ("a", "b", "c"):
        for size in sizes:
            await publisher.publish_message(Note(source * size), TopicId("work.jobs", source))
    await eventually(lambda: len(place.seen.texts) == 3 * len(sizes), 30.0)
    for source in ("a", "b", "c"):
        assert [len(text) for text in place.seen.texts if text[0] == source] == sizes


async def test_a_large_event_waits_for_a_worker_and_is_tried_again(place: Place) -> None:
    async with NatsAgentRuntime(place.url, namespace=place.namespace, durable=["work."]) as first:
        await natsrt.register(first, Works, "jobs", lambda: Works(place.seen))
        await first.add_subscription(TypeSubscription("work.jobs", "jobs"))
    publisher = await place.runtime()
    await publisher.publish_message(Note(LARGE), TOPIC)
    place.seen.fails = 2
    await place.worker()
    await eventually(lambda: place.seen.texts)
    assert place.seen.texts == [LARGE] and place.seen.begun == 3


async def test_a_delayed_event_may_be_large_and_its_payload_waits_with_it(place: Place) -> None:
    worker = await place.worker()
    await worker.publish_message(Note(LARGE), TOPIC, delay=0.5)
    assert not place.seen.texts
    await eventually(lambda: place.seen.texts)
    assert place.seen.texts == [LARGE]
    await worker.publish_message(Note(LARGE), TOPIC, delay=365 * DAY)
    seconds = {int(life.removesuffix("s")) for life in await place.lives()} - {30 * 86400 + 3600}
    assert all(abs(one - (395 * 86400 + 3600)) < 30 for one in seconds) and seconds


@pytest.mark.parametrize(("max_age", "lives"), [(None, "never"), (60, "3660s"), (9e9, "never")])
async def test_a_payload_is_kept_for_as_long_as_its_stream_keeps_events(
    place: Place, max_age: float | None, lives: str
) -> None:
    runtime = await place.runtime(durable=[DurableTopics("work.", max_age=max_age)])
    await runtime.publish_message(Note(LARGE), TOPIC)
    assert await place.lives() == {lives}


async def test_a_payload_whose_event_is_not_stored_is_deleted(place: Place) -> None:
    runtime = await place.runtime(durable=[DurableTopics("work.", max_messages=1)], publish_timeout=1)
    await runtime.publish_message(Note(LARGE), TOPIC)
    with pytest.raises(JetStreamFull):
        await runtime.publish_message(Note(LARGE), TOPIC)
    await place.has(CHUNKS)
    with pytest.raises(CannotSchedule):
        await runtime.publish_message(Note(LARGE), TOPIC, delay=60)
    await place.has(CHUNKS)
    await place.js.delete_stream(place.events)
    other = await place.runtime(durable=[], publish_timeout=1)
    with pytest.raises(EventNotStored) as caught:
        await other.publish_message(Note(LARGE), TOPIC)
    assert not caught.value.may_be_stored
    await place.has(CHUNKS)


async def test_an_event_that_is_published_twice_keeps_one_payload(place: Place) -> None:
    worker = await place.worker()
    for _ in range(2):
        await worker.publish_message(Note(LARGE), TOPIC, message_id="one")
    for _ in range(2):
        await worker.publish_message(Note(LARGE), TOPIC, message_id="two", delay=1.0)
    await eventually(lambda: len(place.seen.texts) == 2)
    await place.has(2 * CHUNKS)
    assert place.seen.texts == [LARGE, LARGE]


async def test_an_event_whose_payload_is_gone_becomes_a_dead_letter_at_once(place: Place) -> None:
    publisher = await place.runtime()
    async with NatsAgentRuntime(place.url, namespace=place.namespace, durable=["work."]) as first:
        await natsrt.register(first, Works, "jobs", lambda: Works(place.seen))
        await first.add_subscription(TypeSubscription("work.jobs", "jobs"))
    await publisher.publish_message(Note(LARGE), TOPIC)
    await place.js.purge_stream(place.blobs)
    worker = await place.worker()
    letter = await place.dead()
    assert letter.headers["Natsrt-Dead-Attempts"] == "1" and "BlobLost" in letter.headers["Natsrt-Dead-Error"]
    assert not place.seen.begun and worker.health().dead_letters == 1


async def test_a_large_event_that_cannot_be_read_becomes_a_dead_letter_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = await place.runtime()
    worker = await place.worker()
    original = blobs(worker).load

    async def load(reference: Any) -> bytes:
        await original(reference)
        return b'{"text": 7}'

    monkeypatch.setattr(blobs(worker), "load", load)
    await publisher.publish_message(Note(LARGE), TOPIC)
    letter = await place.dead()
    assert letter.headers["Natsrt-Dead-Attempts"] == "1" and "CannotDecode" in letter.headers["Natsrt-Dead-Error"]
    assert b"dataref" in letter.data


async def test_an_event_over_max_blob_size_is_refused_before_anything_is_stored(place: Place) -> None:
    runtime = await place.runtime(max_blob_size=MB)
    with pytest.raises(MessageTooLarge, match="max_blob_size"):
        await runtime.publish_message(Note(LARGE), TOPIC)
    assert not await place.chunks() and await place.stored() == 0


@pytest.mark.parametrize("delay", [(), ("--delay", "1s")], ids=["now", "later"])
async def test_publish_stores_a_body_of_any_size(place: Place, delay: tuple[str, ...]) -> None:
    await place.worker()
    body = json.dumps({"text": "x" * 20 * MB})
    here = ("--server", place.url, "--namespace", place.namespace)
    ended = await natsrt_command("publish", "work.jobs/a", "-", "--type-name", "Note", *delay, *here, stdin=body)
    assert ended.code == 0, ended.stderr

    async def handled() -> bool:
        return bool(place.seen.texts)

    await eventually(handled)
    assert place.seen.texts == ["x" * 20 * MB]
    (life,) = await place.lives()
    assert int(life.removesuffix("s")) > 29 * 24 * 3600, "it is kept for as long as its stream keeps the event"


async def test_a_large_body_waits_for_its_time_and_can_be_cancelled(place: Place) -> None:
    runtime = await place.worker()
    body = json.dumps({"text": LARGE})
    here = ("--server", place.url, "--namespace", place.namespace)
    ended = await natsrt_command(
        "publish", "work.jobs/a", "-", "--type-name", "Note", "--delay", "1h", *here, stdin=body
    )
    assert ended.code == 0, ended.stderr
    assert await place.stored() == 1
    assert await runtime.cancel_delayed(ended.stdout.strip(), TOPIC)
    assert not place.seen.begun


DECLARATION = parse(
    """
    durable = ["work."]
    [types.jobs]
    subscribes = ["work.jobs"]
    [users.mill]
    role = "worker"
    hosts = ["jobs"]
    publishes = ["work.*"]
    [users.web]
    role = "publisher"
    publishes = ["work.*"]
    [users.ops]
    role = "operator"
    """,
    "durable blobs",
)


async def test_workers_publish_large_events_with_their_permissions_and_publishers_do_not(
    tmp_path: Path, namespace: str
) -> None:
    case = Case(in_namespace(DECLARATION, namespace), "mill", None)
    async with EmbeddedServer(config=configuration([case], tmp_path), port=-1) as own, AsyncExitStack() as stack:
        scene, seen = Scene(own.url, case, stack), Seen()
        mill = scene.unstarted("mill", durable=["work."])
        await natsrt.register(mill, Works, "jobs", lambda: Works(seen))
        await mill.add_subscription(TypeSubscription("work.jobs", "jobs"))
        await stack.enter_async_context(mill)
        web = await scene.runtime("web")
        large = Note("x" * 10 * MB)
        with pytest.raises(MessageTooLarge, match="may send no requests to JetStream"):
            await web.publish_message(large, TOPIC)
        await web.publish_message(Note("small"), TOPIC)
        await mill.publish_message(large, TOPIC)
        await eventually(lambda: len(seen.texts) == 2)
        assert seen.texts == ["small", large.text]
        sweep = mill.running.incoming.durable._parts.payloads
        stream = f"{namespace}_natsrt_events"
        assert await sweep._candidates() == {} and await sweep._used(stream) == set()  # it may ask


async def test_a_worker_that_may_not_read_dead_letters_leaves_the_payloads_of_their_stream(
    tmp_path: Path, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "natsrt.blobs")
    case = Case(in_namespace(DECLARATION, namespace), "mill", None)
    async with EmbeddedServer(config=configuration([case], tmp_path), port=-1) as own, AsyncExitStack() as stack:
        scene, seen = Scene(own.url, case, stack), Seen()
        place = Place(own.url, namespace, stack, await scene.client("plain"))
        mill = scene.unstarted("mill", **soon(), max_deliver=1)
        await natsrt.register(mill, Works, "jobs", lambda: Works(seen))
        await mill.add_subscription(TypeSubscription("work.jobs", "jobs"))
        await stack.enter_async_context(mill)
        seen.fails = 1
        await mill.publish_message(Note(LARGE), TOPIC)
        await place.dead()
        await mill.publish_message(Note(LARGE), TOPIC)
        await eventually(lambda: seen.texts == [LARGE])
        await place.js.purge_stream(place.events)
        skipped = f"payloads of {place.events} stay while it has dead letters"
        await eventually(lambda: sum(skipped in line for line in caplog.messages) >= 3, 30.0)  # it does not give up
        assert len(await ids(place)) == 2
        refused = [record for record in caplog.records if "not let" in record.getMessage()]
        assert all(record.levelno == logging.DEBUG for record in refused)  # nothing that an operator must look at
        ops = await scene.runtime("ops")
        (letter,) = [one async for one in ops.dead_letters()]
        assert await ops.discard(letter)
        await eventually_none(place)


# -- what becomes of a payload after its event ------------------------------------------------------------------------


def soon(*, max_age: float | None = None) -> dict[str, Any]:
    """Settings with which the payloads of events that are gone are deleted within seconds."""
    return {"blob_ttl": 1, "publish_timeout": 1, "durable": [DurableTopics("work.", max_age=max_age)]}


async def ids(place: Place) -> set[str]:
    """The ids of all payloads that are stored."""
    return {chunk.subject.split(".")[-2] for chunk in await place.chunks()}


async def test_the_payload_of_an_event_that_its_stream_does_not_have_any_more_is_deleted(place: Place) -> None:
    worker = await place.worker(**soon())
    await worker.publish_message(Note(LARGE), TOPIC)
    assert await place.lives() == {"never"}
    await eventually(lambda: place.seen.texts)
    (first,) = await ids(place)
    settled_at = int(first.rpartition("-")[2], 16)
    await eventually(lambda: time.time() > settled_at + 1)
    await worker.publish_message(Note(LARGE), TOPIC)
    (second,) = await ids(place) - {first}
    assert first in await ids(place)  # its event is still there
    await place.js.purge_stream(place.events, keep=1)
    await place.has(CHUNKS)
    assert await ids(place) == {second}
    await place.js.purge_stream(place.events)
    await eventually_none(place)


async def test_a_payload_is_deleted_only_after_its_event_has_been_gone_for_blob_ttl(place: Place) -> None:
    worker = await place.worker(**soon())
    sweep = worker.running.incoming.durable._parts.payloads
    sweep._grace = 3600.0
    await worker.publish_message(Note(LARGE), TOPIC)
    await eventually(lambda: place.seen.texts)
    (blob_id,) = await ids(place)
    settled_at = int(blob_id.rpartition("-")[2], 16)
    await eventually(lambda: time.time() > settled_at)
    assert await sweep.sweep() == 0
    assert not sweep._gone_since  # its event is still there
    await place.js.purge_stream(place.events)
    assert await sweep.sweep() == 0
    assert list(sweep._gone_since) == [blob_id]
    assert await ids(place) == {blob_id}
    sweep._grace = 0.0
    assert await sweep.sweep() == 1
    await eventually_none(place)


async def test_the_payload_of_a_delayed_event_is_left_to_its_time_to_live(place: Place) -> None:
    worker = await place.worker(**soon())
    await worker.publish_message(Note(LARGE), TOPIC, delay=365 * DAY)
    await worker.publish_message(Note(LARGE), TOPIC)
    await eventually(lambda: place.seen.texts)
    await place.js.purge_stream(place.events)
    await place.has(CHUNKS)
    (left,) = await ids(place)
    assert "-" not in left


async def _die(place: Place, **settings: Any) -> tuple[NatsAgentRuntime, Any]:
    """A worker whose only large event has become a dead letter."""
    worker = await place.worker(max_deliver=1, **settings)
    place.seen.fails = 1
    await worker.publish_message(Note(LARGE), TOPIC)
    await place.dead()
    (letter,) = [one async for one in worker.dead_letters()]
    return worker, letter


async def test_a_dead_letter_keeps_its_payload_until_it_is_discarded(place: Place) -> None:
    worker, letter = await _die(place, **soon())
    (of_letter,) = await ids(place)
    await worker.publish_message(Note(LARGE), TOPIC)
    await eventually(lambda: place.seen.texts)
    await place.js.purge_stream(place.events)
    await place.has(CHUNKS)  # the payload of the other one is gone
    assert await ids(place) == {of_letter}
    assert await worker.discard(letter)
    await eventually_none(place)


async def eventually_none(place: Place) -> None:
    async def none() -> bool:
        return not await place.chunks()

    await eventually(none, 30.0)


async def test_a_dead_letter_is_redriven_with_its_payload_after_its_event_is_gone(place: Place) -> None:
    worker, letter = await _die(place, **soon())
    (of_letter,) = await ids(place)
    await worker.publish_message(Note(LARGE), TOPIC)
    await eventually(lambda: place.seen.texts)
    await place.js.purge_stream(place.events)
    await place.has(CHUNKS)
    place.seen.fails = 10_000  # so that the event stays a dead letter, or waits
    await worker.redrive(letter)
    await place.dead_again(2)
    (letter,) = [one async for one in worker.dead_letters()]
    place.seen.fails = 0
    await worker.redrive(letter)
    await eventually(lambda: len(place.seen.texts) == 2)
    assert place.seen.texts == [LARGE, LARGE] and await ids(place) == {of_letter}
    await place.js.purge_stream(place.events)
    await eventually_none(place)


async def test_a_dead_letter_gives_its_payload_thirty_days(place: Place) -> None:
    worker, letter = await _die(place, **soon(max_age=60))
    assert await place.lives() == {f"{30 * 86400 + 1}s"} and len(await place.chunks()) == CHUNKS
    await worker.redrive(letter)
    await eventually(lambda: place.seen.texts)
    assert place.seen.texts == [LARGE] and await place.lives() == {f"{30 * 86400 + 1}s"}


async def test_a_dead_letter_whose_payload_is_gone_is_not_redriven(place: Place) -> None:
    worker, letter = await _die(place)
    await place.js.purge_stream(place.blobs)
    with pytest.raises(BlobLost, match=f"chunk {CHUNKS - 1} of {CHUNKS}"):
        await worker.redrive(letter)
    assert [one.sequence async for one in worker.dead_letters()] == [letter.sequence]


async def test_what_is_kept_longer_is_stored_once_more_in_its_place(place: Place) -> None:
    worker = await place.worker()
    reference = await blobs(worker).store(LARGE.encode())
    before = [chunk.data for chunk in await place.chunks()]
    await blobs(worker).keep(reference, 3000)
    assert await place.lives() == {"3600s"}  # nothing is written for what lives long enough
    await blobs(worker).keep(reference, 5000)
    assert await place.lives() == {"8600s"}
    assert sorted(chunk.data for chunk in await place.chunks()) == sorted(before)
    await blobs(worker).keep(reference, math.inf)
    assert await place.lives() == {"never"} and await blobs(worker).load(reference) == LARGE.encode()
    await place.js.purge_stream(place.blobs, subject=f"{place.namespace}.natsrt.blob.{reference.blob_id}.1")
    await blobs(worker).keep(reference, 10**9)
    await place.js.publish(
        f"{place.namespace}.natsrt.blob.{reference.blob_id}.{CHUNKS - 1}", b"x", headers={"Nats-TTL": "1h"}
    )
    with pytest.raises(BlobLost, match=f"chunk 1 of {CHUNKS}"):
        await blobs(worker).keep(reference, 10**9)
