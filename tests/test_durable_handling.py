"""Events of durable topics: handled by workers, tried again, and kept as dead letters."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats.js.errors
import pytest
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
    event,
)
from nats.aio.msg import Msg
from nats.js.api import ConsumerInfo

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.durable_types import DurableTopics
from natsrt.embedded import EmbeddedServer
from natsrt.errors import ConfigurationError
from natsrt.jetstream.registry.entries import DurableEntry
from natsrt.jetstream.streams import events_stream
from natsrt.retry_types import RetryOptions
from natsrt.wire.filters import common, covers, widest
from tests.programs import durable_worker
from tests.programs.durable_worker import Job
from tests.support.processes import TAP, Process, Processes, eventually

"""True if somebody listens to every subject. The server then takes the pulls of workers that have ended for open, until
they expire, and an event that it sends to one may have been handled there, as far as its next worker knows."""
TOPIC = TopicId("work.jobs", "default")
PROGRAM = Path(durable_worker.__file__)


@dataclass
class Note:
    text: str


@dataclass
class Seen:
    """What the handlers of a test have done. ``free``: handlers of jobs that wait go on."""

    handled: list[tuple[str, int]] = field(default_factory=list)
    begun: list[tuple[str, int, int]] = field(default_factory=list)
    """Worker, number and attempt of each handler that began."""
    ids: list[str] = field(default_factory=list)
    deliveries: list[natsrt.DeliveryInfo | None] = field(default_factory=list)
    fails: bool = True
    free: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def numbers(self) -> Counter[int]:
        return Counter(number for _, number in self.handled)


class Works(RoutedAgent):
    def __init__(self, seen: Seen, worker: str) -> None:
        super().__init__("works")
        self._seen, self._worker = seen, worker

    @event
    async def on_job(self, message: Job, ctx: MessageContext) -> None:
        delivery = natsrt.current_delivery()
        seen = self._seen
        seen.begun.append((self._worker, message.number, delivery.attempt if delivery is not None else 0))
        seen.ids.append(ctx.message_id)
        seen.deliveries.append(delivery)
        match message.what:
            case "wait":
                await seen.free.wait()
            case "fail" if seen.fails:
                raise ValueError(f"job {message.number} – größer")
            case "reject":
                raise natsrt.Reject("no such job")
            case "retry" if delivery is not None and delivery.attempt == 1:
                raise natsrt.Retry(after=0.05)
            case "slow":
                await asyncio.sleep(1.5)
        seen.handled.append((self._worker, message.number))

    @event
    async def on_note(self, message: Note, ctx: MessageContext) -> None:
        self._seen.handled.append((self._worker, -1))


Make = Callable[..., Any]


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    """Starts runtimes. ``types`` are the agent types of a worker, each with its subscriptions."""
    async with AsyncExitStack() as stack:

        async def runtime(
            seen: Seen | None = None,
            types: dict[str, list[str]] | None = None,
            *,
            name: str = "w",
            max_running: dict[str, int] | None = None,
            **settings: Any,
        ) -> NatsAgentRuntime:
            settings = {"durable": ["work.", "audit"], "retry_delay": 0.05, "retry_delay_max": 0.2} | settings
            made = NatsAgentRuntime(server.url, namespace=namespace, name=name, **settings)
            for agent_type, patterns in (types or {}).items():
                assert seen is not None
                limit = (max_running or {}).get(agent_type)
                await natsrt.register(made, Works, agent_type, lambda: Works(seen, name), max_running=limit)
                for pattern in patterns:
                    await made.add_subscription(subscription(pattern, agent_type))
            return await stack.enter_async_context(made)

        yield runtime


def subscription(pattern: str, agent_type: str) -> TypeSubscription | TypePrefixSubscription:
    if not pattern or pattern.endswith("."):
        return TypePrefixSubscription(pattern, agent_type)
    return TypeSubscription(pattern, agent_type)


JOBS = {"jobs": ["work.jobs"]}


async def consumer(runtime: NatsAgentRuntime, agent_type: str = "jobs") -> ConsumerInfo:
    stream = f"{runtime.options.namespace}_natsrt_events"
    return await runtime.running.connection.jetstream.consumer_info(stream, agent_type)


async def all_settled(runtime: NatsAgentRuntime, agent_type: str = "jobs") -> None:
    """Wait until the consumer of an agent type has nothing left to deliver or to be acknowledged."""

    async def nothing_left() -> bool:
        info = await consumer(runtime, agent_type)
        return not (info.num_pending or info.num_ack_pending)

    await eventually(nothing_left, 15.0, "all events settled")


async def dead_letters(runtime: NatsAgentRuntime) -> list[Msg]:
    """All dead letters, as a plain NATS client reads them."""
    js = runtime.running.connection.jetstream
    stream = f"{runtime.options.namespace}_natsrt_dead"
    try:
        info = await js.stream_info(stream)
    except nats.js.errors.NotFoundError:
        return []
    stored = range(info.state.first_seq, info.state.last_seq + 1) if info.state.messages else ()
    return [await js.get_msg(stream, sequence) for sequence in stored]


async def publish_raw(runtime: NatsAgentRuntime, body: bytes, headers: dict[str, str] | None = None) -> None:
    connection = runtime.running.connection
    subject = runtime.running.network.subjects.topic(TOPIC.type, TOPIC.source)
    await connection.jetstream.publish(subject, body, headers=headers)


# -- handled once ----------------------------------------------------------------------------------------------------


async def test_each_event_is_handled_once_and_acknowledged(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS)
    publisher = await make()
    for number in range(20):
        await publisher.publish_message(Job(number), TOPIC, message_id=f"id-{number}")
    await eventually(lambda: len(seen.handled) == 20)
    await all_settled(worker)
    assert seen.numbers == Counter(range(20))
    assert sorted(seen.ids) == sorted(f"id-{number}" for number in range(20))
    stream = f"{worker.options.namespace}_natsrt_events"
    assert [(d.stream, d.sequence, d.attempt) for d in seen.deliveries if d] == [(stream, n, 1) for n in range(1, 21)]
    assert natsrt.current_delivery() is None
    assert worker.health().redelivered == 0
    assert (worker.health().messages_handled, worker.health().messages_failed) == (20, 0)


async def test_an_event_is_not_handled_as_a_core_copy_too(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, {"jobs": ["work.", "plain"], "all": [""]})
    for number in range(10):
        await worker.publish_message(Job(number), TOPIC)
    await worker.publish_message(Job(100), TopicId("plain", "default"))
    await eventually(lambda: len(seen.handled) >= 22)
    await all_settled(worker)
    await all_settled(worker, "all")
    assert seen.numbers == Counter(dict.fromkeys([*range(10), 100], 2))
    assert sum(delivery is None for delivery in seen.deliveries) == 2


async def test_two_types_on_one_topic_get_every_event_once(make: Make) -> None:
    seen, other = Seen(), Seen()
    await make(seen, JOBS)
    worker = await make(other, {"others": ["work.jobs", "work."]}, name="v")
    for number in range(10):
        await worker.publish_message(Job(number), TOPIC)
    await eventually(lambda: len(seen.handled) == len(other.handled) == 10)
    await all_settled(worker)
    await all_settled(worker, "others")
    assert seen.numbers == other.numbers == Counter(range(10))


async def test_the_workers_of_a_type_share_its_events(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS, name="a")
    await make(seen, JOBS, name="b")
    await asyncio.gather(*(worker.publish_message(Job(number), TOPIC) for number in range(200)))
    await eventually(lambda: len(seen.handled) == 200)
    await all_settled(worker)
    assert seen.numbers == Counter(range(200))
    assert {name for name, _ in seen.handled} == {"a", "b"}


async def test_the_publishers_own_agent_id_is_skipped_and_the_event_acknowledged(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, {"jobs": ["work.jobs"], "others": ["work.jobs"]})
    await worker.publish_message(Job(1), TOPIC, sender=AgentId("jobs", TOPIC.source))
    await all_settled(worker)
    await all_settled(worker, "others")
    assert seen.handled == [("w", 1)]


async def test_a_plain_client_may_publish_and_its_event_has_a_stable_id(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS)
    await publish_raw(worker, b'{"number": 7, "what": "retry"}', {"Natsrt-Type": "Job"})
    await publish_raw(worker, b'{"number": 8, "what": ""}')
    await eventually(lambda: len(seen.handled) == 2)
    await all_settled(worker)
    assert seen.numbers == Counter([7, 8])
    stream = f"{worker.options.namespace}_natsrt_events"
    assert Counter(seen.ids) == Counter({f"{stream}-1": 2, f"{stream}-2": 1})
    assert worker.health().redelivered == 1


async def test_events_wait_for_a_type_while_it_has_no_worker(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS, ack_wait=1.0)
    publisher = await make()
    await worker.stop()
    await publisher.publish_message(Job(1), TOPIC)
    again = await make(seen, JOBS, ack_wait=1.0, name="again")
    await eventually(lambda: seen.handled == [("again", 1)])
    await all_settled(again)


async def test_a_stop_when_idle_waits_for_the_events_of_durable_topics(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS, max_running={"jobs": 1})
    await asyncio.gather(*(worker.publish_message(Job(number), TOPIC) for number in range(50)))
    await worker.stop_when_idle()
    assert seen.numbers == Counter(range(50))


@pytest.mark.skipif(TAP, reason="beside a tap, the server delivers to the open pull of a worker that has ended")
async def test_a_worker_is_not_idle_while_an_event_waits_in_a_stream(make: Make) -> None:
    worker = await make(Seen(), JOBS)
    assert await worker.running.is_idle()
    [settlement] = worker.running.incoming.durable.settlements
    await settlement.pull.stop()
    await worker.publish_message(Job(1), TOPIC)
    assert not await worker.running.is_idle()


async def test_a_subscription_that_is_added_later_gets_events_at_once(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS)
    await worker.add_subscription(TypeSubscription("audit", "jobs"))
    await worker.publish_message(Job(1), TopicId("audit", "default"))
    await eventually(lambda: seen.handled == [("w", 1)])
    await all_settled(worker)


async def test_a_subscription_that_ends_leaves_its_filter_and_its_events_are_not_handled(make: Make) -> None:
    """A worker that does not know a subscription must not make another worker's events skip."""
    seen = Seen()
    worker = await make(seen, JOBS)
    audit = TypeSubscription("audit", "jobs")
    await worker.add_subscription(audit)
    await worker.remove_subscription(audit.id)
    assert len((await consumer(worker)).config.filter_subjects or ()) == 4  # with two of events stored again
    await worker.publish_message(Job(1), TopicId("audit", "default"))
    await worker.publish_message(Job(2), TOPIC)
    await eventually(lambda: len(seen.handled) == 1)
    await all_settled(worker)
    assert seen.handled == [("w", 2)]


