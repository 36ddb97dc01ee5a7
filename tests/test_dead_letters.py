"""Dead letters: listed, given to their agent types again, removed and exported, in Python and on the command line."""

from __future__ import annotations

import asyncio
import datetime
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from autogen_core import MessageContext, RoutedAgent, TopicId, TypePrefixSubscription, event

import natsrt
from natsrt import DeadLetter, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import EventNotStored
from tests.support.cli import Ended
from tests.support.cli import natsrt as run
from tests.support.processes import Processes, eventually

TOPIC = TopicId("work.jobs", "shop")


@dataclass
class Job:
    number: int


@dataclass
class Desk:
    """What the workers of a test do and have done."""

    broken: bool = True
    handled: list[tuple[str, int, str]] = field(default_factory=list)
    """Agent type, number and message id of each job."""

    @property
    def numbers(self) -> Counter[int]:
        return Counter(number for _, number, _ in self.handled)


class Works(RoutedAgent):
    def __init__(self, desk: Desk) -> None:
        super().__init__("works")
        self._desk = desk

    @event
    async def on_job(self, message: Job, ctx: MessageContext) -> None:
        if self._desk.broken:
            raise natsrt.Reject("no such job" if message.number % 2 else "out of stock")
        self._desk.handled.append((self.id.type, message.number, ctx.message_id))


@dataclass
class Place:
    """A namespace of the shared server, with its command line."""

    server: EmbeddedServer
    namespace: str
    stack: AsyncExitStack

    async def worker(self, desk: Desk, *types: str, **settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.server.url, namespace=self.namespace, durable=["work."], **settings)
        for agent_type in types:
            await natsrt.register(runtime, Works, agent_type, lambda: Works(desk))
            await runtime.add_subscription(TypePrefixSubscription("work.", agent_type))
        return await self.stack.enter_async_context(runtime)

    async def run(self, *arguments: str, stdin: str | None = None) -> Ended:
        return await run(*arguments, "--server", self.server.url, "--namespace", self.namespace, stdin=stdin)

    async def ids(self, *arguments: str) -> list[int]:
        return [row["id"] for row in (await self.run("dlq", "ls", "--json", *arguments)).json]


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(server, namespace, stack)


async def letters(runtime: NatsAgentRuntime, agent_type: str | None = None) -> list[DeadLetter]:
    return [letter async for letter in runtime.dead_letters(agent_type)]


async def bury(runtime: NatsAgentRuntime, numbers: range, types: int = 1) -> None:
    """Publish jobs that become dead letters of each type, and wait until they are."""
    before = len(await letters(runtime))
    for number in numbers:
        await runtime.publish_message(Job(number), TOPIC, message_id=f"id-{number}")

    async def all_there() -> bool:
        return len(await letters(runtime)) == before + len(numbers) * types

    await eventually(all_there, 30.0)


# -- in Python -------------------------------------------------------------------------------------------------------


async def test_a_dead_letter_tells_what_happened(place: Place) -> None:
    desk = Desk()
    runtime = await place.worker(desk, "jobs")
    await bury(runtime, range(1, 2))
    [letter] = await letters(runtime)
    assert (letter.agent_type, letter.topic, letter.message_id) == ("jobs", TOPIC, "id-1")
    assert (letter.reason, letter.attempts, letter.event_sequence) == ("no such job", 1, 1)
    assert letter.error_type.endswith("Reject")
    assert "no such job" in letter.error
    assert letter.traceback is not None
    assert "on_job" in letter.traceback
    assert letter.stream == f"{place.namespace}_natsrt_events"
    assert letter.data is not None
    assert b'"number":1' in letter.data
    assert time.time() - 60 < letter.stored_at <= letter.failed_at + 0.01 <= letter.kept_at + 1


async def test_a_redriven_event_is_handled_with_its_message_id_and_the_dead_letter_is_gone(place: Place) -> None:
    desk = Desk()
    runtime = await place.worker(desk, "jobs", "other")
    await bury(runtime, range(1), types=2)
    desk.broken = False
    [letter] = await letters(runtime, "jobs")
    await runtime.redrive(letter)
    await eventually(lambda: desk.handled == [("jobs", 0, "id-0")])
    assert [letter.agent_type for letter in await letters(runtime)] == ["other"]


