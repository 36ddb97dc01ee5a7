"""Durable topics: what is declared, which streams there are, and what it means that an event was published."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import nats.js.errors
import orjson
import pytest
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    Subscription,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
    event,
)
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

import natsrt
from natsrt import ConfigurationError, DurableTopics, NatsAgentRuntime, Options
from natsrt.durable_types import MONTH
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.registry.durable import check_agreement
from natsrt.jetstream.registry.entries import DurableEntry
from natsrt.jetstream.streams import events_stream, require_version
from natsrt.sending.durable import WINDOW
from natsrt.task_types import TASK_TOPICS
from natsrt.wire.ranges import LARGEST, LONGEST
from natsrt.wire.subjects import Subjects
from natsrt.wire.task_attributes import MOST
from tests.support.processes import TAP, eventually
from tests.test_domains import Count


@dataclass
class Order:
    number: int


class Reader(RoutedAgent):
    """Notes the orders that it handles, in ``seen``."""

    seen: list[tuple[str, str, int]]

    def __init__(self, seen: list[tuple[str, str, int]]) -> None:
        super().__init__("reads")
        self.seen = seen

    @event
    async def on_order(self, message: Order, ctx: MessageContext) -> None:
        assert ctx.topic_id is not None
        self.seen.append((self.id.type, ctx.topic_id.type, message.number))


class Place:
    """Makes runtimes of one namespace that end with the test."""

    def __init__(self, server: EmbeddedServer, namespace: str, stack: AsyncExitStack, client: Client) -> None:
        self.server, self.namespace, self._stack = server, namespace, stack
        self.client = client
        self.js: JetStreamContext = client.jetstream()
        self.stream = f"{namespace}_natsrt_events"
        self.seen: list[tuple[str, str, int]] = []

    def make(self, **settings: Any) -> NatsAgentRuntime:
        return NatsAgentRuntime(self.server.url, namespace=self.namespace, **settings)

    async def runtime(self, **settings: Any) -> NatsAgentRuntime:
        return await self._stack.enter_async_context(self.make(**settings))

    async def worker(self, agent_type: str, *subscriptions: Subscription, **settings: Any) -> NatsAgentRuntime:
        runtime = self.make(**settings)
        await runtime.register_factory(agent_type, lambda: Reader(self.seen))
        for subscription in subscriptions:
            await runtime.add_subscription(subscription)
        return await self._stack.enter_async_context(runtime)

    async def stored(self, stream: str | None = None) -> list[tuple[str, int]]:
        """The subjects, without the namespace, and the numbers of the orders in a stream."""
        stream = stream or self.stream
        found = []
        state = (await self.js.stream_info(stream)).state
        for sequence in range(state.first_seq, state.last_seq + 1):
            message = await self.js.get_msg(stream, sequence)
            assert message.subject is not None and message.data is not None
            found.append((message.subject.removeprefix(f"{self.namespace}."), number_in(message.data)))
        return found

    async def settled(self, consumer: str) -> bool:
        """Whether the consumer exists, and has nothing left to deliver or to be acknowledged."""
        try:
            info = await self.js.consumer_info(self.stream, consumer)
        except nats.js.errors.NotFoundError:
            return False
        return not (info.num_pending or info.num_ack_pending)

    async def was_confirmed(self, sequence: int) -> bool:
        """Whether the publisher of an event knew that its topic is durable."""
        message = await self.js.get_msg(self.stream, sequence)
        return (message.headers or {}).get("Nats-Expected-Stream") == self.stream


def number_in(body: bytes) -> int:
    tree = orjson.loads(body)
    return int(tree.get("data", tree)["number"])


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        client = await nats.connect(server.url)
        stack.push_async_callback(client.close)
        yield Place(server, namespace, stack, client)


@pytest.fixture
async def own_place(own_server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    """A place on a server of the test's own."""
    async with AsyncExitStack() as stack:
        client = await nats.connect(own_server.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
        stack.push_async_callback(client.close)
        yield Place(own_server, namespace, stack, client)


# -- publishing ------------------------------------------------------------------------------------------------------


async def test_an_event_on_a_durable_topic_is_stored_when_publish_message_returns(place: Place) -> None:
    runtime = await place.runtime(durable=["orders.", "audit.log"])
    await runtime.publish_message(Order(1), TopicId("orders.new", "a"), message_id="m1")
    await runtime.publish_message(Order(2), TopicId("audit.log", "b"))
    await runtime.publish_message(Order(3), TopicId("audit", "b"))
    await runtime.publish_message(Order(4), TopicId("orders", "b"))
    assert await place.stored() == [("topic.orders.new.a", 1), ("topic.audit.log.b", 2)]
    message = await place.js.get_msg(place.stream, 1)
    assert message.headers == {
        "Nats-Msg-Id": f"m1@{place.namespace}.topic.orders.new.a",
        "Nats-Expected-Stream": place.stream,
    }


async def test_a_runtime_without_the_setting_knows_durable_topics_from_the_registry(place: Place) -> None:
    await place.runtime(durable=["orders."])
    caller = await place.runtime()
    await caller.publish_message(Order(1), TopicId("orders.new", "a"))
    assert await place.stored() == [("topic.orders.new.a", 1)]
    assert await place.was_confirmed(1)


async def test_two_thousand_publishes_at_once_are_stored_in_their_order(place: Place) -> None:
    runtime = await place.runtime(durable=["orders."])
    topic = TopicId("orders.new", "a")
    await asyncio.gather(*(runtime.publish_message(Order(n), topic) for n in range(2_000)))
    assert [number for _, number in await place.stored()] == list(range(2_000))


async def test_an_event_that_is_published_twice_with_one_id_is_one_event_on_each_topic(place: Place) -> None:
    runtime = await place.runtime(durable=["orders."])
    for topic in ("orders.new", "orders.new", "orders.paid"):
        await runtime.publish_message(Order(1), TopicId(topic, "a"), message_id="m1")
    assert await place.stored() == [("topic.orders.new.a", 1), ("topic.orders.paid.a", 1)]


async def test_ids_with_line_ends_and_other_letters_are_kept_apart(place: Place) -> None:
    runtime = await place.runtime(durable=["orders."])
    for number, message_id in enumerate(("é", "=C3=A9", "a\r\nX-Header: b", "a b")):
        await runtime.publish_message(Order(number), TopicId("orders.new", "a"), message_id=message_id)
    stored = [await place.js.get_msg(place.stream, sequence) for sequence in range(1, 5)]
    ids = [(message.headers or {})["Nats-Msg-Id"].partition("@")[0] for message in stored]
    assert ids == ["=C3=A9", "=3DC3=3DA9", "a=0D=0AX-Header=3A=20b", "a=20b"]


async def test_an_event_of_a_plain_client_is_stored_too(place: Place) -> None:
    await place.runtime(durable=["orders."])
    await place.client.publish(f"{place.namespace}.topic.orders.new.a", b'{"number": 7}')
    await place.client.flush()
    assert await eventually(place.stored) == [("topic.orders.new.a", 7)]


async def test_events_wait_for_room_in_the_window_and_keep_their_order(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsrt.sending.durable.WINDOW", 3)
    runtime = await place.runtime(durable=["orders."])
    publisher = runtime.running.outgoing.publisher
    most = 0

    async def publish(number: int) -> None:
        nonlocal most
        await runtime.publish_message(Order(number), TopicId("orders.new", "a"))
        most = max(most, len(publisher._under_way) + 1)

    await asyncio.gather(*(publish(number) for number in range(50)))
    assert [number for _, number in await place.stored()] == list(range(50))
    assert most <= 3 < WINDOW


async def test_a_stream_that_is_full_is_an_error_that_names_the_limit(place: Place) -> None:
    runtime = await place.runtime(durable=DurableTopics("orders.", max_messages=2))
    for number in range(2):
        await runtime.publish_message(Order(number), TopicId("orders.new", "a"))
    with pytest.raises(natsrt.JetStreamFull, match=rf"{place.stream}: it is full: raise its max_msgs"):
        await runtime.publish_message(Order(2), TopicId("orders.new", "a"))
    assert len(await place.stored()) == 2


async def test_a_stream_that_discards_old_events_takes_new_ones(place: Place) -> None:
    runtime = await place.runtime(durable=DurableTopics("orders.", max_messages=2, discard="old"))
    for number in range(3):
        await runtime.publish_message(Order(number), TopicId("orders.new", "a"))
    assert [number for _, number in await place.stored()] == [1, 2]


async def test_an_event_that_is_too_large_is_refused_before_it_is_sent(place: Place) -> None:
    runtime = await place.runtime(durable=["orders."], max_blob_size=1_000_000)
    limit = runtime.running.connection.max_payload
    with pytest.raises(natsrt.MessageTooLarge, match="max_blob_size"):
        await runtime.publish_message("x" * (limit - 250), TopicId("orders.new", "a"))  # only with the headers
    assert (await place.js.stream_info(place.stream)).state.messages == 0
    assert runtime.running.connection.reconnects == 0


async def test_the_answer_of_a_subscriber_is_not_taken_for_a_confirmation(place: Place) -> None:
    await place.runtime(durable=["orders."])
    caller = await place.runtime(publish_timeout=0.5)
    await place.js.delete_stream(place.stream)
    answered: list[str] = []

    async def answer(message: Any) -> None:
        answered.append(message.reply)
        await message.respond(b'{"stream": "other", "seq": 1}')

    await place.client.subscribe(f"{place.namespace}.topic.>", cb=answer)
    await asyncio.sleep(0)  # nats-py would write its PING before the SUB
    await place.client.flush()
    with pytest.raises(natsrt.EventNotStored, match="other answered in place of the stream") as raised:
        await caller.publish_message(Order(1), TopicId("orders.new", "a"))
    assert answered and raised.value.may_be_stored


async def test_without_its_stream_an_event_is_an_error_at_once(place: Place) -> None:
    await place.runtime(durable=["orders."])
    caller = await place.runtime()
    await place.js.delete_stream(place.stream)
    with pytest.raises(natsrt.EventNotStored, match="an event on orders.new/a: it was deleted") as raised:
        await caller.publish_message(Order(1), TopicId("orders.new", "a"))
    assert raised.value.may_be_stored is TAP  # beside a tap, nobody says that there is no stream
    assert (raised.value.topic, raised.value.stream) == ("orders.new/a", place.stream)


async def test_a_runtime_with_the_setting_makes_a_deleted_stream_again(place: Place) -> None:
    runtime = await place.runtime(durable=["orders."])
    await place.js.delete_stream(place.stream)
    await runtime.publish_message(Order(1), TopicId("orders.new", "a"))
    assert await place.stored() == [("topic.orders.new.a", 1)]


async def test_events_are_confirmed_in_their_order_after_a_restart_of_the_server(own_place: Place) -> None:
    runtime = await own_place.runtime(durable=["orders."])
    own_place.server.pause()
    publishing = [
        asyncio.create_task(runtime.publish_message(Order(number), TopicId("orders.new", "a"))) for number in range(20)
    ]
    await eventually(lambda: len(runtime.running.outgoing.publisher._under_way) == 20)
    restarting = asyncio.create_task(own_place.server.restart(kill=True, downtime=0.3))
    await eventually(lambda: not runtime.running.connection.connected)
    later = [runtime.publish_message(Order(number), TopicId("orders.new", "a")) for number in range(20, 30)]
    await asyncio.gather(*publishing, *later)
    await restarting
    await eventually(lambda: own_place.client.is_connected)
    assert [number for _, number in await own_place.stored()] == list(range(30))


async def test_an_event_that_cannot_be_sent_for_publish_timeout_seconds_is_an_error(own_place: Place) -> None:
    runtime = await own_place.runtime(durable=["orders."], publish_timeout=1.0)
    topic = TopicId("orders.new", "a")
    await runtime.publish_message(Order(0), topic)
    await own_place.server.kill()
    await eventually(lambda: not runtime.running.connection.connected)
    core = asyncio.create_task(runtime.publish_message(Order(1), TopicId("other", "a")))  # it waits for longer
    began = asyncio.get_running_loop().time()
    outcomes = await asyncio.gather(
        *(runtime.publish_message(Order(n), topic, message_id=f"order-{n}") for n in range(2, 5)),
        return_exceptions=True,
    )
    assert asyncio.get_running_loop().time() - began < 10.0, "offline_timeout is 30 s"
    for error in outcomes:
        assert isinstance(error, natsrt.EventNotStored) and not error.may_be_stored
        assert "publish_timeout = 1 s: the connection is lost" in str(error)
    assert not core.done()
    await own_place.server.start()
    await asyncio.wait_for(core, 20)
    await asyncio.gather(*(runtime.publish_message(Order(n), topic, message_id=f"order-{n}") for n in range(2, 5)))
    await eventually(lambda: own_place.client.is_connected)
    assert [number for _, number in await own_place.stored()] == [0, 2, 3, 4]


async def test_events_that_were_not_written_do_not_overtake_those_that_were_lost(own_place: Place) -> None:
    runtime = await own_place.runtime(durable=["orders."])
    await runtime.publish_message(Order(-1), TopicId("other", "a"))
    client = runtime.running.connection.client
    transport: Any = client._transport
    socket = transport._io_writer.transport
    own_place.server.pause()

    def publish(numbers: range) -> list[asyncio.Task[None]]:
        topic = TopicId("orders.new", "a")
        return [asyncio.create_task(runtime.publish_message(Order(number), topic)) for number in numbers]

    lost = publish(range(10))
    await eventually(lambda: runtime.running.outgoing.under_way == 10 and client.pending_data_size == 0)
    filling = "x" * 100_000
    while socket.get_write_buffer_size() == 0:  # more than the kernel takes, so that nothing is written any more
        await runtime.publish_message(filling, TopicId("other", "a"))
        await asyncio.sleep(0)
    waiting = publish(range(10, 20))
    await eventually(lambda: any(b".topic.orders." in command for command in client._pending))
    await own_place.server.restart(kill=True)
    await asyncio.gather(*lost, *waiting)
    await eventually(lambda: own_place.client.is_connected)
    assert [number for _, number in await own_place.stored()] == list(range(20))


async def test_an_event_is_sent_again_when_the_stream_is_silent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsrt.sending.durable._SILENT", 0.2)
    await place.runtime(durable=["orders."])
    caller = await place.runtime()
    config = (await place.js.stream_info(place.stream)).config
    monkeypatch.setattr(caller.running.outgoing.publisher, "_find_out", lambda *_: None)
    await place.client.subscribe(f"{place.namespace}.topic.>")  # so the server does not say that nobody listens
    await place.js.delete_stream(place.stream)
    publishing = asyncio.create_task(caller.publish_message(Order(1), TopicId("orders.new", "a")))
    await eventually(lambda: any(event.sent for event in caller.running.outgoing.publisher._under_way))
    await place.js.add_stream(config)
    await publishing
    assert await place.stored() == [("topic.orders.new.a", 1)]


async def test_a_server_that_hangs_is_an_error_after_the_timeout(own_place: Place) -> None:
    runtime = await own_place.runtime(durable=["orders."], publish_timeout=0.5)
    own_place.server.pause()
    try:
        with pytest.raises(natsrt.EventNotStored, match=r"publish_timeout = 0\.5 s: .*it may have been stored"):
            await runtime.publish_message(Order(1), TopicId("orders.new", "a"), message_id="m1")
    finally:
        own_place.server.resume()
    await eventually(lambda: runtime.running.connection.connected)
    await runtime.publish_message(Order(1), TopicId("orders.new", "a"), message_id="m1")
    assert len(await own_place.stored()) == 1


CONF = """
jetstream {}
accounts { A { jetstream: enabled, users: [
  {user: all, password: p}
  {user: few, password: p, permissions: {publish: {deny: ["*.topic.orders.>", "$JS.>", "$KV.>"]}}}
] } }
"""


async def test_a_stream_of_another_kind_that_captures_the_topic_is_not_taken_for_the_right_one(place: Place) -> None:
    await place.runtime(durable=["orders."])
    caller = await place.runtime()
    await place.js.delete_stream(place.stream)
    await place.js.add_stream(name=f"{place.namespace}_mine", subjects=[f"{place.namespace}.topic.>"])
    with pytest.raises(natsrt.EventNotStored, match="did not store .* another stream captures") as raised:
        await caller.publish_message(Order(1), TopicId("orders.new", "a"))
    assert not raised.value.may_be_stored


async def test_a_runtime_that_stops_ends_what_is_not_confirmed(own_place: Place) -> None:
    runtime = own_place.make(durable=["orders."])
    await runtime.start()
    own_place.server.pause()
    try:
        publishing = asyncio.create_task(runtime.publish_message(Order(1), TopicId("orders.new", "a")))
        await eventually(lambda: runtime.running.outgoing.under_way == 1)
        stopping = asyncio.create_task(runtime.stop())
        with pytest.raises(natsrt.EventNotStored, match="this runtime was stopped"):
            await publishing
    finally:
        own_place.server.resume()
    await stopping


async def test_an_event_that_is_not_allowed_is_an_error_that_names_the_subject(tmp_path: Path, namespace: str) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(CONF)
    async with EmbeddedServer(config=config) as server, AsyncExitStack() as stack:
        client = await nats.connect(server.url, user="all", password="p")
        stack.push_async_callback(client.close)
        place = Place(server, namespace, stack, client)
        await place.runtime(user="all", password="p", durable=["orders.", "audit.log"])
        few = await place.runtime(user="few", password="p")
        with pytest.raises(natsrt.PermissionDenied, match=rf"publish to '{namespace}\.topic\.orders\.new\.a'"):
            await few.publish_message(Order(1), TopicId("orders.new", "a"))
        await few.publish_message(Order(2), TopicId("audit.log", "a"))
        assert await place.stored() == [("topic.audit.log.a", 2)]
        assert await place.was_confirmed(1)  # though this user may not read the registry's bucket


async def test_who_publishes_on_a_durable_topic_has_the_acknowledgement_stored_where_it_may_not_write(
    tmp_path: Path, namespace: str
) -> None:
    """A limit of the server that docs/security.md tells of. If this fails, the server checks reply subjects now."""
    config = tmp_path / "nats.conf"
    config.write_text(CONF)
    async with EmbeddedServer(config=config) as server, AsyncExitStack() as stack:
        client = await nats.connect(server.url, user="all", password="p")
        stack.push_async_callback(client.close)
        place = Place(server, namespace, stack, client)
        worker = place.make(user="all", password="p", durable=["audit.log"], keyed=["count"])
        await natsrt.register(worker, Count, "count", Count)
        await stack.enter_async_context(worker)
        assert await worker.send_message(1, AgentId("count", "one")) == 1

        few = await nats.connect(server.url, user="few", password="p", error_cb=_ignore)
        stack.push_async_callback(few.close)
        bucket = f"KV_{namespace}_natsrt_agents"
        record = f"$KV.{namespace}_natsrt_agents.a.count.two"
        await few.publish(record, b"refused")
        await few.publish(f"{namespace}.topic.audit.log.a", b"{}", reply=record)
        await few.flush()

        async def stored() -> bool:
            with contextlib.suppress(nats.js.errors.NotFoundError):
                message = await place.js.get_last_msg(bucket, record)
                return message.data == b'{"stream":"%s","seq":1}' % place.stream.encode()
            return False

        await eventually(stored)
        with pytest.raises(natsrt.CannotDecode, match="it has no header Natsrt-Record"):
            await worker.send_message(1, AgentId("count", "two"))


async def _ignore(error: Exception) -> None:
    pass


# -- core NATS -------------------------------------------------------------------------------------------------------


async def test_no_core_copy_of_a_durable_topic_is_handled_and_other_topics_stay_on_core_nats(place: Place) -> None:
    await place.worker("typed", TypeSubscription("orders.new", "typed"), durable=["orders."])
    await place.worker("prefixed", TypePrefixSubscription("o", "prefixed"))
    await place.worker("custom", Everything("custom"))
    caller = await place.runtime()
    await caller.publish_message(Order(1), TopicId("orders.new", "default"))
    await caller.publish_message(Order(2), TopicId("other", "default"))
    await eventually(lambda: len(place.seen) >= 2)
    await caller.publish_message(Order(3), TopicId("end", "default"))
    await eventually(lambda: ("custom", "end", 3) in place.seen)
    await eventually(lambda: len(place.seen) >= 5)  # from the stream
    assert sorted(place.seen) == [
        ("custom", "end", 3),
        ("custom", "other", 2),
        ("prefixed", "orders.new", 1),
        ("prefixed", "other", 2),
        ("typed", "orders.new", 1),
    ]
    assert await place.stored() == [("topic.orders.new.default", 1)]
    subscribed = await subjects_heard(place)
    assert f"{place.namespace}.topic.orders.new.*" not in subscribed


async def test_topics_that_become_durable_while_workers_run_are_handled_from_core_nats_no_more(place: Place) -> None:
    await place.worker("typed", TypeSubscription("orders.new", "typed"))
    await place.worker("prefixed", TypePrefixSubscription("orders.", "prefixed"))
    caller = await place.runtime()
    await caller.publish_message(Order(1), TopicId("orders.new", "default"))
    await eventually(lambda: len(place.seen) == 2)
    await place.runtime(durable=["orders.new"])
    await caller.publish_message(Order(2), TopicId("orders.new", "default"))
    await caller.publish_message(Order(3), TopicId("orders.paid", "default"))
    await eventually(lambda: ("prefixed", "orders.paid", 3) in place.seen)
    await eventually(lambda: len(place.seen) >= 5)  # from the stream
    assert sorted(number for _, _, number in place.seen) == [1, 1, 2, 2, 3]
    assert await place.stored() == [("topic.orders.new.default", 2)]
    assert await place.was_confirmed(1)


async def test_a_keyed_agent_gets_no_copy_of_a_publisher_that_does_not_know_that_the_topic_is_durable(
    place: Place,
) -> None:
    worker = await place.worker("keyed", TypePrefixSubscription("o", "keyed"), keyed=["keyed"])
    await place.runtime(durable=["orders."], subscription_timeout=0.1)
    caller = await place.runtime()
    await caller.publish_message(Order(1), TopicId("other", "k"))
    await eventually(lambda: len(place.seen) == 1)  # the owner is known, and listens
    await eventually(lambda: place.settled("keyed"), 15.0)
    failures: list[bytes] = []

    async def note(message: Any) -> None:
        if b"natsrt.error" in message.data:
            failures.append(message.data)

    await place.client.subscribe("_INBOX.>", cb=note)
    await asyncio.sleep(0)  # nats-py would write its PING before the SUB
    await place.client.flush()
    caller.running.registry.view._set_durable({})
    await caller.publish_message(Order(2), TopicId("orders.new", "k"))
    await caller.publish_message(Order(3), TopicId("other", "k"))
    await eventually(lambda: ("keyed", "other", 3) in place.seen)
    await eventually(lambda: place.settled("keyed"))
    assert sorted(number for _, _, number in place.seen) == [1, 2, 3]  # the second one came from the stream alone
    assert worker.health().messages_failed == 0 and not failures
    assert await place.stored() == [("topic.orders.new.k", 2)]


@dataclass
class Everything:
    """A subscription to all topics, of a class of the application."""

    agent_type: str
    id: str = "everything"

    def is_match(self, topic_id: TopicId) -> bool:
        return True

    def map_to_agent(self, topic_id: TopicId) -> AgentId:
        return AgentId(self.agent_type, topic_id.source)


async def subjects_heard(place: Place) -> list[str]:
    """The subjects of all subscriptions of the server."""
    monitor = place.server.monitor_url
    assert monitor is not None

    def read() -> Any:
        from urllib.request import urlopen

        with urlopen(f"{monitor}/connz?subs=1&limit=1000") as answer:
            return orjson.loads(answer.read())

    found = await asyncio.to_thread(read)
    return [subject for one in found["connections"] for subject in one.get("subscriptions_list", ())]


# -- what is declared ------------------------------------------------------------------------------------------------


async def test_the_stream_is_made_as_the_setting_says(place: Place) -> None:
    topics = DurableTopics("orders.", name="short", max_age=60, max_bytes=10_000_000, storage="memory")
    await place.runtime(durable=[topics, "audit.log"])
    config = (await place.js.stream_info(f"{place.stream}_short")).config
    assert (config.max_age, config.max_bytes, config.discard) == (60, 10_000_000, api.DiscardPolicy.NEW)
    assert (config.storage, config.duplicate_window) == (api.StorageType.MEMORY, 60)
    assert config.allow_msg_ttl and config.allow_direct and not config.allow_msg_schedules
    assert config.max_consumers == 10_000
    own = f"{place.namespace}.natsrt"
    assert config.subjects == [
        f"{place.namespace}.topic.orders.*.>",
        f"{own}.again.{place.stream}_short.>",
        f"{own}.later.{place.stream}_short.>",
    ]
    other = (await place.js.stream_info(place.stream)).config
    assert other.allow_msg_schedules
    assert (other.max_age, other.discard) == (30 * 86400, api.DiscardPolicy.OLD)
    assert (await place.js.stream_info(f"{place.namespace}_natsrt_dead")).config.max_age == 30 * 86400


async def test_another_runtime_adds_topics_to_a_stream_and_those_that_are_declared_stay(place: Place) -> None:
    await place.runtime(durable=["orders."])
    second = await place.runtime(durable=["audit.log"])
    for number, topic in enumerate(("orders.new", "audit.log")):
        await second.publish_message(Order(number), TopicId(topic, "a"))
    assert [number for _, number in await place.stored()] == [0, 1]
    third = await place.runtime(durable=["orders."])
    (entry,) = third.running.registry.view.durable.values()
    assert entry.patterns == ("orders.", "audit.log")


async def test_a_stream_that_does_not_listen_where_it_says_so_is_told_to_do_so_again(place: Place) -> None:
    """nats-server ends such subscriptions where several clients change the subjects of a stream at once."""
    runtime = await place.runtime(durable=["orders.", "audit."])
    await runtime.publish_message(Order(1), TopicId("orders.x", "a"))
    before = await place.js.stream_info(place.stream)
    updates: list[Any] = []

    async def update(message: Msg) -> None:
        updates.append(message)

    await place.client.subscribe(f"$JS.EVENT.ADVISORY.STREAM.UPDATED.{place.stream}", cb=update)
    streams, unheard = runtime.running.network.streams, f"{place.namespace}.topic.orders.x.a"
    assert await streams.mend(place.stream, unheard) == ""
    assert await streams.mend(place.stream, unheard) == ""  # it may pass
    await asyncio.sleep(1.1)
    assert not updates
    assert await streams.mend(place.stream, unheard) == ""
    await eventually(lambda: len(updates) == 2)
    after = await place.js.stream_info(place.stream)
    assert sorted(after.config.subjects or ()) == sorted(before.config.subjects or ())
    assert after.state.messages == 1
    await runtime.publish_message(Order(2), TopicId("orders.x", "a"))
    assert [number for _, number in await place.stored()] == [1, 2]


async def test_many_runtimes_that_start_at_once_with_different_topics_all_have_theirs(place: Place) -> None:
    patterns = [f"t{number}." for number in range(6)]
    runtimes = await asyncio.gather(*(place.runtime(durable=[pattern]) for pattern in patterns))
    for number, runtime in enumerate(runtimes):
        await runtime.publish_message(Order(number), TopicId(f"t{number}.x", "a"))
    assert [number for _, number in await place.stored()] == list(range(6))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (DurableTopics("orders.", max_age=60), r"max_age 2592000, and orders\. here with 60"),
        (DurableTopics("audit.", storage="memory"), r"storage file, and audit\. here with memory"),
        (DurableTopics("orders.new", name="other"), r"'orders\.new' \(for the stream \w+_other\) overlaps 'orders\.'"),
        (DurableTopics("orders.", name="other"), r"'orders\.' \(for the stream \w+_other\) overlaps 'orders\.'"),
        (DurableTopics("orders.new."), r"'orders\.new\.' .* overlaps 'orders\.', which is declared"),
    ],
)
async def test_a_runtime_that_disagrees_with_what_is_declared_does_not_start(
    place: Place, setting: DurableTopics, told: str
) -> None:
    await place.runtime(durable=["orders."])
    with pytest.raises(natsrt.DurableConflict, match=told) as raised:
        await place.runtime(durable=setting)
    assert raised.value.stream == place.stream
    assert isinstance(raised.value, ConfigurationError)