async def test_a_topic_that_becomes_durable_later_loses_no_event(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, {"jobs": ["late.jobs"]})
    subscriptions, asked = worker.running.incoming.subscriptions, []
    serve_at = subscriptions.serve_at

    async def noted(agent_type: str, revision: int) -> None:
        await serve_at(agent_type, revision)
        asked.append(agent_type)

    subscriptions.serve_at = noted
    publisher = await make(durable=["late."])
    assert asked == ["jobs"]  # so the consumer exists before the first event
    for number in range(20):
        await publisher.publish_message(Job(number), TopicId("late.jobs", "default"))
    await eventually(lambda: len(seen.handled) == 20)
    await all_settled(worker)
    assert seen.numbers == Counter(range(20))
    assert None not in seen.deliveries


@pytest.mark.slow  # it takes 5 s until it is tried again
async def test_a_stream_that_is_made_late_is_pulled_from(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    seen = Seen()
    worker = await make(seen, {"jobs": ["late.jobs"]})
    other = await make()
    options, subjects = other.options, other.running.network.subjects
    topics = DurableTopics("late.", name="late")
    stream = events_stream(subjects, options, topics)
    await other.running.registry.declare([DurableEntry.of(stream.name or "", topics)])
    await eventually(lambda: "tried again" in caplog.text, 20.0)
    js = other.running.connection.jetstream
    await js.add_stream(stream)

    async def exists() -> bool:
        try:
            return bool(await js.consumer_info(stream.name or "", "jobs"))
        except nats.js.errors.NotFoundError:
            return False

    await eventually(exists, 15.0)
    await other.publish_message(Job(1), TopicId("late.jobs", "default"))
    await eventually(lambda: len(seen.handled) == 1)
    assert worker.ready


# -- tried again -----------------------------------------------------------------------------------------------------


async def test_an_event_whose_handler_raises_is_tried_again(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS)
    await worker.publish_message(Job(1, "fail"), TOPIC)
    await eventually(lambda: len(seen.begun) == 2)
    seen.fails = False
    await eventually(lambda: seen.handled == [("w", 1)])
    await all_settled(worker)
    assert [attempt for _, _, attempt in seen.begun] == list(range(1, len(seen.begun) + 1))
    assert len(set(seen.ids)) == 1
    assert len({(d.sequence, d.stored_at) for d in seen.deliveries if d}) == 1
    assert await dead_letters(worker) == []


async def test_retry_gives_the_delay_and_counts_as_an_attempt(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS, retry_delay=3600.0, retry_delay_max=3600.0)
    await worker.publish_message(Job(1, "retry"), TOPIC)
    await eventually(lambda: seen.begun == [("w", 1, 1), ("w", 1, 2)])
    await all_settled(worker)


async def test_the_settings_of_a_type_override_the_general_ones(make: Make) -> None:
    seen = Seen()
    types = {"jobs": ["work.jobs"], "others": ["work.jobs"]}
    worker = await make(seen, types, max_deliver=1, retries={"others": {"max_deliver": 2}})
    await worker.publish_message(Job(1, "fail"), TOPIC)
    await all_settled(worker)
    await all_settled(worker, "others")
    assert len(seen.begun) == 3
    letters = await dead_letters(worker)
    found = {letter.headers["Natsrt-Dead-Agent-Type"]: letter.headers["Natsrt-Dead-Attempts"] for letter in letters}
    assert found == {"jobs": "1", "others": "2"}


def test_delays_double_up_to_the_longest() -> None:
    options = RetryOptions(retry_delay=0.5, retry_delay_max=3.0, max_deliver=1)
    assert [options.delay(attempt) for attempt in (1, 2, 3, 4, 5, 10_000)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    "setting", [{"retry_delay": 0}, {"retry_delay_max": -1.0}, {"max_deliver": 0}, {"max_deliver": True}, {"wrong": 1}]
)
def test_impossible_settings_of_a_type_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"retries: jobs: .*{next(iter(setting))}"):
        natsrt.Options(retries={"jobs": setting})


