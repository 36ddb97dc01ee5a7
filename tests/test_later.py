"""Events that are published later, and reminders."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, event, rpc
from nats.js import JetStreamContext

import natsrt
from natsrt import DurableTopics, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotSchedule
from natsrt.reminder_types import reminder_of, reminder_topic
from natsrt.wire.schedules import Schedule, due_time, of_reminder, once
from natsrt.wire.subjects import Subjects
from natsrt.wire.times import FIRST, LAST, known, known_delay, known_seconds
from tests.support.cli import natsrt as command
from tests.support.processes import eventually

SOON = 0.3
LONG = 3600.0
TOPIC = TopicId("orders.new", "default")
AGENT = AgentId("clerk", "ada")


@dataclass
class Order:
    number: int


@dataclass
class Handled:
    """One call of a handler."""

    number: int
    key: str
    topic: TopicId | None
    sender: AgentId | None
    message_id: str
    attempt: int
    at: datetime


@dataclass
class Seen:
    handled: list[Handled] = field(default_factory=list)
    fails: int = 0
    """How often the handler is still to raise."""

    @property
    def numbers(self) -> Counter[int]:
        return Counter(one.number for one in self.handled)


class Clerk(RoutedAgent):
    def __init__(self, seen: Seen) -> None:
        super().__init__("notes orders")
        self._seen = seen

    @event
    async def on_order(self, message: Order, ctx: MessageContext) -> None:
        delivery = natsrt.current_delivery()
        assert delivery is not None
        one = Handled(
            message.number, self.id.key, ctx.topic_id, ctx.sender, ctx.message_id, delivery.attempt, datetime.now(UTC)
        )
        self._seen.handled.append(one)
        if self._seen.fails:
            self._seen.fails -= 1
            raise ValueError("not now")


class Planner(RoutedAgent):
    """Sets a reminder for itself with each order that it is called with, and notes those that it is reminded of."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__("plans")
        self._seen = seen

    @rpc
    async def plan(self, message: Order, ctx: MessageContext) -> int:
        at = datetime.now(UTC)
        await natsrt.runtime_of(self).remind(self.id, f"order-{message.number}", message, at=at)
        return message.number

    @event
    async def remember(self, message: Order, ctx: MessageContext) -> None:
        self._seen.append(message.number)


class Place:
    """Makes runtimes of one namespace that end with the test."""

    def __init__(self, server: EmbeddedServer, namespace: str, stack: AsyncExitStack, js: JetStreamContext) -> None:
        self.server, self.namespace, self._stack, self.js = server, namespace, stack, js
        self.seen = Seen()
        self.events = f"{namespace}_natsrt_events"
        self.reminders = f"{namespace}_natsrt_events_reminders"

    async def runtime(self, **settings: Any) -> NatsAgentRuntime:
        return await self._stack.enter_async_context(self.make(**settings))

    def make(self, **settings: Any) -> NatsAgentRuntime:
        return NatsAgentRuntime(self.server.url, namespace=self.namespace, retry_delay=0.05, **settings)

    async def clerk(self, *, subscribed: bool = True, **settings: Any) -> NatsAgentRuntime:
        """A worker with the agent type ``clerk``, which is subscribed to `TOPIC`."""
        runtime = self.make(**settings)
        await runtime.register_factory("clerk", lambda: Clerk(self.seen), expected_class=Clerk)
        if subscribed:
            await runtime.add_subscription(TypeSubscription(TOPIC.type, "clerk"))
        return await self._stack.enter_async_context(runtime)

    async def kept(self, stream: str | None = None) -> int:
        """The number of messages that a stream publishes later."""
        info = await self.js.stream_info(stream or self.events, subjects_filter=f"{self.namespace}.natsrt.later.>")
        return len(info.state.subjects or {})

    async def stored(self) -> int:
        """The number of events on the topic."""
        info = await self.js.stream_info(self.events, subjects_filter=f"{self.namespace}.topic.>")
        return sum((info.state.subjects or {}).values())