async def test_a_stream_that_captures_a_part_of_the_topics_is_named(place: Place) -> None:
    await place.js.add_stream(name=f"{place.namespace}_mine", subjects=[f"{place.namespace}.topic.orders.new.*"])
    with pytest.raises(
        natsrt.StreamUnavailable, match=rf"{place.stream}: the stream {place.namespace}_mine captures .*orders"
    ):
        await place.runtime(durable=["orders."])
    await place.runtime(durable=["audit.log"])  # the other was not declared


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("subjects", ["elsewhere.>"], r"subjects is \S+elsewhere\.> and must be .*--subjects="),
        (
            "max_age",
            60,
            r"max_age is 60s and must be 2592000s; .* --max-age=2592000s --dupe-window=120s`",
        ),
        ("discard", "new", r"discard is new and must be old; .*: run .* --discard=old --allow-schedules"),
        ("retention", "interest", r"retention is interest and must be limits: delete the stream"),
        ("no_ack", True, r"no_ack is true and must be false"),
        ("allow_msg_schedules", False, r"allow_msg_schedules is false and must be true: run .* --allow-schedules"),
    ],
)
async def test_a_stream_that_somebody_configured_otherwise_is_refused_with_what_corrects_it(
    place: Place, setting: str, value: Any, told: str
) -> None:
    config = events_stream(Subjects(place.namespace), Options(), DurableTopics("orders."))
    value = [f"{place.namespace}.{subject}" for subject in value] if setting == "subjects" else value
    changed = {setting: value}
    if setting == "max_age":
        changed["duplicate_window"] = 60
    if setting == "discard":
        changed["allow_msg_schedules"] = False
    await place.js.add_stream(config.evolve(**changed))
    with pytest.raises(natsrt.StreamUnavailable, match=told):
        await place.runtime(durable=["orders."])