@pytest.mark.parametrize("after", [-1, float("nan"), float("inf"), True])
def test_retry_refuses_an_impossible_delay(after: float) -> None:
    with pytest.raises(ValueError, match="after must be"):
        natsrt.Retry(after=after)


# -- dead letters ----------------------------------------------------------------------------------------------------


async def test_an_event_that_fails_in_every_attempt_becomes_one_dead_letter(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS, max_deliver=3)
    await worker.publish_message(Job(1, "fail"), TOPIC, message_id="poison")
    await worker.publish_message(Job(2), TOPIC)
    await eventually(lambda: worker.health().dead_letters == 1, 10.0)
    await all_settled(worker)
    assert [number for _, number, _ in seen.begun].count(1) == 3
    assert seen.handled == [("w", 2)]
    [letter] = await dead_letters(worker)
    namespace = worker.options.namespace
    assert letter.subject == f"{namespace}.natsrt.dead.jobs.{namespace}_natsrt_events.1"
    assert letter.data is not None
    assert json.loads(letter.data)["data"] == {"number": 1, "what": "fail"}
    headers = letter.headers
    assert headers["Natsrt-Message-Id"] == "poison"
    assert headers["Natsrt-Subject"] == f"{namespace}.topic.work.jobs.default"
    assert "Nats-Msg-Id" not in headers  # the stream would take it for the dead letter of another type
    assert headers["Natsrt-Dead-Agent-Type"] == "jobs"
    assert headers["Natsrt-Dead-Attempts"] == "3"
    assert (headers["Natsrt-Dead-Stream"], headers["Natsrt-Dead-Sequence"]) == (f"{namespace}_natsrt_events", "1")
    assert headers["Natsrt-Dead-Reason"] == "ValueError in the last of 3 attempts"
    assert headers["Natsrt-Dead-Stored"] < headers["Natsrt-Dead-Failed"]
    error = json.loads(headers["Natsrt-Dead-Error"])
    assert (error["type"], error["message"]) == ("builtins.ValueError", "job 1 – größer")
    assert "on_job" in error["traceback"]
    assert headers["Natsrt-Dead-Error"].isascii()
    assert worker.health().redelivered == 2


