"""Events that are tried again in more than a minute: they wait in a schedule, and hold no place in the consumer."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from autogen_core import MessageContext, RoutedAgent, TopicId, TypeSubscription, event
from nats.js.api import ConsumerInfo

import natsrt
from natsrt import DurableTopics, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.hosting import endings
from natsrt.jetstream.delivery import Delivery
from natsrt.wire.retry_subjects import retried, retries_of, retry_of, stored_again, waiting_retries
from natsrt.wire.subjects import Subjects
from tests.programs import durable_worker
from tests.programs.durable_worker import Job
from tests.support.cli import natsrt as run
from tests.support.processes import TAP, Processes, eventually

TOPIC = TopicId("work.jobs", "default")
PROGRAM = Path(durable_worker.__file__)
Make = Callable[..., Any]
HOUR = "later 3600"


@dataclass
class Seen:
    begun: list[tuple[int, natsrt.DeliveryInfo, str]] = field(default_factory=list)
    """Number, delivery and message id of each handler that began."""
    handled: list[int] = field(default_factory=list)

    @property
    def attempts(self) -> list[tuple[int, int]]:
        return [(number, delivery.attempt) for number, delivery, _ in self.begun]


class Works(RoutedAgent):
    """Jobs say after how many seconds they are to be tried again, and how often: ``later 5`` once, ``always 5``."""

    def __init__(self, seen: Seen) -> None:
        super().__init__("works")
        self._seen = seen

    @event
    async def on_job(self, message: Job, ctx: MessageContext) -> None:
        delivery = natsrt.current_delivery()
        assert delivery is not None
        self._seen.begun.append((message.number, delivery, ctx.message_id))
        kind, _, seconds = message.what.partition(" ")
        if kind == "always" or (kind == "later" and delivery.attempt == 1):
            raise natsrt.Retry(after=float(seconds))
        self._seen.handled.append(message.number)


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def runtime(seen: Seen | None = None, *, url: str = server.url, **settings: Any) -> NatsAgentRuntime:
            defaults: dict[str, Any] = {"durable": ["work."], "retry_delay": 0.05, "retry_delay_max": 0.2}
            made = NatsAgentRuntime(url, namespace=namespace, **{**defaults, **settings})
            if seen is not None:
                await natsrt.register(made, Works, "jobs", lambda: Works(seen))
                await made.add_subscription(TypeSubscription("work.jobs", "jobs"))
            return await stack.enter_async_context(made)

        yield runtime


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events wait elsewhere for 0.1 s already, in place of a minute."""
    monkeypatch.setattr(endings, "LONGEST_IN_PLACE", 0.1)


def events(runtime: NatsAgentRuntime) -> str:
    return f"{runtime.options.namespace}_natsrt_events"


async def consumer(runtime: NatsAgentRuntime) -> ConsumerInfo:
    return await runtime.running.connection.jetstream.consumer_info(events(runtime), "jobs")


async def waiting(runtime: NatsAgentRuntime) -> int:
    return sum((await runtime.running.network.later.count(events(runtime))).values())


async def all_settled(runtime: NatsAgentRuntime) -> None:
    """Wait until nothing is left for the type, neither in the consumer nor for later."""

    async def nothing_left() -> bool:
        info = await consumer(runtime)
        return not (info.num_pending or info.num_ack_pending or await waiting(runtime))

    await eventually(nothing_left, 20.0, "all events settled")


async def dead_letters(runtime: NatsAgentRuntime) -> list[natsrt.DeadLetter]:
    return [letter async for letter in runtime.dead_letters()]


async def publish_all(runtime: NatsAgentRuntime, numbers: range, what: str) -> None:
    await asyncio.gather(*(runtime.publish_message(Job(number, what), TOPIC) for number in numbers))


# -- places ----------------------------------------------------------------------------------------------------------


