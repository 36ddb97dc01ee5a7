"""A consumer is pulled as long as it runs: nothing is lost, and nothing piles up."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import nats
import orjson
import pytest
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotDecode, NatsrtError, PermissionDenied, StreamUnavailable
from natsrt.jetstream import pulling
from natsrt.jetstream.consumers import ConsumerConfig
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.pulling import Pull, Room
from natsrt.options import Options
from natsrt.transport.connection import Connection
from tests.support.processes import Processes, eventually, start_tap
from tests.test_server_errors import Configured, configured

__all__ = ["configured"]

HEARTBEAT = 0.3
"""Seconds between two heartbeats in tests that wait for missing ones."""


class Scene:
    """A stream with a publisher, and connections that pull from it."""

    def __init__(self, server: EmbeddedServer, name: str, js: JetStreamContext, stack: AsyncExitStack) -> None:
        self.server, self.name, self.js = server, name, js
        self._stack = stack
        self.user = ""
        """Who pulls, as in a URL."""
        self.got: list[Delivery] = []

    @property
    def sequences(self) -> list[int]:
        return [delivery.sequence for delivery in self.got]

    async def make_stream(self, **settings: Any) -> None:
        await self.js.add_stream(name=self.name, subjects=[f"{self.name}.>"], **settings)

    async def publish(self, count: int, subject: str = "a", size: int = 10) -> None:
        """Publish messages, and wait until the stream has stored all."""
        subject, payload = f"{self.name}.{subject}", b"x" * size
        for at in range(0, count, 1_000):
            for stored in [await self.js.publish_async(subject, payload) for _ in range(min(1_000, count - at))]:
                await stored

    async def pull(
        self, on_message: Callable[[Pull, Delivery], None] | None = None, *, ack: bool = True, **settings: Any
    ) -> Pull:
        """A pull that has started, with a connection of its own. It acknowledges what comes; not so with ``on_message``
        or without ``ack``."""

        def receive(delivery: Delivery) -> None:
            self.got.append(delivery)
            if on_message is not None:
                on_message(pull, delivery)
            elif ack:
                pull.ack(delivery)

        connection = await self.connect()
        config = settings.pop("config", None) or ConsumerConfig(name="c", filter_subjects=(f"{self.name}.>",))
        settings.setdefault("heartbeat", HEARTBEAT)
        settings.setdefault("expires", 5.0)
        extra = settings.pop("extra", {})
        pull = Pull(connection, Domain(None), self.name, config, receive, inbox_prefix="_INBOX", **settings)
        pull.extra = dict(extra)
        await pull.start()
        self._stack.push_async_callback(pull.stop)
        return pull

    async def connect(self) -> Connection:
        options = Options(servers=[as_user(self.server, self.user)])
        connection = Connection(options, client_name="test")
        await connection.open()
        self._stack.push_async_callback(connection.close)
        return connection

    async def has(self, sequences: range, timeout: float = 10.0) -> None:
        """Wait until all of these have come."""
        wanted = set(sequences)
        await eventually(lambda: wanted <= set(self.sequences), timeout, f"{len(wanted)} messages")

    async def is_settled(self) -> None:
        """Wait until the consumer waits for no acknowledgement, and has delivered everything."""

        async def settled() -> bool:
            info = await self.js.consumer_info(self.name, "c")
            return info.num_ack_pending == 0 and info.num_pending == 0

        await eventually(settled)


def as_user(server: EmbeddedServer, user: str) -> str:
    return server.url.replace("://", f"://{user}")


@asynccontextmanager
async def scene_of(server: EmbeddedServer, name: str, user: str = "") -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        client = await nats.connect(as_user(server, user), max_reconnect_attempts=-1, reconnect_time_wait=0.1)
        stack.push_async_callback(client.close)
        scene = Scene(server, name, client.jetstream(timeout=10), stack)
        await scene.make_stream()
        yield scene


@pytest.fixture
async def scene(server: EmbeddedServer, namespace: str) -> AsyncIterator[Scene]:
    async with scene_of(server, namespace) as scene:
        yield scene
        await scene.js.delete_stream(namespace)


@pytest.fixture
async def own_scene(own_server: EmbeddedServer, namespace: str) -> AsyncIterator[Scene]:
    async with scene_of(own_server, namespace) as scene:
        yield scene


# -- a delivery ----------------------------------------------------------------------------------------------------


def message(reply: str) -> Msg:
    return Msg(None, "s.a", reply, b"data", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "reply",
    [
        "$JS.ACK.S.c.2.7.9.1795831642683346049.5",
        "$JS.ACK.hub.HASH.S.c.2.7.9.1795831642683346049.5",
        "$JS.ACK._.HASH.S.c.2.7.9.1795831642683346049.5.random",
    ],
)
def test_a_delivery_is_read_from_its_reply_subject(reply: str) -> None:
    delivery = Delivery(message(reply))
    assert (delivery.stream, delivery.consumer, delivery.attempt, delivery.sequence) == ("S", "c", 2, 7)
    assert delivery.stored_at == pytest.approx(1795831642.683346)
    assert delivery.pending == 5
    assert delivery.consumer_sequence == 9
    assert delivery.message.data == b"data"


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "_INBOX.a",
        "$JS.ACK.S.c.2.7.9.1.5.6",
        "$JS.ACK.S.c.two.7.9.1.5",
        "$JS.API.S.c.2.7.9.1.5",
        "a.b.S.c.2.7.9.1.5",
        "$JS.ACK.S.c.2.7.9.1",
    ],
)
def test_what_is_no_acknowledgement_subject_is_told(reply: str) -> None:
    with pytest.raises(CannotDecode, match="acknowledges no delivery") as raised:
        Delivery(message(reply))
    assert raised.value.payload == b"data"


# -- against a server ----------------------------------------------------------------------------------------------


async def test_many_messages_come_once_and_in_order(scene: Scene) -> None:
    await scene.publish(10_000)
    await scene.pull()
    await scene.publish(10_000)
    await scene.has(range(1, 20_001), timeout=60)
    assert scene.sequences == list(range(1, 20_001))
    assert {delivery.attempt for delivery in scene.got} == {1}
    await scene.is_settled()


async def test_a_deleted_consumer_is_made_again_where_it_was(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    pull = await scene.pull()
    await scene.publish(100)
    await scene.has(range(1, 101))
    await scene.is_settled()
    await pull.reset(51)
    await scene.has(range(51, 101))
    await scene.is_settled()
    scene.got.clear()
    await scene.js.delete_consumer(scene.name, "c")
    await scene.publish(10)
    await scene.has(range(101, 111))
    assert min(scene.sequences) > 50
    assert "was deleted: it is made again from sequence" in caplog.text


async def test_beside_a_tap_a_deleted_consumer_is_made_again(scene: Scene, processes: Processes) -> None:
    await start_tap(processes, scene.server.url)
    await scene.pull()
    await scene.publish(5)
    await scene.has(range(1, 6))
    await scene.js.delete_consumer(scene.name, "c")
    await scene.publish(5)
    await scene.has(range(6, 11))


async def test_what_a_new_stream_already_has_is_not_skipped(scene: Scene) -> None:
    pull = await scene.pull()
    await scene.publish(20)
    await scene.has(range(1, 21))
    await pull.reset("now")  # so that it knows where the consumer was
    pull.pause()
    await scene.js.delete_stream(scene.name)
    await scene.make_stream()
    await scene.publish(5)
    scene.got.clear()
    pull.go_on()
    await scene.has(range(1, 6))


async def test_a_purged_stream_is_pulled_on(scene: Scene) -> None:
    await scene.pull(ack=False)
    await scene.publish(5)
    await scene.has(range(1, 6))
    await scene.js.purge_stream(scene.name)
    await scene.publish(5)
    await scene.has(range(6, 11))


async def test_a_stream_that_is_made_again_is_pulled_from_its_beginning(scene: Scene) -> None:
    troubles: list[NatsrtError | None] = []
    pull = await scene.pull(on_trouble=troubles.append)
    await scene.publish(20)
    await scene.has(range(1, 21))
    await scene.js.delete_stream(scene.name)
    await eventually(lambda: troubles)
    assert isinstance(pull.trouble, StreamUnavailable)
    assert str(pull.trouble) == f"cannot read the stream {scene.name}: there is no such stream"
    await scene.make_stream()
    await scene.publish(5)
    scene.got.clear()
    await scene.has(range(1, 6))
    await eventually(lambda: pull.trouble is None)
    assert troubles[-1] is None


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_a_restarted_server_is_pulled_from_again(own_scene: Scene, kill: bool) -> None:
    await own_scene.pull(heartbeat=5.0, expires=30.0)
    await own_scene.publish(500)
    await own_scene.has(range(1, 501))
    await own_scene.server.restart(kill=kill)
    await eventually(lambda: own_scene.js._nc.is_connected)
    await own_scene.publish(500)
    await own_scene.has(range(1, 1001))


async def test_after_a_frozen_server_goes_on_everything_comes(own_scene: Scene) -> None:
    pull = await own_scene.pull(ack=False)
    await own_scene.publish(5)
    await own_scene.has(range(1, 6))
    own_scene.server.pause()
    await eventually(lambda: pull.trouble, timeout=15)
    assert "JetStream does not answer" in str(pull.trouble) or "connection is lost" in str(pull.trouble)
    own_scene.server.resume()
    await own_scene.publish(5)
    await own_scene.has(range(6, 11), timeout=20)
    await eventually(lambda: pull.trouble is None)


async def test_at_a_frozen_server_a_pull_stops_in_bounded_time(own_scene: Scene) -> None:
    pull = await own_scene.pull()
    own_scene.server.pause()
    try:
        async with asyncio.timeout(20):  # it takes 2 s
            await pull.stop()
    finally:
        own_scene.server.resume()


async def test_a_stop_does_not_wait_for_ever_for_what_was_sent(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "_END_WITHIN", 0.1)
    pull = await scene.pull()
    await eventually(lambda: pull._plan.outstanding)
    never = asyncio.Event()
    monkeypatch.setattr(pull._connection, "unsubscribe", lambda interest: never.wait())
    async with asyncio.timeout(10):
        await pull.stop()


async def test_after_a_stop_nothing_comes(scene: Scene) -> None:
    pull = await scene.pull()
    await scene.publish(2_000)
    await pull.stop()
    have = len(scene.got)
    await scene.publish(100)
    await scene.pull(config=ConsumerConfig(name="other"))
    await eventually(lambda: len(scene.got) >= have + 2_100)
    assert {delivery.consumer for delivery in scene.got[have:]} == {"other"}
    await pull.stop()


async def test_a_paused_pull_goes_on_where_it_was(scene: Scene) -> None:
    pull = await scene.pull()
    await scene.publish(1_000)
    pull.pause()
    have = len(scene.got)
    await scene.publish(100, "b")
    assert len(scene.got) == have
    pull.go_on()
    await scene.has(range(1, 1_101))
    assert len(scene.got) == len(set(scene.sequences))


async def test_what_a_pause_kept_is_given_back_by_a_stop(scene: Scene) -> None:
    pull = await scene.pull()
    await eventually(lambda: pull._plan.outstanding)
    pull.pause()
    await scene.publish(5)
    await eventually(lambda: len(pull._late) == 5)
    settled = await scene.js._nc.subscribe(f"$JS.ACK.{scene.name}.c.>")
    await scene.js._nc.flush()
    await pull.stop()
    assert not scene.got
    assert [(await settled.next_msg(5)).data for _ in range(5)] == [b'-NAK {"delay": 1}'] * 5


async def test_what_an_old_generation_brings_is_passed_on_until_a_stop(scene: Scene) -> None:
    pull = await scene.pull(ack=False)
    await eventually(lambda: pull._plan.outstanding)
    old = pull._generation
    late = message(f"$JS.ACK.{scene.name}.c.1.7.7.1795831642683346049.0")
    pull.connection_made()  # as after a reconnect
    await eventually(lambda: pull._generation is not old and pull._plan.outstanding)
    outstanding = pull._plan.outstanding
    pull._take(old, late)
    assert scene.sequences == [7]
    assert pull._plan.outstanding == outstanding
    await pull.stop()
    pull._take(old, late)
    assert scene.sequences == [7]


async def test_a_wrong_pin_is_dropped(scene: Scene) -> None:
    more = {"priority_groups": ["g"], "priority_policy": "pinned_client", "priority_timeout": 60_000_000_000}
    pull = await scene.pull(config=ConsumerConfig(name="c", more=more), extra={"group": "g", "id": "nobody"})
    await scene.publish(3)
    await scene.has(range(1, 4))
    assert pull.extra == {"group": "g"}


async def test_what_is_not_acknowledged_in_time_comes_again(scene: Scene) -> None:
    config = ConsumerConfig(name="c", ack_wait=0.5)

    def third(pull: Pull, delivery: Delivery) -> None:
        if delivery.attempt == 3:
            pull.ack(delivery)

    await scene.pull(third, config=config)
    before = time.time()
    await scene.publish(2)
    await eventually(lambda: len(scene.got) == 6)
    assert Counter((d.sequence, d.attempt) for d in scene.got) == Counter((s, a) for s in (1, 2) for a in (1, 2, 3))
    await scene.is_settled()
    assert before - 1 < scene.got[0].stored_at < time.time() + 1


async def test_what_is_worked_on_does_not_come_again(scene: Scene) -> None:
    pull = await scene.pull(ack=False, config=ConsumerConfig(name="c", ack_wait=1.0))
    await scene.publish(2)
    await scene.has(range(1, 3))
    kept, left = scene.got
    until = asyncio.get_running_loop().time() + 20

    async def again() -> bool:
        pull.working([kept])
        return left.sequence in scene.sequences[2:] and asyncio.get_running_loop().time() < until

    await eventually(again, timeout=20)
    await eventually(again, timeout=20)
    assert kept.sequence not in scene.sequences[2:]


async def test_a_retry_comes_after_its_delay(scene: Scene) -> None:
    def later(pull: Pull, delivery: Delivery) -> None:
        if delivery.sequence <= 2 and delivery.attempt == 1:
            pull.retry(delivery, 0.3 if delivery.sequence == 1 else 3600)
        else:
            pull.ack(delivery)

    await scene.pull(later)
    await scene.publish(10)
    await eventually(lambda: scene.sequences.count(1) == 2)
    assert [delivery.attempt for delivery in scene.got if delivery.sequence == 1] == [1, 2]
    await scene.publish(1)
    await scene.has(range(11, 12))
    assert scene.sequences.count(2) == 1


async def test_a_terminated_message_does_not_come_again(scene: Scene) -> None:
    advisories = await scene.js._nc.subscribe(f"$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{scene.name}.c")
    await scene.js._nc.flush()
    await scene.pull(lambda pull, delivery: pull.terminate(delivery, "no\r\nuse"), config=ConsumerConfig(name="c"))
    await scene.publish(1)
    await scene.has(range(1, 2))
    assert b'"reason":"no use"' in (await advisories.next_msg(5)).data
    await scene.is_settled()
    assert scene.sequences == [1]


async def test_a_slow_receiver_gets_no_more_than_it_has_room_for(scene: Scene) -> None:
    held: list[Delivery] = []
    most = 0

    def hold(pull: Pull, delivery: Delivery) -> None:
        nonlocal most
        held.append(delivery)
        most = max(most, len(held))

    await scene.publish(200, size=1_000)
    await scene.publish(1, "large", size=50_000)  # more than it ever has room for at once
    await scene.publish(100, size=1_000)
    limit = 20_000
    pull = await scene.pull(hold, max_bytes=4_000, room=lambda: Room(256, limit - 1_000 * len(held)))
    while len(scene.got) < 301:
        await eventually(lambda: len(held) >= 18 or len(scene.got) == 301)
        for delivery in held[:10]:
            held.remove(delivery)
            pull.ack(delivery)
    assert most <= 32  # the limit, and at most three pulls that were sent before it was reached
    assert scene.sequences == list(range(1, 302))


async def test_a_receiver_without_room_does_not_hold_up_others(scene: Scene) -> None:
    full = await scene.pull(room=lambda: Room(0, 0))
    await scene.publish(100)
    await scene.pull(config=ConsumerConfig(name="other"))
    await scene.has(range(1, 101))
    assert {delivery.consumer for delivery in scene.got} == {"other"}
    assert full.trouble is None


async def test_a_receiver_may_take_few_messages_at_once(scene: Scene) -> None:
    held: list[Delivery] = []
    await scene.publish(20)
    pull = await scene.pull(
        lambda pull, delivery: held.append(delivery),
        room=lambda: Room(3 - len(held), 1 << 20),
        heartbeat=15.0,  # an acknowledgement, not the next heartbeat, has the room asked for
        expires=30.0,
    )
    for _ in range(20):
        await eventually(lambda: held)
        assert len(held) <= 3
        pull.ack(held.pop(0))
    assert scene.sequences == list(range(1, 21))


@pytest.mark.parametrize("start", ["all", "now", 4, 1_000, "time", "future", "2300", "1", "1, UTC"])
async def test_a_new_consumer_starts_where_it_is_to(scene: Scene, start: Any) -> None:
    await scene.publish(5)
    await asyncio.to_thread(time.sleep, 0.01)  # so that no two messages have the same time
    between = datetime.datetime.now(datetime.UTC)
    await scene.publish(5)
    expected = {"all": 1, "now": 11, 4: 4, 1_000: 11, "time": 6, "future": 11, "2300": 11, "1": 1, "1, UTC": 1}[start]
    named = {
        "time": between,
        "future": between + datetime.timedelta(days=1),
        "2300": datetime.datetime(2300, 1, 1),  # servers cannot count so far
        "1": datetime.datetime.min,
        "1, UTC": datetime.datetime.min.replace(tzinfo=datetime.UTC),
    }
    pull = await scene.pull(start=named.get(start, start))
    await scene.publish(1)
    await scene.has(range(expected, 12))
    assert scene.sequences == list(range(expected, 12))
    scene.got.clear()
    await pull.reset(2)  # also before its start
    await scene.has(range(2, 12))
    assert scene.got[0].attempt == 1


async def test_nothing_from_before_a_reset_comes_after_it(scene: Scene, processes: Processes) -> None:
    """Also beside a tap, where the pulls that are open at the reset go on bringing messages."""
    await start_tap(processes, scene.server.url)
    pull = await scene.pull()
    await scene.publish(3_000)
    await scene.has(range(1, 1_001))
    for first in (500, 200, 900):
        scene.got.clear()
        await pull.reset(first)
        await scene.has(range(first, first + 300))
        assert scene.sequences == list(range(first, first + len(scene.got)))
    await scene.has(range(900, 3_001))
    assert scene.sequences == list(range(900, 3_001))


@pytest.mark.parametrize("start", ["now", 7])
async def test_a_consumer_is_reset(scene: Scene, start: Any) -> None:
    await scene.publish(10)
    pull = await scene.pull()
    await scene.has(range(1, 11))
    pull.pause()
    scene.got.clear()
    await pull.reset(start)
    await scene.publish(1)
    assert not scene.got
    pull.go_on()
    await scene.has(range(7 if start == 7 else 11, 12))
    assert scene.sequences == list(range(7 if start == 7 else 11, 12))


async def test_two_that_make_the_same_consumer_share_it(scene: Scene) -> None:
    await scene.publish(10)
    await asyncio.gather(scene.pull(start=6), scene.pull(start=9))
    await scene.publish(2_000)
    await scene.has(range(9, 2_011))
    await scene.is_settled()
    assert min(scene.sequences) in (6, 9)


async def test_a_consumer_whose_maker_died_is_finished(scene: Scene) -> None:
    await scene.publish(10)
    config = {
        "durable_name": "c",
        "ack_policy": "explicit",
        "pause_until": "2200-01-01T00:00:00Z",
        "metadata": {"natsrt_start": "5"},
    }
    request = orjson.dumps({"stream_name": scene.name, "config": config, "action": "create"})
    await scene.js._nc.request(f"$JS.API.CONSUMER.CREATE.{scene.name}.c", request)
    await scene.pull(start=8, config=ConsumerConfig(name="c"))
    await scene.has(range(5, 11))
    assert scene.sequences == list(range(5, 11))


async def test_a_consumer_that_an_operator_paused_stays_paused(scene: Scene) -> None:
    await scene.publish(3)
    config = ConsumerConfig(name="c")
    await (await scene.pull(config=config)).stop()
    scene.got.clear()
    pause = orjson.dumps({"pause_until": "2199-01-01T00:00:00Z"})
    await scene.js._nc.request(f"$JS.API.CONSUMER.PAUSE.{scene.name}.c", pause)
    await scene.publish(3)
    pull = await scene.pull(config=config)
    await eventually(lambda: pull._plan.outstanding and pull._plan.brought)  # a heartbeat, and no message before it
    assert not scene.got


async def test_a_filter_that_is_added_brings_what_is_stored_later(scene: Scene) -> None:
    a, both = (f"{scene.name}.a",), (f"{scene.name}.a", f"{scene.name}.b")
    pull = await scene.pull(config=ConsumerConfig(name="c", filter_subjects=a))
    await scene.publish(3, "b")
    await scene.publish(3, "a")
    await scene.has(range(4, 7))
    await pull.configure(ConsumerConfig(name="c", filter_subjects=both, description="for a and b"))
    await scene.publish(3, "b")
    await scene.has(range(7, 10))
    assert scene.sequences == list(range(4, 10))
    info = await scene.js.consumer_info(scene.name, "c")
    assert (info.config.filter_subjects, info.config.description) == (list(both), "for a and b")
    await pull.reset("all")
    await scene.has(range(1, 10))


async def test_without_a_stream_a_start_fails(scene: Scene) -> None:
    connection = await scene.connect()
    pull = Pull(connection, Domain(None), "nowhere", ConsumerConfig(name="c"), scene.got.append, inbox_prefix="_INBOX")
    with pytest.raises(StreamUnavailable, match="cannot read the stream nowhere: there is no such stream"):
        async with asyncio.timeout(30):  # it fails at once
            await pull.start(within=3600)
    await pull.stop()


async def test_a_consumer_that_cannot_be_changed_is_told(scene: Scene) -> None:
    await scene.js.add_consumer(scene.name, durable_name="c", ack_policy="explicit", deliver_policy="new")
    with pytest.raises(StreamUnavailable, match="cannot write to .* deliver policy can not be updated"):
        await scene.pull(config=ConsumerConfig(name="c"))


async def test_an_acknowledgement_after_a_stop_or_too_late_harms_nothing(scene: Scene) -> None:
    pull = await scene.pull(ack=False, config=ConsumerConfig(name="c", ack_wait=0.3))
    await scene.publish(1)
    await eventually(lambda: len(scene.got) == 2)
    await pull.stop()
    pull.ack(scene.got[0])  # of the first attempt
    pull.ack(scene.got[1])
    await scene.is_settled()


@pytest.mark.parametrize("denied", ["$JS.API.CONSUMER.INFO.>", "$JS.API.CONSUMER.CREATE.>", "$JS.API.STREAM.INFO.>"])
async def test_a_extraout_permission_is_told(configured: Configured, namespace: str, denied: str) -> None:
    await configured.start(two_users(denied))
    async with scene_of(configured.server, namespace, "admin:secret@") as scene:
        scene.user = "app:secret@"
        with pytest.raises(PermissionDenied, match=re.escape(denied.removesuffix(">"))):
            await scene.pull()


@pytest.mark.parametrize("denied", ["$JS.API.CONSUMER.MSG.NEXT.>", "$JS.ACK.>"])
async def test_a_missing_permission_is_told_until_it_is_given(
    configured: Configured, namespace: str, denied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "_AGAIN_REFUSED", 0.5)
    await configured.start(two_users(denied))
    async with scene_of(configured.server, namespace, "admin:secret@") as scene:
        scene.user = "app:secret@"
        pull = await scene.pull()
        await scene.publish(3)
        await eventually(lambda: isinstance(pull.trouble, PermissionDenied))
        assert denied.removesuffix(">") in str(pull.trouble)
        await configured.reload(two_users("nothing"))
        await scene.has(range(1, 4), timeout=20)
        await eventually(lambda: pull.trouble is None)


def two_users(denied: str) -> str:
    everything = 'user: "admin", password: "secret"'
    restricted = f'user: "app", password: "secret", permissions: {{ publish: {{ deny: ["{denied}"] }} }}'
    return f"authorization {{ users: [ {{ {everything} }}, {{ {restricted} }} ] }}"


async def test_a_pull_whose_bytes_are_used_up_exactly_is_followed_by_the_next(scene: Scene) -> None:
    """The server ends such a pull without a status. Of 150 successive sizes, one is a multiple of a message's."""
    await scene.make_stream()
    await scene.publish(1_500)
    sizes = itertools.cycle(range(400, 550))
    await scene.pull(room=lambda: Room(100, next(sizes)), heartbeat=5.0, expires=30.0)
    await scene.has(range(1, 1_501), 8.0)
    assert scene.sequences == list(range(1, 1_501))