async def test_an_event_whose_agent_cannot_be_made_becomes_a_dead_letter(make: Make) -> None:
    worker = await make(max_deliver=3)
    made = 0

    def fails() -> Works:
        nonlocal made
        made += 1
        raise LookupError("no database")

    await natsrt.register(worker, Works, "jobs", fails)
    await worker.add_subscription(TypeSubscription("work.jobs", "jobs"))
    await worker.publish_message(Job(1), TOPIC)
    await eventually(lambda: worker.health().dead_letters == 1, 10.0)
    [letter] = await dead_letters(worker)
    assert (letter.headers["Natsrt-Dead-Attempts"], made) == ("3", 3)


async def test_a_rejected_event_becomes_a_dead_letter_at_once(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS)
    await worker.publish_message(Job(1, "reject"), TOPIC)
    await eventually(lambda: worker.health().dead_letters == 1)
    await all_settled(worker)
    [letter] = await dead_letters(worker)
    assert len(seen.begun) == 1
    assert letter.headers["Natsrt-Dead-Reason"] == "no such job"
    assert letter.headers["Natsrt-Dead-Attempts"] == "1"


@pytest.mark.parametrize(
    "body",
    [
        b'{"specversion":"1.0","type":"natsrt.event","id":"1","source":"/","messagetype":"Job","data":{"number":"x"}}',
        b'{"specversion":"1.0","type":"natsrt.event","id":"1","source":7,"data":1}',
        b'{"number": "x", "what": 3}',
    ],
)
async def test_what_cannot_be_read_becomes_a_dead_letter_at_once(make: Make, body: bytes) -> None:
    seen = Seen()
    worker = await make(seen, JOBS)
    await publish_raw(worker, body, {"Natsrt-Type": "Job", "Other": "kept"})
    await eventually(lambda: worker.health().dead_letters == 1)
    await all_settled(worker)
    [letter] = await dead_letters(worker)
    assert letter.data == body
    assert letter.headers["Other"] == "kept"
    assert letter.headers["Natsrt-Dead-Attempts"] == "1"
    assert json.loads(letter.headers["Natsrt-Dead-Error"])["type"] == "natsrt.errors.CannotDecode"
    assert (seen.begun, worker.health().undecodable) == ([], 1)