async def test_the_registry_is_made_again_with_the_durable_topics(place: Place) -> None:
    runtime = await place.runtime(durable=["orders."])
    caller = await place.runtime()
    await place.js.delete_stream(f"KV_{place.namespace}_natsrt_registry")
    runtime.running.registry._follower.resync()
    await eventually(lambda: place.stream in caller.running.registry.view.durable and runtime.health().ready)


def test_a_server_that_is_too_old_is_named() -> None:
    require_version((2, 14), "2.14.0")
    require_version((3, 0), "3.0.0")
    with pytest.raises(natsrt.ServerTooOld, match=r"need nats-server 2\.14 or newer, and the server runs 2\.13\.9"):
        require_version((2, 13), "2.13.9")


# -- the setting -----------------------------------------------------------------------------------------------------


def test_the_setting_is_read_from_code_environment_and_file(tmp_path: Path) -> None:
    plain = (DurableTopics("audit.log", "orders."),)
    policy = DurableTopics("hot.", name="hot", max_age=90, max_bytes=None)
    assert Options(durable="audit.log, orders.").durable == plain
    assert Options(durable=["audit.log", "orders."]).durable == plain
    assert Options.load(environ={"NATSRT_DURABLE": "audit.log,orders."}).durable == plain
    toml = tmp_path / "n.toml"
    toml.write_text('durable = ["audit.log", "orders.", {patterns = "hot.", name = "hot", max_age = "1m30s"}]')
    assert Options.from_file(toml).durable == (*plain, policy)
    yaml = tmp_path / "n.yaml"
    yaml.write_text(
        "durable:\n- audit.log\n- orders.\n- patterns: [hot.]\n  name: hot\n  max_age: 90\n  max_bytes: none\n"
    )
    assert Options.from_file(yaml).durable == (*plain, policy)
    assert Options(durable=policy).durable == (policy,)
    assert Options().durable == ()
    assert len({Options(durable=policy), Options(durable=policy)}) == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("orders.*", "the pattern 'orders.*' has a wildcard; write 'orders.'"),
        ("orders.>", "has a wildcard; write 'orders.'"),
        ("ord*", "has a wildcard; write 'ord.'"),
        (">", "has a wildcard; name the topics"),
        ([""], "not an empty text"),
        ("or ders", "no topic type can start with 'or ders'"),
        (["orders.", "orders.new"], "'orders.' and 'orders.new' overlap"),
        ([DurableTopics("a.", name="x"), "a.b"], "overlap"),
        ([DurableTopics("a.", max_age=5), "b."], "have the same stream, but max_age is"),
        ([{"patterns": ["a."], "age": 5}], "there is no option 'age'; the options are patterns, name"),
        ([{"patterns": "a.", "name": "a b"}], "the name 'a b' must be letters"),
        (
            [{"patterns": "a.", "max_age": "soon"}],
            "max_age must be a number of seconds from 1 to 9,223,372,036 or none",
        ),
        ([{"patterns": "a.", "max_bytes": True}], "max_bytes must be a whole number"),
        ([{"patterns": "a.", "max_age": 1e18}], "max_age must be a number of seconds from 1 to 9,223,372,036 or none"),
        (
            [{"patterns": "a.", "max_bytes": 2**63}],
            "max_bytes must be a whole number from 1 to 9,223,372,036,854,775,807",
        ),
        (
            [{"patterns": "a.", "max_messages": 2**70}],
            "max_messages must be a whole number from 1 to 9,223,372,036,854",
        ),
        ("natsrt.", "'natsrt.' is below 'natsrt.', where natsrt's own topics are"),
        (["a", "natsrt.task.foo"], "'natsrt.task.foo' is below 'natsrt.'"),
        ("natsrt.reminder.x", "'natsrt.reminder.x' is below 'natsrt.'"),
        ("natsrt.task.", "'natsrt.task.' is below 'natsrt.'"),
        ([{"patterns": "a", "name": "tasks"}], "the name 'tasks' is that of natsrt's own topics"),
        ([{"patterns": "a", "name": "reminders"}], "the name 'reminders' is that of natsrt's own topics"),
        ([TASK_TOPICS], "'natsrt.task.' is natsrt's own"),
        (["n:", "n:.a", "n"], "'n:' and 'n:.a' overlap"),
        (["n:.a", "m", "n:.a.", "n:.a.b.c"], "'n:.a.' and 'n:.a.b.c' overlap"),
        ([{"patterns": "a.", "storage": "disk"}], "storage must be file or memory"),
        ([{"patterns": "a.", "replicas": 7}], "replicas must be a whole number from 1 to 5"),
        ([{"name": "x"}], "at least one topic type"),
        ([5], "must be a list of topic types and prefixes"),
        (5, "must be a list of topic types and prefixes"),
    ],
)
def test_what_is_wrong_with_the_setting_is_named(given: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=f"durable: .*{re.escape(told)}"):
        Options(durable=given)