async def test_events_that_wait_for_long_hold_no_place_and_are_counted(
    make: Make, monkeypatch: pytest.MonkeyPatch, server: EmbeddedServer, namespace: str
) -> None:
    monkeypatch.setattr("natsrt.hosting.durable._MEASURED_EVERY", 0.1)
    seen = Seen()
    worker = await make(seen)
    assert (await make()).health().retries_waiting is None
    await publish_all(worker, range(300), HOUR)

    async def wait_elsewhere() -> bool:
        return (await consumer(worker)).num_ack_pending == 0 and await waiting(worker) == 300

    await eventually(wait_elsewhere, 15.0)
    await eventually(lambda: worker.health().retries_waiting == 300)
    place = ("--server", server.url, "--namespace", namespace)
    shown = (await run("topics", "info", "work.", "--json", *place)).json
    [jobs] = shown["agent_types"]
    assert (jobs["waiting"], jobs["unacknowledged"], jobs["lag"], shown["lag"]) == (300, 0, 300, 300)
    assert "WAITING" in (await run("topics", "info", "work.", *place)).stdout
    await worker.publish_message(Job(1_000), TOPIC)
    await eventually(lambda: seen.handled == [1_000])
    assert seen.attempts == [*((number, 1) for number in range(300)), (1_000, 1)]


@pytest.mark.slow  # twenty thousand events
@pytest.mark.timeout(400)
async def test_ten_thousand_events_wait_while_as_many_others_are_handled_once_each(make: Make, soon: None) -> None:
    """As many as a consumer has places: with them all taken, nothing else would be delivered."""
    seen = Seen()
    worker = await make(seen)
    await publish_all(worker, range(10_000), HOUR)

    async def all_wait() -> bool:
        return await waiting(worker) == 10_000 and (await consumer(worker)).num_ack_pending == 0

    await eventually(all_wait, 150.0)
    await worker.publish_message(Job(-1), TOPIC)
    await eventually(lambda: seen.handled == [-1], 20.0)
    await publish_all(worker, range(10_000, 20_000), "later 5")
    await eventually(lambda: len(seen.handled) == 10_001, 150.0)
    await eventually(all_wait, 20.0)
    assert Counter(seen.handled) == Counter([-1, *range(10_000, 20_000)])
    twice = [(number, attempt) for number in range(10_000, 20_000) for attempt in (1, 2)]
    assert Counter(seen.attempts) == Counter([(-1, 1), *((number, 1) for number in range(10_000)), *twice])


async def test_up_to_a_minute_an_event_keeps_its_place(make: Make) -> None:
    seen = Seen()
    worker = await make(seen)
    await publish_all(worker, range(1), "later 60")
    await eventually(lambda: len(seen.begun) == 1)
    await worker.publish_message(Job(1), TOPIC)
    await eventually(lambda: seen.handled == [1])  # what the first one led to has been sent before
    assert ((await consumer(worker)).num_ack_pending, await waiting(worker)) == (1, 0)


# -- what handlers see -----------------------------------------------------------------------------------------------


async def test_a_later_attempt_is_one_of_the_same_event(make: Make, soon: None) -> None:
    seen = Seen()
    worker = await make(seen)
    await worker.publish_message(Job(1, "later 0.5"), TOPIC, message_id="mine")
    js, subject = worker.running.connection.jetstream, worker.running.network.subjects.topic(TOPIC.type, TOPIC.source)
    plain = b'{"number": 2, "what": "later 0.5"}'
    await js.publish(subject, plain, headers={"Natsrt-Type": "Job", "Nats-Msg-Id": "x", "Other": "kept"})
    await eventually(lambda: sorted(seen.handled) == [1, 2])
    await all_settled(worker)
    assert Counter(seen.attempts) == Counter([(1, 1), (1, 2), (2, 1), (2, 2)])
    for number, message_id in ((1, "mine"), (2, f"{events(worker)}-2")):
        found = [(delivery, its_id) for one, delivery, its_id in seen.begun if one == number]
        assert {its_id for _, its_id in found} == {message_id}
        assert {(delivery.stream, delivery.sequence) for delivery, _ in found} == {(events(worker), number)}
        assert abs(found[0][0].stored_at - found[1][0].stored_at) < 0.000_002
    stored = await js.get_last_msg(
        events(worker), retried(worker.running.network.subjects, events(worker), "jobs", 2, 1)[1]
    )
    assert (stored.headers or {})["Other"] == "kept"
    assert "Nats-Msg-Id" not in (stored.headers or {})
    assert worker.health().redelivered == 2