async def test_a_worker_that_ends_before_it_terminates_leaves_one_dead_letter(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS, max_deliver=1, ack_wait=0.5)
    [settlement] = worker.running.incoming.durable.settlements
    terminate, lost = settlement.pull.terminate, []
    settlement.pull.terminate = lambda delivery, reason: lost.append(reason)  # what is lost when a worker is killed
    await worker.publish_message(Job(1, "fail"), TOPIC)
    await eventually(lambda: len(lost) == 1)
    settlement.pull.terminate = terminate
    await all_settled(worker)
    assert seen.begun == [("w", 1, 1)]
    [letter] = await dead_letters(worker)
    assert json.loads(letter.headers["Natsrt-Dead-Error"])["type"] == "builtins.ValueError"
    assert worker.health().dead_letters == 1


async def test_an_event_that_ends_its_workers_becomes_a_dead_letter(make: Make, start_worker: Any) -> None:
    publisher = await make()
    for attempt in (1, 2, 3):  # the first one is not counted: that would be a write for each event
        process = await start_worker(f"killed{attempt}", 0.5)
        if attempt == 1:
            await publisher.publish_message(Job(1, "for ever"), TOPIC, message_id="deadly")
        await process.wait_for_line(f"begun 1 attempt {attempt}")
        process.kill()
    seen = Seen()
    worker = await make(seen, JOBS, ack_wait=0.5, max_deliver=2)
    await eventually(lambda: worker.health().dead_letters == 1, 10.0)
    await all_settled(worker)
    [letter] = await dead_letters(worker)
    assert letter.headers["Natsrt-Message-Id"] == "deadly"
    assert letter.headers["Natsrt-Dead-Attempts"] == "2"
    assert json.loads(letter.headers["Natsrt-Dead-Error"])["type"] == "natsrt.errors.NotSettled"
    assert seen.begun == []


async def test_a_stream_that_was_made_anew_does_not_hide_dead_letters(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS)
    js, stream = worker.running.connection.jetstream, f"{worker.options.namespace}_natsrt_events"
    await worker.publish_message(Job(1, "reject"), TOPIC)
    await eventually(lambda: worker.health().dead_letters == 1)
    info = await js.stream_info(stream)
    await worker.stop()
    publisher = await make()
    js = publisher.running.connection.jetstream
    await js.delete_stream(stream)
    await js.add_stream(info.config)
    again = await make(seen, JOBS)
    await again.publish_message(Job(2, "reject"), TOPIC)
    await eventually(lambda: again.health().dead_letters == 1)
    letters = await dead_letters(again)
    assert len({letter.subject for letter in letters}) == 1
    assert [json.loads(letter.data or b"")["data"]["number"] for letter in letters] == [1, 2]