async def _place(server: EmbeddedServer, namespace: str, stack: AsyncExitStack) -> Place:
    client = await nats.connect(server.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
    stack.push_async_callback(client.close)
    return Place(server, namespace, stack, client.jetstream())


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield await _place(server, namespace, stack)


@pytest.fixture
async def own_place(own_server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    """A place on a server of the test's own."""
    async with AsyncExitStack() as stack:
        yield await _place(own_server, namespace, stack)


# -- delayed events ----------------------------------------------------------------------------------------------------


async def test_a_delayed_event_is_handled_once_and_not_before_its_time(place: Place) -> None:
    runtime = await place.clerk(durable=["orders."])
    due = datetime.now(UTC) + timedelta(seconds=SOON)
    await runtime.publish_message(Order(1), TOPIC, sender=AgentId("shop", "x"), message_id="m1", delay=SOON)
    await runtime.publish_message(Order(2), TOPIC, at=due.astimezone(timezone(timedelta(hours=5))))
    assert await place.stored() == 0 and await place.kept() == 2
    await eventually(lambda: len(place.seen.handled) == 2)
    assert place.seen.numbers == {1: 1, 2: 1}
    assert all(one.at >= due for one in place.seen.handled)
    first = next(one for one in place.seen.handled if one.number == 1)
    assert (first.message_id, first.sender, first.topic) == ("m1", AgentId("shop", "x"), TOPIC)
    assert await place.kept() == 0


async def test_an_event_whose_time_has_passed_is_published_at_once(place: Place) -> None:
    runtime = await place.runtime(durable=["orders."])
    await runtime.publish_message(Order(1), TOPIC, at=datetime.now(UTC) - timedelta(days=1))
    await runtime.publish_message(Order(2), TOPIC, delay=0)
    assert (await place.stored(), await place.kept()) == (2, 0)


@pytest.mark.parametrize("later", [{"delay": LONG}, {"at": datetime.now(UTC)}, {}], ids=lambda later: "".join(later))
async def test_before_the_start_nobody_is_told_that_an_event_is_stored(place: Place, later: dict[str, Any]) -> None:
    runtime = place.make(durable=["orders."])
    with pytest.raises(RuntimeError, match=r"orders.*Call start\(\) first"):
        await runtime.publish_message(Order(1), TOPIC, **later)
    await runtime.publish_message(Order(2), TopicId("core", "x"))  # as in AutoGen, it waits
    async with runtime:
        await runtime.publish_message(Order(3), TOPIC, **later)
        assert (await place.stored(), await place.kept()) == ((0, 1) if "delay" in later else (1, 0))


async def test_a_delayed_event_with_the_same_id_is_one_event_while_it_waits_and_after(place: Place) -> None:
    runtime = await place.clerk(durable=["orders."])
    for number in (1, 2):
        await runtime.publish_message(Order(number), TOPIC, message_id="m1", delay=SOON)
    other = await place.runtime()
    await other.publish_message(Order(3), TOPIC, message_id="m1", delay=LONG)
    await eventually(lambda: place.seen.handled)
    await other.publish_message(Order(4), TOPIC, message_id="m1", delay=SOON)
    await other.publish_message(Order(5), TOPIC, message_id="m1")
    assert (await place.stored(), await place.kept()) == (1, 0)
    assert place.seen.numbers == {1: 1}


async def test_a_delayed_event_stays_one_event_when_the_stream_has_forgotten_its_id(place: Place) -> None:
    runtime = await place.runtime(durable=["orders."])
    await runtime.publish_message(Order(1), TOPIC, message_id="m1", delay=LONG)
    info = await place.js.stream_info(place.events)
    await place.js.update_stream(info.config.evolve(duplicate_window=0.1))
    subject = f"{place.namespace}.natsrt.later.{place.events}.event.m1.orders.new.default"

    async def forgotten() -> bool:
        """Whether an id that was stored before is new to the stream."""
        await place.js.publish(f"{place.namespace}.topic.orders.other.x", b"", headers={"Nats-Msg-Id": "probe"})
        return (await place.js.stream_info(place.events)).state.messages >= 3

    await eventually(forgotten)
    before = await place.js.get_last_msg(place.events, subject, direct=True)
    await runtime.publish_message(Order(2), TOPIC, message_id="m1", delay=LONG / 2)
    after = await place.js.get_last_msg(place.events, subject, direct=True)
    assert after.seq == before.seq and await place.kept() == 1


async def test_ids_and_topics_of_all_characters_have_schedules_of_their_own(place: Place) -> None:
    runtime = await place.runtime(durable=["orders."])
    ids = ("m.1", "m 1", "é\r\n*>", "x" * 300)
    topics = (TOPIC, TopicId("orders.new", "a.b *"), TopicId("orders.new", "k" * 300))
    for message_id in ids:
        for topic in topics:
            await runtime.publish_message(Order(1), topic, message_id=message_id, delay=LONG)
    assert await place.kept() == len(ids) * len(topics)
    for message_id in ids:
        for topic in topics:
            assert await runtime.cancel_delayed(message_id, topic)
    assert await place.kept() == 0


async def test_a_cancelled_event_is_not_published_and_stays_cancelled(place: Place) -> None:
    runtime = await place.runtime(durable=["orders."])
    canceller = await place.runtime()
    await runtime.publish_message(Order(1), TOPIC, message_id="m1", delay=LONG)
    await runtime.publish_message(Order(2), TOPIC, message_id="m2", delay=LONG)
    assert await canceller.cancel_delayed("m1", TOPIC)
    assert not await canceller.cancel_delayed("m1", TOPIC)
    assert not await canceller.cancel_delayed("m3", TOPIC)
    await runtime.publish_message(Order(1), TOPIC, message_id="m1", delay=SOON)
    assert (await place.stored(), await place.kept()) == (0, 1)


async def test_a_cancelled_event_is_not_published_when_its_time_comes(place: Place) -> None:
    runtime = await place.clerk(durable=["orders."])
    due = datetime.now(UTC) + timedelta(seconds=2 * SOON)
    await runtime.publish_message(Order(1), TOPIC, message_id="m1", at=due)
    await runtime.publish_message(Order(2), TOPIC, message_id="m2", at=due + timedelta(seconds=SOON))
    assert await runtime.cancel_delayed("m1", TOPIC)
    await eventually(lambda: place.seen.handled)
    assert place.seen.numbers == {2: 1}


async def test_delayed_events_survive_a_killed_server_and_fire_at_its_start_if_they_are_overdue(
    own_place: Place,
) -> None:
    place = own_place
    runtime = await place.clerk(durable=["orders."])
    for number in range(20):
        await runtime.publish_message(Order(number), TOPIC, delay=SOON)
    await runtime.publish_message(Order(99), TOPIC, delay=LONG)
    await place.server.restart(kill=True, downtime=2 * SOON)
    await eventually(lambda: len(place.seen.numbers) == 20, timeout=20)
    await eventually(lambda: runtime.ready)
    assert place.seen.numbers.keys() == {*range(20)}
    assert await place.stored() == 20 and await place.kept() == 1


@pytest.mark.slow
async def test_ten_thousand_events_that_are_due_at_once_are_all_handled(place: Place) -> None:
    """Slow because of their number."""
    runtime = await place.clerk(durable=["orders."])
    due = datetime.now(UTC) + timedelta(seconds=20)
    await asyncio.gather(*(runtime.publish_message(Order(n), TOPIC, at=due) for n in range(10_000)))
    await eventually(lambda: len(place.seen.numbers) == 10_000, timeout=120)
    assert set(place.seen.numbers.values()) == {1}


async def test_a_topic_that_is_not_durable_has_no_delayed_events(place: Place) -> None:
    runtime = await place.runtime()
    topic = TopicId("news", "a")
    await runtime.publish_message(Order(1), topic)
    for when in ({"delay": 1}, {"delay": 0}, {"at": datetime.now(UTC) + timedelta(1)}):
        with pytest.raises(
            CannotSchedule, match=r"an event on news/a .* name 'news', or a prefix of it, in the setting"
        ):
            await runtime.publish_message(Order(1), topic, **when)
    with pytest.raises(CannotSchedule, match="not durable"):
        await runtime.cancel_delayed("m1", topic)


async def test_a_stream_that_discards_new_events_has_no_delayed_ones(place: Place) -> None:
    runtime = await place.runtime(durable=DurableTopics("orders.", max_messages=10))
    with pytest.raises(CannotSchedule, match=f"a stream with discard new, as {place.events} has"):
        await runtime.publish_message(Order(1), TOPIC, delay=1)
    await runtime.publish_message(Order(1), TOPIC)


async def test_a_stream_without_schedules_is_an_error_that_says_how_to_switch_them_on(place: Place) -> None:
    await place.runtime(durable=["orders."])
    publisher = await place.runtime()
    config = (await place.js.stream_info(place.events)).config
    await place.js.delete_stream(place.events)
    await place.js.add_stream(config.evolve(allow_msg_schedules=False))
    with pytest.raises(CannotSchedule, match=rf"nats stream edit {place.events} --allow-schedules"):
        await publisher.publish_message(Order(1), TOPIC, delay=1)


async def test_a_server_that_is_too_old_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = await place.runtime(durable=["orders."])
    monkeypatch.setattr("natsrt.jetstream.streams.NEEDED_VERSION", (99, 0))
    with pytest.raises(
        natsrt.ServerTooOld, match=r"delayed events need nats-server 99\.0 or newer, and the server runs"
    ):
        await runtime.publish_message(Order(1), TOPIC, delay=1)
    with pytest.raises(natsrt.ServerTooOld, match="reminders need nats-server 99"):
        await runtime.remind(AGENT, "daily", Order(1), every=1)
    await runtime.publish_message(Order(1), TOPIC)


@pytest.mark.parametrize(
    ("when", "problem"),
    [
        ({"delay": 1, "at": datetime.now(UTC)}, "not both"),
        ({"delay": -1}, "at least 0, not -1"),
        ({"delay": float("nan")}, "at least 0, not nan"),
        ({"delay": True}, "a number of seconds"),
        (
            {"delay": 1e10},
            "delay must end by 2262-04-11T00:00:00Z, the last time that servers know, and 10000000000.0 s",
        ),
        ({"delay": 1e300}, "delay must end by 2262-04-11T00:00:00Z"),
        (
            {"at": LAST + timedelta(seconds=1)},
            "at must be 2262-04-11T00:00:00Z at the latest, .* not 2262-04-11T00:00:01",
        ),
        ({"at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-9)))}, "at must be 2262-04-11T00:00:00Z"),
        ({"at": datetime(2030, 1, 1)}, "at must have a time zone, and 2030-01-01T00:00:00 has none"),
        ({"at": "2030-01-01"}, "at must be a datetime"),
    ],
)
async def test_times_that_cannot_be_are_refused(when: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        due_time(when.get("delay"), when.get("at"))
    with pytest.raises(ValueError, match=problem):
        await NatsAgentRuntime().publish_message(Order(1), TOPIC, **when)


async def test_the_last_time_that_servers_know_is_not_taken_for_a_past_one(place: Place) -> None:
    runtime = await place.clerk(durable=["orders."])
    await runtime.publish_message(Order(1), TOPIC, at=LAST)
    await runtime.publish_message(Order(2), TOPIC, delay=SOON)
    await runtime.remind(AGENT, "last", Order(3), at=LAST)
    await runtime.remind(AGENT, "rare", Order(4), every=LAST.timestamp() - datetime.now(UTC).timestamp() - LONG)
    await runtime.remind(AGENT, "soon", Order(5), at=datetime.now(UTC) + timedelta(seconds=SOON))
    await eventually(lambda: len(place.seen.handled) == 2)
    assert place.seen.numbers == {2: 1, 5: 1}
    assert [one.name for one in await runtime.reminders()] == ["last", "rare"]


async def test_a_reminder_from_before_the_times_of_servers_comes_at_once(place: Place) -> None:
    runtime = await place.clerk()
    await runtime.remind(AGENT, "old", Order(1), at=datetime(1600, 1, 1, tzinfo=UTC))
    await eventually(lambda: place.seen.numbers == {1: 1})


def test_times_are_cut_to_those_that_servers_know() -> None:
    late, early = timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))
    for far in (datetime.max, datetime.max.replace(tzinfo=early), datetime(2300, 1, 1, tzinfo=UTC)):
        assert known(far) == LAST
    for past in (datetime.min, datetime.min.replace(tzinfo=late), datetime(1969, 12, 31, tzinfo=UTC)):
        assert known(past) == FIRST
    within = datetime(2262, 4, 10, 23, tzinfo=early)
    assert known(within) == LAST and known(within - timedelta(days=1)) == within - timedelta(days=1)
    assert known(datetime(2030, 1, 1)) == datetime(2030, 1, 1).astimezone()
    assert [known_seconds(seconds) for seconds in (-1e300, 5.0, 1e300)] == [0.0, 5.0, LAST.timestamp()]
    assert known_delay(5.0) == 5.0 and known_delay(1e300) == pytest.approx(known_delay(8e9), abs=60.0)
    assert once(datetime.max.replace(tzinfo=UTC)).last == LAST


# -- reminders ---------------------------------------------------------------------------------------------------------


async def test_a_reminder_comes_again_and_again_as_an_event_without_a_sender(place: Place) -> None:
    runtime = await place.clerk()
    await runtime.remind(AGENT, "daily", Order(7), every=1)
    await eventually(lambda: len(place.seen.handled) >= 2, timeout=15)
    first, second = place.seen.handled[:2]
    for one in (first, second):
        assert (one.number, one.key, one.sender, one.attempt) == (7, "ada", None, 1)
        assert one.topic == TopicId("natsrt.reminder.clerk:daily", "ada")
    assert first.message_id != second.message_id
    assert await runtime.forget_reminder(AGENT, "daily")
    assert not await runtime.forget_reminder(AGENT, "daily")
    assert await runtime.reminders() == []


async def test_an_agent_sets_reminders_for_itself(place: Place) -> None:
    seen: list[int] = []
    worker = place.make()
    await worker.register_factory("planner", lambda: Planner(seen), expected_class=Planner)
    async with worker:
        caller = await place.runtime()
        for number in (1, 2):
            assert await caller.send_message(Order(number), AgentId("planner", "p"), reply_type=int) == number
        await eventually(lambda: len(seen) == 2)
    assert sorted(seen) == [1, 2]


async def test_a_reminder_is_tried_again_under_the_same_id(place: Place) -> None:
    place.seen.fails = 1
    runtime = await place.clerk()
    await runtime.remind(AGENT, "once", Order(1), at=datetime.now(UTC))
    await eventually(lambda: len(place.seen.handled) == 2)
    first, second = place.seen.handled
    assert first.message_id == second.message_id
    assert (first.attempt, second.attempt) == (1, 2)
    assert await runtime.reminders() == []


async def test_a_reminder_that_was_due_before_its_type_had_a_worker_is_handled(place: Place) -> None:
    setter = await place.runtime()
    await setter.remind(AGENT, "once", Order(1), at=datetime.now(UTC))
    stream = place.reminders

    async def fired() -> bool:
        return await place.kept(stream) == 0

    await eventually(fired)
    await place.clerk(subscribed=False)
    await eventually(lambda: place.seen.handled)
    assert place.seen.numbers == {1: 1}


async def test_a_reminder_stays_when_the_worker_that_has_set_it_leaves(place: Place) -> None:
    first = await place.clerk(name="first")
    await first.remind(AGENT, "often", Order(1), every=1)
    await eventually(lambda: place.seen.handled, timeout=15)
    await first.stop()
    before = len(place.seen.handled)
    second = await place.clerk(name="second")
    await eventually(lambda: len(place.seen.handled) > before, timeout=15)
    assert await second.forget_reminder(AGENT, "often")


async def test_a_reminder_of_the_same_name_is_replaced_and_others_are_kept(place: Place) -> None:
    runtime = await place.clerk()
    other = AgentId("clerk", "bob")
    await runtime.remind(AGENT, "r", Order(1), every=LONG)
    await runtime.remind(AGENT, "r", Order(2), cron="0 0  9 * * MON-FRI", timezone="Europe/Berlin")
    await runtime.remind(AGENT, "s", Order(3), at=datetime(2100, 1, 1, tzinfo=UTC))
    await runtime.remind(other, "r", Order(4), every=1.5)
    await runtime.remind(AgentId("guard", "a b"), "a.b:c", "plain", every=LONG)
    found = await runtime.reminders()
    assert [(str(one.agent), one.name, one.schedule, one.timezone, one.message_type) for one in found] == [
        ("clerk/ada", "r", "0 0 9 * * MON-FRI", "Europe/Berlin", "Order"),
        ("clerk/ada", "s", "@at 2100-01-01T00:00:00.000000Z", None, "Order"),
        ("clerk/bob", "r", "@every 1.5s", None, "Order"),
        ("guard/a b", "a.b:c", "@every 3600s", None, "str"),
    ]
    assert all(one.set_at.tzinfo is not None for one in found)
    assert [one.name for one in await runtime.reminders(AGENT)] == ["r", "s"]
    assert [one.agent.type for one in await runtime.reminders("guard")] == ["guard"]
    assert await (await place.runtime()).forget_reminder(other, "r")
    assert len(await runtime.reminders("clerk")) == 2


async def test_a_reminder_that_was_replaced_does_not_come(place: Place) -> None:
    runtime = await place.clerk()
    due = datetime.now(UTC) + timedelta(seconds=2 * SOON)
    await runtime.remind(AGENT, "r", Order(1), at=due)
    await runtime.remind(AGENT, "r", Order(2), at=due + timedelta(seconds=SOON))
    await eventually(lambda: place.seen.handled)
    assert place.seen.numbers == {2: 1}


async def test_a_cron_line_is_followed_and_its_errors_are_the_servers(place: Place) -> None:
    runtime = await place.clerk()
    await runtime.remind(AGENT, "each-second", Order(1), cron="* * * * * *", timezone="Asia/Tokyo")
    await eventually(lambda: place.seen.handled, timeout=15)
    with pytest.raises(CannotSchedule, match="'0 0 9 . . 8' is not a schedule that the server knows"):
        await runtime.remind(AGENT, "r", Order(1), cron="0 0 9 * * 8")
    with pytest.raises(CannotSchedule, match="'Mars/X' is not a time zone that the server knows"):
        await runtime.remind(AGENT, "r", Order(1), cron="0 0 9 * * *", timezone="Mars/X")


async def test_reminders_survive_a_killed_server(own_place: Place) -> None:
    place = own_place
    runtime = await place.clerk()
    await runtime.remind(AGENT, "once", Order(1), at=datetime.now(UTC) + timedelta(seconds=SOON))
    await runtime.remind(AGENT, "often", Order(2), every=1)
    await place.server.restart(kill=True, downtime=2 * SOON)
    await eventually(lambda: place.seen.numbers[1] and place.seen.numbers[2], timeout=20)
    assert [one.name for one in await runtime.reminders()] == ["often"]


async def test_a_keyed_agent_gets_its_reminders(place: Place) -> None:
    worker = place.make()
    await worker.register_factory("clerk", lambda: Clerk(place.seen), expected_class=Clerk, keyed=True)
    async with worker:
        await (await place.runtime()).remind(AGENT, "r", Order(1), every=1)
        await eventually(lambda: len(place.seen.handled) > 1, timeout=20)
        first, second = place.seen.handled[:2]
        assert (first.number, first.attempt) == (second.number, second.attempt) == (1, 1)
        assert first.message_id != second.message_id
        assert await worker.forget_reminder(AGENT, "r")


async def test_a_type_of_instances_gets_no_reminders(place: Place) -> None:
    worker = await place.runtime()
    await worker.register_agent_instance(Clerk(place.seen), AGENT)
    with pytest.raises(ValueError, match="registered instances only"):
        await (await place.runtime()).remind(AGENT, "r", Order(1), every=1)


async def test_the_stream_of_reminders_is_made_again_when_one_is_set(place: Place) -> None:
    runtime = await place.runtime()
    await runtime.remind(AGENT, "r", Order(1), every=LONG)
    await place.js.delete_stream(place.reminders)
    assert await runtime.reminders() == []
    assert not await runtime.forget_reminder(AGENT, "r")
    await runtime.remind(AGENT, "s", Order(1), every=LONG)
    assert [one.name for one in await runtime.reminders()] == ["s"]


async def test_a_reminder_that_fails_in_the_end_is_a_dead_letter(place: Place) -> None:
    place.seen.fails = 2
    runtime = await place.clerk(max_deliver=2)
    await runtime.remind(AGENT, "once", Order(1), at=datetime.now(UTC))
    letters = f"{place.namespace}_natsrt_dead"

    async def dead() -> int:
        return (await place.js.stream_info(letters)).state.messages

    assert await eventually(dead) == 1
    letter = await place.js.get_msg(letters, 1)
    assert letter.headers is not None
    assert letter.headers["Natsrt-Message-Id"] == place.seen.handled[0].message_id
    assert letter.headers["Natsrt-Subject"] == f"{place.namespace}.topic.natsrt.reminder.clerk=3A.once.ada"


async def test_no_reminder_was_ever_set(place: Place) -> None:
    runtime = await place.runtime()
    assert await runtime.reminders() == []
    assert not await runtime.forget_reminder(AGENT, "r")
    assert place.reminders not in runtime.running.registry.view.durable


# -- the command line --------------------------------------------------------------------------------------------------


async def test_the_command_line_publishes_later_and_says_the_id(place: Place) -> None:
    runtime = await place.clerk(durable=["orders."])
    where = ("--server", place.server.url, "--namespace", place.namespace)
    ended = await command("publish", "orders.new/default", '{"number": 5}', "--delay", "1h", *where)
    assert ended.code == 0 and "14 bytes" not in ended.stdout, ended.stderr
    assert await runtime.cancel_delayed(ended.stdout.strip(), TOPIC)
    past = await command("publish", "orders.new", '{"number": 6}', "--at", "2020-01-01T00:00:00Z", *where)
    await eventually(lambda: place.seen.handled)
    assert (place.seen.handled[0].number, place.seen.handled[0].message_id) == (6, past.stdout.strip())
    for wrong in (("--delay", "x"), ("--at", "2030-01-01T00:00:00"), ("--delay", "1", "--at", "2030-01-01T00:00:00Z")):
        assert (await command("publish", "orders.new", "{}", *wrong, *where)).code == 2
    refused = await command("publish", "news", "{}", "--delay", "1", *where)
    assert refused.code == 2 and "the topic is not durable" in refused.stderr


async def test_the_command_line_lists_and_removes_reminders(place: Place) -> None:
    runtime = await place.runtime()
    where = ("--server", place.server.url, "--namespace", place.namespace)
    assert "no reminder is set" in (await command("reminders", "ls", *where)).stderr
    await runtime.remind(AGENT, "r", Order(1), cron="0 0 9 * * *", timezone="Asia/Tokyo")
    await runtime.remind(AgentId("guard", "x"), "s", Order(1), every=60)
    shown = (await command("reminders", "ls", *where)).stdout
    assert "clerk/ada" in shown and "0 0 9 * * * Asia/Tokyo" in shown and "@every 60s" in shown
    [one] = json.loads((await command("reminders", "ls", "clerk/ada", "--json", *where)).stdout)
    assert datetime.fromisoformat(one.pop("set_at")).tzinfo is not None
    assert one == {
        "type": "clerk",
        "key": "ada",
        "name": "r",
        "schedule": "0 0 9 * * *",
        "timezone": "Asia/Tokyo",
        "message_type": "Order",
    }
    assert (await command("reminders", "rm", "clerk/ada", "r", *where)).code == 0
    again = await command("reminders", "rm", "clerk/ada", "r", *where)
    assert again.code == 1 and "clerk/ada has no reminder 'r'" in again.stderr
    assert [one.name for one in await runtime.reminders()] == ["s"]


# -- times, names and subjects -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "problem"),
    [
        ({}, "one of every, cron and at"),
        ({"every": 1, "cron": "* * * * * *"}, "one of every, cron and at"),
        ({"every": 0.5}, r"at least 1, not 0\.5"),
        ({"every": float("inf")}, "at least 1, not inf"),
        ({"every": 1e10}, "every must end by 2262-04-11T00:00:00Z"),
        ({"at": datetime(2300, 1, 1, tzinfo=UTC)}, "at must be 2262-04-11T00:00:00Z at the latest"),
        ({"every": 1, "timezone": "UTC"}, "timezone is for cron only"),
        ({"at": datetime.now(UTC), "timezone": "UTC"}, "timezone is for cron only"),
        ({"at": datetime(2030, 1, 1)}, "must have a time zone"),
        ({"cron": "0 9 * * *"}, r"six fields .* write '0 0 9 \* \* \*'"),
        ({"cron": "@daily"}, "six fields"),
        ({"cron": "0 0 9 * * *\r\nX: y"}, "six fields"),
        ({"cron": "0 0 9 * * *", "timezone": "a\r\nX: y"}, "the name of a time zone"),
    ],
)
async def test_schedules_that_cannot_be_are_refused(when: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        of_reminder(when.get("every"), when.get("cron"), when.get("timezone"), when.get("at"))


@pytest.mark.parametrize("name", ["", "a b", "a\r\nb", "a/b", "*", None])
async def test_names_that_cannot_be_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="the name of a reminder must"):
        await NatsAgentRuntime().remind(AGENT, name, Order(1), every=1)


def test_the_topic_of_a_reminder_names_its_agent_and_its_name() -> None:
    for agent, name in ((AGENT, "r"), (AgentId("a.b", "k.:"), "x:y.z:")):
        topic = reminder_topic(agent, name)
        assert reminder_of(topic.type, topic.source) == (agent, name)
    for topic_type in ("orders", "natsrt.reminder.clerk", "natsrt.reminder.clerk:", "natsrt.reminder.:x"):
        assert reminder_of(topic_type, "k") is None


def test_a_reminder_of_a_key_that_is_too_long_is_refused() -> None:
    subjects = Subjects("n")
    assert subjects.reminder("s", "a", "k.", "x") == "n.natsrt.later.s.reminder.a.k=2E.x"
    with pytest.raises(ValueError, match="takes more than 200 bytes"):
        subjects.reminder("s", "a", "k" * 201, "x")


def test_schedules_are_written_as_the_server_reads_them() -> None:
    assert of_reminder(90.25, None, None, None) == Schedule("@every 90.25s")
    assert of_reminder(1e9, None, None, None).text == "@every 1000000000s"
    due = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    assert once(due).text == "@at 2030-01-01T10:00:00.000000Z"
    assert Schedule("0 0 9 * * *", "Asia/Tokyo").headers("t") == {
        "Nats-Schedule": "0 0 9 * * *",
        "Nats-Schedule-Target": "t",
        "Nats-TTL": "never",
        "Nats-Schedule-Time-Zone": "Asia/Tokyo",
    }