async def test_attempts_are_counted_over_short_and_long_delays(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "LONGEST_IN_PLACE", 0.3)
    seen = Seen()
    worker = await make(seen, max_deliver=5, retry_delay=0.1, retry_delay_max=0.4)  # 0.1, 0.2, 0.4, 0.4

    class Fails(Works):
        @event
        async def on_job(self, message: Job, ctx: MessageContext) -> None:
            await super().on_job(message, ctx)
            raise ValueError("always")

    await natsrt.register(worker, Fails, "fails", lambda: Fails(seen))
    await worker.add_subscription(TypeSubscription("work.fails", "fails"))
    await worker.publish_message(Job(7), TopicId("work.fails", "x"), message_id="seven")
    await eventually(lambda: worker.health().dead_letters == 1, 15.0)
    assert seen.attempts == [(7, attempt) for attempt in range(1, 6)]
    [letter] = await dead_letters(worker)
    assert (letter.attempts, letter.event_sequence, letter.message_id) == (5, 1, "seven")
    assert letter.reason == "ValueError in the last of 5 attempts"
    assert letter.topic == TopicId("work.fails", "x")
    assert not any(name.startswith("Natsrt-Retry") for name in letter.headers)
    copies = await worker.running.network.reader.info(
        events(worker), retries_of(Subjects(worker.options.namespace), events(worker), "fails", 1)
    )
    assert copies is not None
    assert len(copies.state.subjects or {}) == 2  # after the third and the fourth attempt


# -- handed over once ------------------------------------------------------------------------------------------------


@pytest.mark.slow  # a worker is killed, and what it had comes again after ack_wait
@pytest.mark.parametrize(("ack_wait", "after"), [(0.5, 3.0), (3.0, 0.5)], ids=["before it is due", "after that"])
@pytest.mark.skipif(TAP, reason="beside a tap, the server delivers to the open pull of a worker that has ended")
async def test_a_worker_killed_between_storing_and_acknowledging_makes_one_event(
    make: Make, processes: Processes, server: EmbeddedServer, namespace: str, ack_wait: float, after: float
) -> None:
    publisher = await make()
    await (await make(Seen(), ack_wait=ack_wait)).stop()  # the type begins with the next event
    gap = {"NATSRT_TEST_GAP": "1"}
    process = processes.python(PROGRAM, server.url, namespace, "gap", str(ack_wait), name="gap", env=gap)
    await publisher.publish_message(Job(1, f"later {after}"), TOPIC, message_id="mine")
    await process.wait(20.0)
    assert process.stdout.splitlines()[-2:] == ["begun 1 attempt 1", "stored"]
    assert (await consumer(publisher)).num_ack_pending == 1
    seen = Seen()
    worker = await make(seen, ack_wait=ack_wait)
    await eventually(lambda: len(seen.handled) == 1, 15.0)
    await all_settled(worker)
    await worker.publish_message(Job(2), TOPIC)
    await eventually(lambda: 2 in seen.handled)
    assert seen.attempts == [(1, 2), (2, 1)]
    assert (await consumer(worker)).delivered.consumer_seq >= 4  # type: ignore[union-attr]  # the event came twice


async def test_an_event_that_waits_already_is_not_stored_a_second_time(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, ack_wait=0.5)
    [settlement] = worker.running.incoming.durable.settlements
    acknowledge, lost = settlement.pull.ack, list[Delivery]()
    settlement.pull.ack = lost.append
    await worker.publish_message(Job(1, HOUR), TOPIC)
    [delivery] = await eventually(lambda: lost)
    later = worker.running.network.later
    assert await waiting(worker) == 1
    assert await later.has("jobs", delivery)
    await later.put("jobs", delivery, subject="s", message_id="m", attempts=1, after=3600)
    assert await waiting(worker) == 1
    settlement.pull.ack = acknowledge

    async def is_acknowledged() -> bool:
        return (await consumer(worker)).num_ack_pending == 0

    await eventually(is_acknowledged)
    assert seen.attempts == [(1, 1)]