async def test_a_dead_letter_that_would_be_too_large_has_no_data_and_says_so(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS)
    limit = worker.running.connection.max_payload
    body = json.dumps({"number": 1, "what": "reject", "more": ""}).encode()
    body = json.dumps({"number": "x", "what": "x" * (limit - len(body) - 100)}).encode()
    await publish_raw(worker, body)
    await eventually(lambda: worker.health().dead_letters == 1, 10.0)
    [letter] = await dead_letters(worker)
    assert not letter.data
    assert letter.headers["Natsrt-Dead-Omitted"] == str(len(body))


async def test_the_first_error_is_raised_at_the_stop_if_errors_are_not_ignored(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS, ignore_unhandled_exceptions=False, max_deliver=2)
    await worker.publish_message(Job(1, "fail"), TOPIC)
    await eventually(lambda: worker.health().dead_letters == 1)
    with pytest.raises(ValueError, match="job 1"):
        await worker.stop()


# -- workers that end, freeze, stop ------------------------------------------------------------------------------------


@pytest.fixture
async def start_worker(server: EmbeddedServer, namespace: str, processes: Processes) -> Callable[..., Any]:
    async def start(name: str, ack_wait: float, *more: str) -> Process:
        process = processes.python(PROGRAM, server.url, namespace, name, str(ack_wait), *more, name=name)
        await process.wait_for_line("ready", 30.0)
        return process

    return start


async def test_another_worker_handles_what_a_killed_one_had(make: Make, start_worker: Any) -> None:
    process = await start_worker("killed", 1.0)
    publisher = await make()
    await publisher.publish_message(Job(1, "for ever"), TOPIC)
    await process.wait_for_line("begun 1 attempt 1")
    process.kill()
    seen = Seen()
    seen.free.set()
    worker = await make(seen, JOBS, ack_wait=1.0)
    await eventually(lambda: seen.handled == [("w", 1)], 10.0)
    assert seen.begun == [("w", 1, 2)]
    await all_settled(worker)