async def test_an_event_that_fails_again_becomes_a_dead_letter_again(place: Place) -> None:
    desk = Desk()
    runtime = await place.worker(desk, "jobs")
    await bury(runtime, range(1))
    [first] = await letters(runtime)
    await runtime.redrive(first)

    async def another() -> bool:
        return [letter.sequence for letter in await letters(runtime)] == [first.sequence + 1]

    await eventually(another)
    desk.broken = False
    [second] = await letters(runtime)
    assert (second.topic, second.message_id, second.data) == (TOPIC, "id-0", first.data)
    await runtime.redrive(second)
    await eventually(lambda: desk.handled == [("jobs", 0, "id-0")])


async def test_a_redrive_that_was_interrupted_is_handled_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    runtime = await place.worker(desk, "jobs")
    await bury(runtime, range(1))
    [letter] = await letters(runtime)
    desk.broken = False
    box = runtime.running.dead_letters

    async def killed(letter: DeadLetter) -> bool:
        raise ConnectionAbortedError("killed between storing the event and removing the dead letter")

    with monkeypatch.context() as patch:
        patch.setattr(box, "discard", killed)
        with pytest.raises(ConnectionAbortedError):
            await runtime.redrive(letter)
    await eventually(lambda: len(desk.handled) == 1)
    [still] = await letters(runtime)
    await runtime.redrive(still)
    assert await letters(runtime) == []
    await runtime.publish_message(Job(7), TOPIC)  # what came before it has been handled when it is
    await eventually(lambda: 7 in desk.numbers)
    assert desk.numbers == Counter([0, 7])


async def test_a_dead_letter_stays_if_its_event_cannot_be_stored(place: Place) -> None:
    runtime = await place.worker(Desk(), "jobs", publish_timeout=1.0)
    await bury(runtime, range(1))
    [letter] = await letters(runtime)
    js, stream = runtime.running.connection.jetstream, f"{place.namespace}_natsrt_events"
    config = (await js.stream_info(stream)).config
    topics = [subject for subject in config.subjects or [] if ".topic." in subject]
    await js.update_stream(config.evolve(subjects=topics))
    with pytest.raises(EventNotStored):
        await asyncio.gather(runtime.redrive(letter))
    assert [one.sequence for one in await letters(runtime)] == [letter.sequence]


async def test_a_discarded_dead_letter_is_gone(place: Place) -> None:
    runtime = await place.worker(Desk(), "jobs")
    await bury(runtime, range(2))
    [first, second] = await letters(runtime)
    assert await runtime.discard(first)
    assert not await runtime.discard(first)
    assert await letters(runtime) == [second]


async def test_dead_letters_of_one_type_and_of_some_time_are_listed_alone(place: Place) -> None:
    runtime = await place.worker(Desk(), "jobs", "other")
    await bury(runtime, range(2), types=2)
    assert {letter.agent_type for letter in await letters(runtime, "other")} == {"other"}
    assert len(await letters(runtime, "other")) == 2
    last = (await letters(runtime))[-1]
    since = datetime.datetime.fromtimestamp(last.kept_at, datetime.UTC)
    assert [letter.sequence async for letter in runtime.dead_letters(since=since)][-1] == last.sequence
    future = since + datetime.timedelta(hours=1)
    assert [letter async for letter in runtime.dead_letters(since=future)] == []
    first = datetime.datetime(1, 1, 1)  # Python cannot convert it to seconds
    assert len([letter async for letter in runtime.dead_letters(since=first)]) == len(await letters(runtime))


async def bury_large(place: Place, runtime: NatsAgentRuntime) -> DeadLetter:
    """Have a dead letter without the body of its event, because both do not fit into one message."""
    room_for_headers = 600  # less than those of a dead letter, and more than those of an event that is stored again
    start = b'{"number":4,"padding":"'
    padding = runtime.running.connection.max_payload - len(start) - room_for_headers
    subject = runtime.running.network.subjects.topic(TOPIC.type, TOPIC.source)
    body = start + b"x" * padding + b'"}'
    await runtime.running.connection.jetstream.publish(subject, body, headers={"Natsrt-Type": "Job"})

    async def buried() -> bool:
        return len(await letters(runtime)) == 1

    await eventually(buried)
    [letter] = await letters(runtime)
    assert letter.data is None
    assert '"size_bytes": null' in (await place.run("dlq", "show", str(letter.sequence), "--json")).stdout
    return letter


async def test_a_body_that_did_not_fit_comes_from_the_events_stream(place: Place) -> None:
    desk = Desk()
    runtime = await place.worker(desk, "jobs")
    letter = await bury_large(place, runtime)
    desk.broken = False
    await runtime.redrive(letter)
    await eventually(lambda: desk.numbers == Counter([4]))
    assert await letters(runtime) == []