def test_patterns_that_do_not_overlap_are_accepted() -> None:
    patterns = ["n", "n.", "n:", "n-", "m.n", "na.", "n-a", "natsrt", "natsrts."]
    assert Options(durable=patterns).durable[0].patterns == tuple(patterns)
    assert Options(durable=["a.", "a."]).durable[0].patterns == ("a.",)


def test_many_patterns_are_compared_in_little_time() -> None:
    """A comparison of all pairs takes ten seconds for as many."""
    begun = time.process_time()
    named = [DurableTopics(f"named.{number}.") for number in range(4_000)]
    topics = Options(durable=[*(f"topics.of.mine.{number}" for number in range(4_000)), *named]).durable[0]
    entry = DurableEntry.of("events", topics)
    check_agreement({"events": entry, "others": DurableEntry("others", ("x.",))}, DurableEntry.of("events", topics))
    assert time.process_time() - begun < 2.0
    with pytest.raises(natsrt.DurableConflict, match=re.escape("'named.7.' (for the stream n) overlaps 'named.7.'")):
        check_agreement({"events": entry}, DurableEntry("n", ("y.", "named.7.", "z.")))
    with pytest.raises(natsrt.DurableConflict, match=re.escape("'named.' (for the stream events) overlaps 'named.0.'")):
        check_agreement({"events": entry}, DurableEntry("events", ("named.",), max_age=MONTH))
    with pytest.raises(natsrt.DurableConflict, match=re.escape("'named.7.x' (for the stream n) overlaps 'named.7.'")):
        check_agreement({"events": entry}, DurableEntry("n", ("named.7.x",)))


async def test_the_greatest_numbers_are_those_that_servers_take(server: EmbeddedServer, namespace: str) -> None:
    seen: list[tuple[str, str, int]] = []
    topics = DurableTopics("work.", max_age=LONGEST, max_messages=LARGEST, discard="old")
    times: dict[str, Any] = dict.fromkeys(("ack_wait", "publish_timeout", "retry_delay", "retry_delay_max"), LONGEST)
    settings = times | {"result_ttl": MOST, "blob_ttl": MOST, "heartbeat_ttl": MOST, "max_deliver": LARGEST}
    async with NatsAgentRuntime(server.url, namespace=namespace, durable=[topics], **settings) as runtime:
        await natsrt.register(runtime, Reader, "reads", lambda: Reader(seen))
        await runtime.add_subscription(TypeSubscription("work.a", "reads"))
        await runtime.publish_message(Order(1), TopicId("work.a", "s"))
        await eventually(lambda: seen == [("reads", "work.a", 1)])


def test_no_name_is_without_a_subject() -> None:
    with pytest.raises(ConfigurationError, match="durable: the subject"):
        events_stream(Subjects(""), Options(), DurableTopics("a." * 600))