@pytest.mark.skipif(TAP, reason="beside a tap, the server delivers to the open pull of a worker that has ended")
@pytest.mark.slow  # workers die, and what they had comes again after ack_wait
async def test_events_that_were_merely_held_by_workers_that_died_are_not_given_up(
    make: Make, server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    """An event ends one worker after the other, and each of them also had another, whose handler did not begin."""
    publisher = await make()
    await (await make(Seen(), JOBS, ack_wait=0.5)).stop()  # the type begins with the next event
    await publisher.publish_message(Job(0, "die"), TOPIC)
    await publisher.publish_message(Job(1), TOPIC)
    for death in (1, 2, 3):
        arguments = (server.url, namespace, f"dying{death}", "0.5", "max_running=1", "max_deliver=2")
        process = processes.python(PROGRAM, *arguments, name=f"dying{death}")
        await process.wait(20.0)
        assert process.stdout.count("begun") == process.stdout.count("begun 0 ") == 1
    seen = Seen()
    worker = await make(seen, JOBS, ack_wait=0.5, max_deliver=2)
    await eventually(lambda: worker.health().dead_letters == 1, 10.0)
    await all_settled(worker)
    assert seen.begun == [("w", 1, 2)]  # it may have begun before, as far as its worker knows
    [letter] = await dead_letters(worker)
    assert json.loads(letter.data or b"")["data"]["number"] == 0


async def test_a_handler_of_three_times_ack_wait_gets_its_event_once(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS, ack_wait=0.5, name="a")
    await make(seen, JOBS, ack_wait=0.5, name="b")
    await worker.publish_message(Job(1, "slow"), TOPIC)
    await eventually(lambda: len(seen.handled) == 1, 10.0)
    await all_settled(worker)
    assert len(seen.begun) == 1
    assert worker.health().redelivered == 0


async def test_an_event_that_is_delivered_again_while_its_handler_runs_is_not_handled_twice(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS, ack_wait=0.3)
    [settlement] = worker.running.incoming.durable.settlements
    settlement.still_held = lambda: None  # as if this worker was frozen
    await worker.publish_message(Job(1, "wait"), TOPIC)
    await eventually(lambda: worker.health().redelivered == 2)
    seen.free.set()
    await all_settled(worker)
    assert seen.begun == [("w", 1, 1)]
    assert seen.handled == [("w", 1)]


async def test_the_late_acknowledgement_of_a_frozen_worker_harms_nothing(make: Make, start_worker: Any) -> None:
    process = await start_worker("frozen", 1.0)
    publisher = await make()
    await publisher.publish_message(Job(1, "until thawed"), TOPIC)
    await process.wait_for_line("begun 1 attempt 1")
    seen = Seen()
    worker = await make(seen, JOBS, ack_wait=1.0)
    process.pause()
    await eventually(lambda: seen.handled == [("w", 1)], 15.0)
    process.resume()
    await process.wait_for_line("handled 1")
    await publisher.publish_message(Job(2), TOPIC)
    await eventually(lambda: "handled 2" in process.stdout or seen.numbers[2] == 1, 15.0)
    await all_settled(worker)
    assert seen.numbers[1] == 1
    assert process.stdout.count("handled 1\n") == 1
    assert await dead_letters(worker) == []


async def test_a_worker_that_stops_gives_back_what_it_has_not_started(make: Make) -> None:
    first, second = Seen(), Seen()
    worker = await make(first, JOBS, name="first", max_running={"jobs": 2})
    for number in range(4):
        await worker.publish_message(Job(number, "wait"), TOPIC)
    await eventually(lambda: worker.health().messages_queued == 2)
    other = await make(second, JOBS, name="second")
    second.free.set()
    stopping = asyncio.ensure_future(worker.stop())
    await eventually(lambda: len(second.handled) == 2, 10.0)
    assert not stopping.done()
    first.free.set()
    await stopping
    await all_settled(other)
    assert first.numbers + second.numbers == Counter(range(4))


async def test_a_worker_that_is_cut_short_gives_back_what_it_has_started(make: Make) -> None:
    first, second = Seen(), Seen()
    worker = await make(first, JOBS, name="first", drain_timeout=0.1, ack_wait=1.0)
    await worker.publish_message(Job(1, "wait"), TOPIC)
    await eventually(lambda: len(first.begun) == 1)
    await worker.stop()
    second.free.set()
    other = await make(second, JOBS, name="second", ack_wait=1.0)
    await eventually(lambda: len(second.handled) == 1)
    assert second.begun == [("second", 1, 1)] or TAP  # what was given back is no attempt
    await all_settled(other)
    assert await dead_letters(other) == []


async def test_only_failures_use_up_attempts(make: Make) -> None:
    """An event is given back twice after its handler began, and acknowledged in vain: none of that is a failure."""
    for _ in range(2):
        cut = Seen()
        worker = await make(cut, JOBS, drain_timeout=0.1, ack_wait=0.5, max_deliver=1)
        if not (await consumer(worker)).delivered.stream_seq:  # type: ignore[union-attr]
            await worker.publish_message(Job(1, "wait"), TOPIC)
        await eventually(lambda cut=cut: len(cut.begun) == 1)  # type: ignore[misc]
        await worker.stop()
    seen = Seen()
    seen.free.set()
    worker = await make(seen, JOBS, ack_wait=0.5, max_deliver=1)
    [settlement] = worker.running.incoming.durable.settlements
    acknowledge, lost = settlement.pull.ack, []
    settlement.pull.ack = lost.append
    await eventually(lambda: lost)
    settlement.pull.ack = acknowledge
    await all_settled(worker)
    assert len(seen.handled) == 2
    assert await dead_letters(worker) == []


async def test_an_unregistered_type_pulls_no_more(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS, name="a", ack_wait=1.0)
    await worker.publish_message(Job(1), TOPIC)
    await eventually(lambda: len(seen.handled) == 1)
    await worker.unregister("jobs", keep_subscriptions=True)
    await worker.publish_message(Job(2), TOPIC)
    assert not worker.running.incoming.durable.settlements
    other = await make(seen, JOBS, name="b", ack_wait=1.0)
    await eventually(lambda: ("b", 2) in seen.handled)
    await all_settled(other)


# -- load ------------------------------------------------------------------------------------------------------------


async def test_a_slow_type_neither_loses_events_nor_holds_up_another(make: Make) -> None:
    slow, fast = Seen(), Seen()
    fast.free.set()
    settings = {"max_pending_bytes": 100_000}
    worker = await make(slow, {"slow": ["work.jobs"]}, name="slow", max_running={"slow": 1}, **settings)
    await natsrt.register(worker, Works, "fast", lambda: Works(fast, "fast"))
    await worker.add_subscription(TypePrefixSubscription("work.", "fast"))
    number = 300
    await worker.publish_message(Job(0, "wait"), TOPIC)
    await asyncio.gather(*(worker.publish_message(Job(n), TOPIC) for n in range(1, number)))
    await eventually(lambda: len(fast.handled) == number, 15.0)
    assert len(slow.begun) == 1
    assert worker.health().dropped_events == 0
    slow.free.set()
    await eventually(lambda: len(slow.handled) == number, 15.0)
    await all_settled(worker, "slow")
    await all_settled(worker, "fast")
    assert slow.numbers == fast.numbers == Counter(range(number))


async def test_events_of_durable_topics_are_handled_while_the_intake_is_full(make: Make) -> None:
    busy, seen = Seen(), Seen()
    worker = await make(busy, {"busy": ["plain"]}, max_running={"busy": 1}, max_pending_bytes=20_000)
    await natsrt.register(worker, Works, "jobs", lambda: Works(seen, "w"))
    await worker.add_subscription(TypeSubscription("work.jobs", "jobs"))
    for number in range(100):
        await worker.publish_message(Job(number, "wait"), TopicId("plain", "default"))
    await eventually(lambda: worker.health().dropped_events > 0)
    for number in range(10):
        await worker.publish_message(Job(number), TOPIC)
    await eventually(lambda: len(seen.handled) == 10)
    await all_settled(worker)
    assert worker.health().redelivered == 0
    busy.free.set()


async def test_a_type_with_few_places_holds_few_events(make: Make) -> None:
    slow = Seen()
    worker = await make(slow, JOBS, max_running={"jobs": 1})
    await asyncio.gather(*(worker.publish_message(Job(n, "wait"), TOPIC) for n in range(20)))
    await eventually(lambda: len(slow.begun) == 1)
    assert (await consumer(worker)).num_ack_pending <= 2
    other = Seen()
    other.free.set()
    await make(other, JOBS, name="other")
    await eventually(lambda: len(other.handled) >= 18, 10.0)
    slow.free.set()
    await all_settled(worker)
    assert slow.numbers + other.numbers == Counter(range(20))


# -- what has no durable events ----------------------------------------------------------------------------------------


async def test_an_instance_cannot_subscribe_to_a_durable_topic(make: Make) -> None:
    worker = await make()
    await worker.register_agent_instance(Works(Seen(), "i"), AgentId("one", "default"))
    with pytest.raises(ConfigurationError, match="register a factory"):
        await worker.add_subscription(TypeSubscription("work.jobs", "one"))


# -- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wide", "narrow", "covered"),
    [
        ("topic.a.*", "topic.a.*", True),
        ("topic.*.>", "topic.a.*", True),
        ("topic.a.*.>", "topic.a.b.*", True),
        ("topic.a.*.>", "topic.a.b.*.>", True),
        ("topic.a.*.>", "topic.a.*", False),
        ("topic.a.*", "topic.a.*.>", False),
        ("topic.a.*", "topic.a.b.*", False),
        ("topic.a.*", "topic.b.*", False),
        ("topic.a.b.*", "topic.a.*.>", False),
    ],
)
def test_a_filter_covers_another(wide: str, narrow: str, covered: bool) -> None:
    assert covers(wide, narrow) is covered
    both = common(wide, narrow)
    assert both == common(narrow, wide)
    assert (both == narrow) is covered