async def test_a_body_that_did_not_fit_is_not_taken_from_another_event(place: Place) -> None:
    runtime = await place.worker(Desk(broken=True), "jobs")
    letter = await bury_large(place, runtime)
    js = runtime.running.connection.jetstream
    await js.delete_msg(letter.stream, letter.event_sequence)
    with pytest.raises(EventNotStored, match="event 1 is gone"):
        await runtime.redrive(letter)
    config = (await js.stream_info(letter.stream)).config
    await js.delete_stream(letter.stream)
    await js.add_stream(config)
    subject = runtime.running.network.subjects.topic(TOPIC.type, TOPIC.source)
    await js.publish(subject, b'{"number":5}', headers={"Natsrt-Type": "Job"})
    with pytest.raises(EventNotStored, match="event 1 is gone"):
        await runtime.redrive(letter)
    assert letter in await letters(runtime)


async def test_health_has_the_number_of_dead_letters(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsrt.hosting.durable._MEASURED_EVERY", 0.05)
    runtime = await place.worker(Desk(), "jobs")
    await bury(runtime, range(3))
    await eventually(lambda: runtime.health().dead_letters_kept == 3)
    caller = await place.stack.enter_async_context(NatsAgentRuntime(place.server.url, namespace=place.namespace))
    assert caller.health().dead_letters_kept is None


# -- on the command line ---------------------------------------------------------------------------------------------


async def test_dlq_ls_filters_by_type_reason_and_age(place: Place) -> None:
    runtime = await place.worker(Desk(), "jobs", "other")
    assert (await place.run("dlq", "ls")).stderr.endswith("there are no dead letters\n")
    await bury(runtime, range(4), types=2)
    found = await letters(runtime)
    assert await place.ids() == [letter.sequence for letter in found]
    assert await place.ids("--type", "other") == [one.sequence for one in found if one.agent_type == "other"]
    assert await place.ids("--reason", "OUT OF STOCK") == [one.sequence for one in found if "stock" in one.reason]
    assert await place.ids("--older-than", "1h") == []
    assert await place.ids("--newer-than", "1h") == [letter.sequence for letter in found]
    table = (await place.run("dlq", "ls")).stdout
    assert "work.jobs/shop" in table
    assert "no such job" in table
    counts = (await place.run("dlq", "ls", "--count", "--json")).json
    assert [(row["agent_type"], row["dead_letters"]) for row in counts] == [("jobs", 4), ("other", 4)]


async def test_dlq_show_has_the_traceback_and_the_event(place: Place) -> None:
    runtime = await place.worker(Desk(), "jobs")
    await bury(runtime, range(1, 2))
    [letter] = await letters(runtime)
    shown = await place.run("dlq", "show", str(letter.sequence))
    assert "Traceback" in shown.stdout
    assert '"number":1' in shown.stdout
    missing = await place.run("dlq", "show", "99")
    assert (missing.code, missing.stderr) == (4, "natsrt: there is no dead letter 99\n")


async def test_dlq_redrive_and_rm_want_to_know_which(place: Place) -> None:
    runtime = await place.worker(Desk(), "jobs")
    await bury(runtime, range(3))
    for command in ("redrive", "rm"):
        assert (await place.run("dlq", command)).code == 2
        assert (await place.run("dlq", command, "1", "--all")).code == 2
    assert (await place.run("dlq", "rm", "--all", stdin="n\n")).code != 0
    assert await place.ids() == [1, 2, 3]
    assert (await place.run("dlq", "rm", "2")).stderr == "removed: 1\n"
    assert await place.ids() == [1, 3]
    assert (await place.run("dlq", "rm", "--reason", "stock", "--yes")).stderr == "removed: 2\n"
    assert await place.ids() == []


@pytest.mark.slow  # a thousand events are handled twice
async def test_a_thousand_dead_letters_are_redriven_once_each(place: Place) -> None:
    desk = Desk()
    runtime = await place.worker(desk, "jobs")
    await asyncio.gather(*(runtime.publish_message(Job(n), TOPIC, message_id=f"id-{n}") for n in range(1_000)))

    async def buried() -> bool:
        return sum((await runtime.running.dead_letters.count()).values()) == 1_000

    await eventually(buried, 60.0)
    desk.broken = False
    ended = await place.run("dlq", "redrive", "--all")
    assert (ended.code, ended.stderr.splitlines()[-1]) == (0, "redriven: 1,000")
    await eventually(lambda: len(desk.handled) >= 1_000, 60.0)
    assert desk.numbers == Counter(range(1_000))
    assert {f"id-{number}" == message_id for _, number, message_id in desk.handled} == {True}
    assert await place.ids() == []


@pytest.mark.slow  # hundreds of events are handled twice, and a command is killed
async def test_a_redrive_that_is_killed_and_run_again_loses_and_repeats_nothing(
    place: Place, processes: Processes
) -> None:
    desk = Desk()
    runtime = await place.worker(desk, "jobs")
    await asyncio.gather(*(runtime.publish_message(Job(n), TOPIC, message_id=f"id-{n}") for n in range(600)))

    async def buried() -> bool:
        return sum((await runtime.running.dead_letters.count()).values()) == 600

    await eventually(buried, 60.0)
    desk.broken = False
    command = ["dlq", "redrive", "--all", "--server", place.server.url, "--namespace", place.namespace]
    interrupted = []
    for share in (1, 150, 300):
        killed = processes.natsrt(*command)
        await eventually(lambda share=share: len(desk.handled) >= share, 30.0)  # type: ignore[misc]
        killed.kill()
        interrupted.append(await killed.wait(10) == -signal.SIGKILL)
    assert any(interrupted) and len(await letters(runtime)) < 600
    assert (await place.run("dlq", "redrive", "--all")).code == 0
    await eventually(lambda: len(desk.numbers) == 600, 30.0)
    await runtime.publish_message(Job(1_000), TOPIC)
    await eventually(lambda: 1_000 in desk.numbers)
    assert desk.numbers == Counter([*range(600), 1_000])
    assert await letters(runtime) == []


async def test_exported_dead_letters_have_what_is_stored_and_stay(place: Place, tmp_path: Path) -> None:
    runtime = await place.worker(Desk(), "jobs")
    await bury(runtime, range(3))
    file = tmp_path / "dead.jsonl"
    ended = await place.run("dlq", "export", str(file))
    assert ended.stderr == "exported dead letters: 3\n"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = await letters(runtime)
    assert [(row["id"], row["traceback"]) for row in rows] == [(one.sequence, one.traceback) for one in found]
    assert [row["data"] for row in rows] == [json.loads(one.data or b"") for one in found]
    assert (await place.run("dlq", "export", "--reason", "nothing like that")).stdout == ""


async def test_doctor_tells_of_dead_letters_and_of_types_that_nobody_hosts(place: Place) -> None:
    runtime = await place.worker(Desk(), "jobs", "other")

    async def findings() -> dict[tuple[str, str], str]:
        found = (await place.run("doctor", "--json")).json
        return {(one["check"], one["level"]): one["text"] for one in found}

    assert (await findings())["dead letters", "ok"] == "none"
    await bury(runtime, range(2), types=2)
    await runtime.unregister("other", keep_subscriptions=True)
    await runtime.publish_message(Job(3), TOPIC)
    found = await findings()
    assert found["dead letters", "warning"].startswith(("4: ", "5: "))
    assert "other (1)" in found["durable topics", "warning"]
    await runtime.running.connection.jetstream.delete_stream(f"{place.namespace}_natsrt_events")
    assert "is gone" in (await findings())["durable topics", "problem"]


# -- where a new type begins -----------------------------------------------------------------------------------------

Start = Callable[[NatsAgentRuntime], Awaitable[Any]]


@pytest.mark.parametrize(
    ("start", "numbers"), [("now", [6]), ("all", [1, 2, 3, 4, 5, 6]), (4, [4, 5, 6]), ("time", [6]), ("then", [1])]
)
async def test_a_new_type_begins_where_start_from_says(place: Place, start: Any, numbers: list[int]) -> None:
    desk = Desk(broken=False)
    publisher = await place.worker(desk)
    for number in range(1, 6):
        await publisher.publish_message(Job(number), TOPIC)
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours={"time": 1}.get(start, -1))
    start_from = moment if start in ("time", "then") else start
    runtime = NatsAgentRuntime(place.server.url, namespace=place.namespace)
    await natsrt.register(runtime, Works, "jobs", lambda: Works(desk), start_from=start_from)
    await runtime.add_subscription(TypePrefixSubscription("work.", "jobs"))
    await place.stack.enter_async_context(runtime)
    await publisher.publish_message(Job(6), TOPIC)
    await eventually(lambda: 6 in desk.numbers)
    expected = [1, 2, 3, 4, 5, 6] if start == "then" else numbers
    await eventually(lambda: sorted(desk.numbers) == expected)


@pytest.mark.parametrize("start", ["new", 0, -1, True, None, 1.5])
async def test_a_start_that_is_none_is_refused(start: Any) -> None:
    with pytest.raises(ValueError, match="start_from must be 'now', 'all', a sequence"):
        await NatsAgentRuntime().register_factory("jobs", lambda: Works(Desk()), start_from=start)