async def test_events_that_wait_survive_a_killed_server(own_server: EmbeddedServer, make: Make, soon: None) -> None:
    seen = Seen()
    worker = await make(seen, url=own_server.url, ack_wait=2.0)
    await publish_all(worker, range(50), "later 3")

    async def all_wait() -> bool:
        return await waiting(worker) == 50

    await eventually(all_wait, 10.0)
    await own_server.restart(kill=True)
    await eventually(lambda: Counter(seen.handled) == Counter(range(50)), 30.0)
    await all_settled(worker)
    assert Counter(seen.handled) == Counter(range(50))


# -- discarded -------------------------------------------------------------------------------------------------------


async def test_an_event_that_was_deleted_meanwhile_is_not_tried_again(make: Make, soon: None) -> None:
    seen = Seen()
    worker = await make(seen)
    await publish_all(worker, range(2), "later 1")

    async def all_wait() -> bool:
        return await waiting(worker) == 2

    await eventually(all_wait)
    await worker.running.connection.jetstream.delete_msg(events(worker), 1)
    await eventually(lambda: len(seen.handled) == 1)
    await all_settled(worker)
    assert len(seen.begun) == 3
    assert await dead_letters(worker) == []


async def test_an_event_whose_stream_will_have_discarded_it_by_then_is_a_dead_letter(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, durable=[DurableTopics("work.", max_age=600)])
    await publish_all(worker, range(1), HOUR)
    await publish_all(worker, range(1, 2), "later 300")
    await eventually(lambda: worker.health().dead_letters == 1)
    [letter] = await dead_letters(worker)
    assert "discards it before the next attempt" in letter.reason
    assert letter.event_sequence == 1

    async def waits() -> bool:
        return await waiting(worker) == 1

    await eventually(waits)
    subject, _ = retried(worker.running.network.subjects, events(worker), "jobs", 2, 1)
    stored = await worker.running.connection.jetstream.get_last_msg(events(worker), subject)
    assert 298 <= int((stored.headers or {})["Nats-Schedule-TTL"].removesuffix("s")) <= 301  # it goes with the event


@pytest.mark.parametrize("discard", ["old", "new"])
async def test_an_attempt_after_the_times_that_servers_know_is_not_made_now(make: Make, discard: Any) -> None:
    """In a stream without schedules, too, where the event keeps its place."""
    seen = Seen()
    worker = await make(seen, durable=[DurableTopics("work.", max_age=None, discard=discard)])
    await publish_all(worker, range(1), "later 1e10")

    async def waits() -> bool:
        held = (await consumer(worker)).num_ack_pending
        return (await waiting(worker), held) == ((1, 0) if discard == "old" else (0, 1))

    await eventually(lambda: len(seen.begun) == 1)
    await eventually(waits)
    for number in (2, 3):  # each after the server has published what was due
        await worker.publish_message(Job(number), TOPIC, delay=0.3 if discard == "old" else None)
        await eventually(lambda last=number: seen.handled[-1:] == [last])
    assert [attempt for attempt in seen.attempts if attempt[0] == 0] == [(0, 1)]
    assert await waits()


# -- where it is not possible ----------------------------------------------------------------------------------------


async def keeps_its_place(worker: NatsAgentRuntime, seen: Seen, what: str = HOUR) -> None:
    await publish_all(worker, range(1), what)
    await eventually(lambda: len(seen.begun) == 1)

    async def is_held() -> bool:
        return (await consumer(worker)).num_ack_pending == 1

    await eventually(is_held)
    await worker.publish_message(Job(2), TOPIC)
    await eventually(lambda: seen.handled == [2])
    assert await waiting(worker) == 0
    assert await dead_letters(worker) == []


async def test_in_a_stream_that_has_no_schedules_an_event_keeps_its_place(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, durable=[DurableTopics("work.", max_messages=1000)])
    await keeps_its_place(worker, seen)