def test_filters_that_others_cover_are_left_out() -> None:
    assert widest(["topic.a.b.*", "topic.c.*", "topic.a.*.>", "topic.a.c.*.>"]) == ("topic.a.*.>", "topic.c.*")


async def test_a_subscription_that_covers_a_former_one_gets_all_events(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, {"jobs": ["work.other", "work.more"]})
    await worker.publish_message(Job(1), TopicId("work.other", "default"))
    await worker.add_subscription(TypePrefixSubscription("work.", "jobs"))
    for number in range(2, 100):
        await worker.publish_message(Job(number), TOPIC)
    await eventually(lambda: len(seen.handled) == 99)
    assert seen.numbers == Counter(range(1, 100))
    await all_settled(worker)


@pytest.mark.slow  # what failed is tried again after 5 s
async def test_events_that_are_stored_before_a_worker_could_pull_are_not_skipped(
    make: Make, server: EmbeddedServer, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker sees that topics are durable a moment before their stream is made."""
    seen = Seen()
    worker = await make(seen, JOBS, durable=[])
    stream = f"{namespace}_natsrt_events"
    await worker.running.registry.declare([DurableEntry.of(stream, natsrt.DurableTopics("work."))])
    await eventually(lambda: "it is tried again" in caplog.text, 20)
    publisher = await make(durable=["work."])
    for number in range(10):
        await publisher.publish_message(Job(number), TOPIC)
    await eventually(lambda: len(seen.handled) == 10, 20)
    assert seen.numbers == Counter(range(10))