async def test_in_a_stream_whose_schedules_are_off_an_event_keeps_its_place(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = await make()
    js = publisher.running.connection.jetstream
    config = (await js.stream_info(events(publisher))).config
    await js.delete_stream(events(publisher))
    await js.add_stream(config.evolve(allow_msg_schedules=False))
    seen = Seen()
    worker = await make(seen, durable=[])
    await keeps_its_place(worker, seen)
    assert "keeps its place in the consumer for 3600 s" in caplog.text


async def test_on_a_server_without_schedules_an_event_keeps_its_place(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen()
    worker = await make(seen)
    monkeypatch.setattr("natsrt.jetstream.later_retries.NEEDED_VERSION", (99, 0))
    await keeps_its_place(worker, seen)


async def test_without_the_count_of_attempts_there_is_an_end_to_them(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, max_deliver=3)
    js = worker.running.connection.jetstream
    await js.delete_stream(f"{worker.options.namespace}_natsrt_attempts")
    await publish_all(worker, range(1), "always 0.01")
    await eventually(lambda: worker.health().dead_letters == 1, 20.0)
    assert seen.attempts == [(0, 1), (0, 2), (0, 3)]
    [letter] = await dead_letters(worker)
    assert letter.attempts == 3


async def test_an_event_that_does_not_fit_with_more_headers_keeps_its_place(make: Make) -> None:
    seen = Seen()
    worker = await make(seen)
    subject = worker.running.network.subjects.topic(TOPIC.type, TOPIC.source)
    body = json.dumps({"number": 1, "what": HOUR}).encode()
    body += b" " * (worker.running.connection.max_payload - len(body) - 100)
    await worker.running.connection.jetstream.publish(subject, body, headers={"Natsrt-Type": "Job"})
    await eventually(lambda: len(seen.begun) == 1)
    await worker.publish_message(Job(2), TOPIC)
    await eventually(lambda: seen.handled == [2])
    assert ((await consumer(worker)).num_ack_pending, await waiting(worker)) == (1, 0)


# -- subjects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_type", ["jobs", "a b.c*>", "retry", "redrive", "x" * 300])
def test_the_subjects_of_retries_are_told_apart(agent_type: str) -> None:
    subjects = Subjects("n")
    later, again = retried(subjects, "s", agent_type, 17, 3)
    assert retry_of(subjects, "s", again) == (17, 3)
    for other in (
        later,
        subjects.again("s"),
        f"{again}.4",
        again.replace("17", "x"),
        again.replace("17", "9" * 19),
        again.replace(".s.", ".t."),
    ):
        assert retry_of(subjects, "s", other) is None
    assert _matches(retries_of(subjects, "s", agent_type, 17), later)
    assert _matches(retries_of(subjects, "s", agent_type, 17), again)
    assert not _matches(retries_of(subjects, "s", agent_type, 1), later)
    assert _matches(waiting_retries(subjects, "s", agent_type), later)
    assert _matches(waiting_retries(subjects, "s"), later)
    assert not _matches(waiting_retries(subjects, "s"), again)
    delayed = subjects.delayed("s", "id", subjects.topic("t", "u"))
    reminder = subjects.reminder("s", "jobs", "k", "name")
    assert not any(_matches(waiting_retries(subjects, "s"), other) for other in (delayed, reminder))
    own = stored_again(subjects, "s", agent_type)
    assert sum(_matches(one, again) for one in own) == 1
    others = stored_again(subjects, "s", "other")
    assert not any(_matches(one, again) for one in others)


def _matches(pattern: str, subject: str) -> bool:
    wanted, tokens = pattern.split("."), subject.split(".")
    return len(wanted) == len(tokens) and all(one in ("*", token) for one, token in zip(wanted, tokens, strict=True))


# -- keyed agents ----------------------------------------------------------------------------------------------------


async def test_the_key_of_an_event_that_is_tried_again_much_later_waits_and_others_pass(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, keyed=["jobs"])
    await worker.publish_message(Job(1, HOUR), TopicId(TOPIC.type, "a"))
    await worker.publish_message(Job(2), TopicId(TOPIC.type, "a"))
    await worker.publish_message(Job(3), TopicId(TOPIC.type, "b"))
    await eventually(lambda: seen.handled == [3])
    assert ((await consumer(worker)).num_ack_pending, await waiting(worker)) == (2, 0)
    assert Counter(seen.attempts) == Counter([(1, 1), (3, 1)])
