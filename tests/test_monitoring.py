"""The ``nats`` command line tool sees workers, agents and the registry, and takes part in calls and events."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
    event,
    rpc,
)

import natsrt
from natsrt import CallTimeout, NatsAgentRuntime, register
from natsrt.embedded import EmbeddedServer
from natsrt.wire.subjects import encode_token
from tests.support.processes import Process, Processes, eventually

pytestmark = pytest.mark.slow


@dataclass
class Text:
    text: str


@dataclass
class Shout:
    text: str


@dataclass
class Number:
    number: int


@dataclass
class Headline:
    headline: str


class Upper(RoutedAgent):
    """Answers texts in upper case."""

    def __init__(self) -> None:
        super().__init__("upper")

    @rpc
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        return Text(message.text.upper())

    @rpc
    async def on_number(self, message: Number, ctx: MessageContext) -> str:
        if message.number < 0:
            raise ValueError(f"{self.id.key} takes no number below 0")
        return f"{self.id.key}: {message.number}"


class Twofold(RoutedAgent):
    """Handles two types of the same fields."""

    def __init__(self) -> None:
        super().__init__("twofold")

    @rpc
    async def on_text(self, message: Text, ctx: MessageContext) -> str:
        return "text"

    @rpc
    async def on_shout(self, message: Shout, ctx: MessageContext) -> str:
        return "shout"


class Reader(RoutedAgent):
    """Remembers headlines."""

    def __init__(self, read: list[tuple[str, Headline, TopicId | None]]) -> None:
        super().__init__("reader")
        self._read = read

    @event
    async def on_headline(self, message: Headline, ctx: MessageContext) -> None:
        self._read.append((self.id.key, message, ctx.topic_id))


Nats = Callable[..., Awaitable[str]]


@pytest.fixture
def nats(own_server: EmbeddedServer, nats_cli: Path) -> Nats:
    """Runs the command and returns what it writes, standard error included."""

    async def run(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            str(nats_cli),
            "--server",
            own_server.url,
            "--no-context",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        text = output.decode()
        assert process.returncode == 0, text
        return text

    return run


@pytest.fixture
def start(own_server: EmbeddedServer, nats_cli: Path, processes: Processes) -> Callable[..., Process]:
    """Starts the command and lets it run."""

    def start(*arguments: str) -> Process:
        return processes.start([nats_cli, "--server", own_server.url, "--no-context", *arguments], name="nats")

    return start


@pytest.fixture
async def read() -> list[tuple[str, Headline, TopicId | None]]:
    return []


@pytest.fixture
async def worker(own_server: EmbeddedServer, read: list[Any]) -> AsyncIterator[NatsAgentRuntime]:
    runtime = NatsAgentRuntime(own_server.url, name="alpha")
    await register(runtime, Upper, "upper", Upper)
    await register(runtime, Twofold, "two.fold", Twofold)
    await register(runtime, Reader, "reader", lambda: Reader(read))
    await runtime.add_subscription(TypeSubscription("news.tech", "reader"))
    await runtime.add_subscription(TypePrefixSubscription("sport.", "reader"))
    async with runtime:
        yield runtime


@pytest.fixture
async def second(own_server: EmbeddedServer) -> AsyncIterator[NatsAgentRuntime]:
    runtime = NatsAgentRuntime(own_server.url, name="beta")
    await register(runtime, Upper, "upper", Upper)
    async with runtime:
        yield runtime


async def test_the_service_list_shows_every_worker(
    worker: NatsAgentRuntime, second: NatsAgentRuntime, nats: Nats
) -> None:
    table = await nats("service", "ls")
    for runtime in (worker, second):
        assert str(runtime.worker_id) in table
    found = json.loads(await nats("service", "ls", "--json"))
    assert {(entry["name"], entry["id"]) for entry in found} == {
        ("alpha", worker.worker_id),
        ("beta", second.worker_id),
    }


async def test_ping_is_answered_by_every_worker(worker: NatsAgentRuntime, second: NatsAgentRuntime, nats: Nats) -> None:
    answers = await nats("--timeout", "2s", "service", "ping")
    for runtime in (worker, second):
        assert str(runtime.worker_id) in answers
    assert str(second.worker_id) not in await nats("--timeout", "2s", "service", "ping", "alpha")


async def test_info_shows_the_agent_types_of_a_worker(worker: NatsAgentRuntime, nats: Nats) -> None:
    shown = await nats("service", "info", "alpha")
    for text in (str(worker.worker_id), "upper", "agent.two=2Efold", "two.fold", "reader", "Headline"):
        assert text in shown
    info = json.loads(await nats("service", "info", "alpha", str(worker.worker_id), "--json"))["info"]
    endpoints = {endpoint["metadata"]["agent_type"]: endpoint for endpoint in info["endpoints"]}
    assert endpoints.keys() == {"upper", "two.fold", "reader"}
    assert endpoints["upper"]["subject"] == "agent.upper"
    assert endpoints["upper"]["queue_group"] == "upper"
    assert endpoints["upper"]["metadata"]["handles"] == "Number, Text"


async def test_stats_show_requests_errors_and_processing_times(worker: NatsAgentRuntime, nats: Nats) -> None:
    for number in range(5):
        assert await worker.send_message(Number(number), AgentId("upper", "k")) == f"k: {number}"
    for _ in range(2):
        with pytest.raises(ValueError, match="k takes no number below 0"):
            await worker.send_message(Number(-1), AgentId("upper", "k"))
    await nats("pub", "topic.news.tech.server", '{"headline":"42"}')
    await nats("pub", "topic.news.tech.server", '{"headline":42}')

    async def stats() -> dict[str, dict[str, Any]]:
        [answer] = json.loads(await nats("service", "stats", "alpha", str(worker.worker_id), "--json"))
        return {endpoint["name"]: endpoint for endpoint in answer["endpoints"]}

    async def counted() -> bool:
        return (await stats())["reader"]["num_requests"] == 2

    await eventually(counted, 20)
    shown = await stats()
    assert (shown["upper"]["num_requests"], shown["upper"]["num_errors"]) == (7, 2)
    assert shown["upper"]["last_error"] == "ValueError"
    assert shown["upper"]["processing_time"] >= shown["upper"]["average_processing_time"] > 0
    assert (shown["reader"]["num_requests"], shown["reader"]["num_errors"]) == (2, 1)
    assert (shown["two_fold"]["num_requests"], shown["two_fold"]["processing_time"]) == (0, 0)
    table = await nats("service", "stats", "alpha")
    assert str(worker.worker_id) in table
    assert re.search(r"7\D", table)


async def test_a_plain_request_gets_a_plain_reply(worker: NatsAgentRuntime, nats: Nats) -> None:
    assert (await nats("req", "--raw", "agent.upper", '{"text":"hi"}')).strip() == '{"text":"HI"}'


async def test_headers_name_the_key_and_the_message_type(worker: NatsAgentRuntime, nats: Nats) -> None:
    answer = await nats("req", "--raw", "-H", "Natsrt-Key:one two", "agent.upper", '{"number":7}')
    assert json.loads(answer) == "one two: 7"
    for name in ("Text", "Shout"):
        answer = await nats("req", "--raw", "-H", f"Natsrt-Type:{name}", "agent.two=2Efold", '{"text":"hi"}')
        assert json.loads(answer) == name.lower()


async def test_an_error_for_a_plain_caller_has_the_headers_of_the_service_protocol(
    worker: NatsAgentRuntime, nats: Nats
) -> None:
    shown = await nats("req", "agent.upper", '{"number":-1}')
    assert "Nats-Service-Error: default takes no number below 0" in shown
    assert "Nats-Service-Error-Code: 500" in shown
    failure = json.loads(await nats("req", "--raw", "agent.upper", '{"number":-1}'))
    assert failure["type"] == "builtins.ValueError"
    assert failure["message"] == "default takes no number below 0"
    assert failure["code"] == 500


async def test_a_body_that_fits_several_types_is_answered_with_their_names(
    worker: NatsAgentRuntime, nats: Nats
) -> None:
    failure = json.loads(await nats("req", "--raw", "agent.two=2Efold", '{"text":"hi"}'))
    assert failure["code"] == 400
    for text in ("Text", "Shout", "Natsrt-Type"):
        assert text in failure["message"]
    unfit = json.loads(await nats("req", "--raw", "agent.upper", '{"unheard":"of"}'))
    assert "Number" in unfit["message"] and "Text" in unfit["message"]


async def test_without_inference_the_header_is_needed(own_server: EmbeddedServer, nats: Nats) -> None:
    runtime = NatsAgentRuntime(own_server.url, infer_types=False)
    await register(runtime, Upper, "upper", Upper)
    async with runtime:
        failure = json.loads(await nats("req", "--raw", "agent.upper", '{"text":"hi"}'))
        assert failure["code"] == 400
        for text in ("Natsrt-Type", "Number", "Text"):
            assert text in failure["message"]
        answer = await nats("req", "--raw", "-H", "Natsrt-Type:Text", "agent.upper", '{"text":"hi"}')
        assert answer.strip() == '{"text":"HI"}'


async def test_a_plain_publish_is_an_event(worker: NatsAgentRuntime, nats: Nats, read: list[Any]) -> None:
    await nats("pub", "topic.news.tech.server", '{"headline":"42"}')
    await nats("pub", "-H", "Natsrt-Type:Headline", "topic.sport.ball.s", '{"headline":"43"}')
    await eventually(lambda: len(read) == 2)
    assert read == [
        ("server", Headline("42"), TopicId("news.tech", "server")),
        ("s", Headline("43"), TopicId("sport.ball", "s")),
    ]


async def test_a_subscriber_sees_events(worker: NatsAgentRuntime, start: Callable[..., Process]) -> None:
    watcher = start("sub", "topic.>")
    await watcher.wait_for_line("Subscribing on topic.>")

    async def seen() -> bool:
        await worker.publish_message(Headline("seen"), TopicId("news.tech", "server"))
        return '"data":{"headline":"seen"}' in watcher.stdout

    await eventually(seen)
    assert "topic.news.tech.server" in watcher.stdout
    [body] = re.findall(r"^\{.*\}$", watcher.stdout, re.MULTILINE)[:1]
    assert json.loads(body)["type"] == "natsrt.event"


async def test_the_registry_is_a_bucket_that_can_be_listed_read_and_watched(
    worker: NatsAgentRuntime, nats: Nats, start: Callable[..., Process], own_server: EmbeddedServer
) -> None:
    assert "natsrt_registry" in await nats("kv", "ls")
    keys = (await nats("kv", "ls", "natsrt_registry")).split()
    assert f"r.worker.{worker.worker_id}" in keys
    assert f"r.type.upper.{worker.worker_id}" in keys
    assert "r.known.upper" in keys
    entry = json.loads(await nats("kv", "get", "--raw", "natsrt_registry", f"r.type.two=2Efold.{worker.worker_id}"))
    assert entry["agent_type"] == "two.fold"
    assert entry["handles"] == ["Shout", "Text"]
    watcher = start("kv", "watch", "natsrt_registry")
    await watcher.wait_for_line(f"r.worker.{worker.worker_id}")
    late = NatsAgentRuntime(own_server.url, name="late")
    await register(late, Upper, "latecomer", Upper)
    async with late:
        await watcher.wait_for_line(f"r.type.latecomer.{late.worker_id}")
        joined = f"r.worker.{late.worker_id}"
    await watcher.wait_for_line(re.compile(rf"DEL.*{joined}"))


async def test_nats_reply_answers_a_natsrt_caller(own_server: EmbeddedServer, start: Callable[..., Process]) -> None:
    responder = start("reply", "agent.shout", "HELLO {{Count}}")
    await responder.wait_for_line("Listening on")
    async with NatsAgentRuntime(own_server.url) as caller:
        assert await caller.send_message(Text("hi"), AgentId("shout", "k")) == "HELLO 0"
        assert await caller.send_message("hi", AgentId("shout", "k")) == "HELLO 1"


async def test_a_json_responder_is_decoded_to_values_or_to_the_reply_type(
    own_server: EmbeddedServer, start: Callable[..., Process]
) -> None:
    responder = start("reply", "agent.shout", '{"text":"HELLO"}')
    await responder.wait_for_line("Listening on")
    async with NatsAgentRuntime(own_server.url) as caller:
        agent = AgentId("shout", "k")
        assert await caller.send_message(Text("hi"), agent) == {"text": "HELLO"}
        assert await caller.send_message(Text("hi"), agent, reply_type=Shout) == Shout("HELLO")
        assert await caller.send_message(Text("hi"), agent, reply_type=dict) == {"text": "HELLO"}
        with pytest.raises(ValueError, match="Number"):
            await caller.send_message(Text("hi"), agent, reply_type=Number)


async def test_a_command_behind_nats_reply_may_take_its_time(
    own_server: EmbeddedServer, start: Callable[..., Process]
) -> None:
    responder = start("reply", "agent.shout", "--command", "sh -c 'sleep 1; echo slow'")
    await responder.wait_for_line("Listening on")
    async with NatsAgentRuntime(own_server.url, plain_timeout=20) as caller:
        assert "slow" in await caller.send_message(Text("hi"), AgentId("shout", "k"))
    async with NatsAgentRuntime(own_server.url, plain_timeout=0.5) as caller:
        with pytest.raises(CallTimeout, match="plain_timeout"):
            await caller.send_message(Text("hi"), AgentId("shout", "k"))


async def test_requests_are_shared_by_two_workers_and_counted_at_both(
    worker: NatsAgentRuntime, second: NatsAgentRuntime, nats: Nats
) -> None:
    await nats("req", "--count", "60", "agent.upper", '{"text":"hi"}')
    counts = {}
    for runtime, name in ((worker, "alpha"), (second, "beta")):
        [answer] = json.loads(await nats("service", "stats", name, str(runtime.worker_id), "--json"))
        [upper] = [endpoint for endpoint in answer["endpoints"] if endpoint["name"] == "upper"]
        counts[name] = upper["num_requests"]
    assert sum(counts.values()) == 60
    assert all(counts.values())


# -- durable topics --------------------------------------------------------------------------------------------------


@natsrt.keyed
class Books(RoutedAgent):
    """Keeps nothing."""

    def __init__(self) -> None:
        super().__init__("books")

    @event
    async def on_headline(self, message: Headline, ctx: MessageContext) -> None:
        if message.headline == "poison":
            raise natsrt.Reject("no such headline")


@pytest.fixture
async def durable(own_server: EmbeddedServer) -> AsyncIterator[NatsAgentRuntime]:
    """A system with all that durable topics have: plain and keyed types, two streams, dead letters and reminders."""
    topics = ["news.", natsrt.DurableTopics("audit.", name="short", max_age=3600)]
    runtime = NatsAgentRuntime(own_server.url, durable=topics, max_deliver=1)
    await register(runtime, Reader, "re.ader", lambda: Reader([]))
    await register(runtime, Books, "books", Books)
    await runtime.add_subscription(TypePrefixSubscription("news.", "re.ader"))
    await runtime.add_subscription(TypeSubscription("news.tech", "books"))
    await runtime.add_subscription(TypeSubscription("audit.log", "books"))
    async with runtime:
        yield runtime


async def test_streams_and_consumers_say_what_they_are(durable: NatsAgentRuntime, nats: Nats) -> None:
    await durable.publish_message(Headline("42"), TopicId("news.tech", "server"))
    await durable.publish_message(Headline("poison"), TopicId("news.tech", "server"))
    await durable.publish_message(Headline("later"), TopicId("news.tech", "server"), delay=3600)
    await durable.remind(AgentId("books", "server"), "wake", Headline("now"), every=3600)
    await eventually(lambda: durable.health().dead_letters == 1, 15.0)
    listed = await nats("stream", "ls")
    for description in (
        "natsrt: events on durable topics ",
        "natsrt: events on durable topics named short",
        "natsrt: reminders of agents",
        "natsrt: dead letters, events that could not be handled",
        "natsrt: attempts to handle events that were delivered more than once",
    ):
        assert description in listed
    rows = {row[0]: row for row in _rows(await nats("stream", "report"))}
    assert {"natsrt_events", "natsrt_events_short", "natsrt_events_reminders", "natsrt_dead"} <= rows.keys()
    title, *values = [row for row in rows.values() if row[0] in ("Stream", "natsrt_events")]
    events = dict(zip(title, values[0], strict=True))
    assert (events["Consumers"], events["Messages"]) == ("2", "3"), "two events, and the schedule of a third one"
    info = await nats("stream", "info", "natsrt_events")
    assert "topic.news.*.>" in info and "natsrt.later.natsrt_events.>" in info and "30d0h0m0s" in info


async def test_a_report_of_consumers_shows_how_far_each_type_is(durable: NatsAgentRuntime, nats: Nats) -> None:
    for number in range(3):
        await durable.publish_message(Headline(str(number)), TopicId("news.tech", "server"))

    async def reported() -> dict[str, dict[str, str]]:
        title, *rows = [row for row in _rows(await nats("consumer", "report", "natsrt_events")) if len(row) > 5]
        return {row[0]: dict(zip(title, row, strict=True)) for row in rows}

    async def all_handled() -> bool:
        return all(row["Ack Floor"] == "3" for row in (await reported()).values())

    await eventually(all_handled, 15.0)
    report = await reported()
    assert report.keys() == {"books", encode_token("re.ader")}
    assert all((row["Ack Pending"], row["Unprocessed"]) == ("0", "0") for row in report.values())
    assert "natsrt: events for agent type re.ader" in await nats(
        "consumer", "info", "natsrt_events", encode_token("re.ader")
    )
    keyed = await nats("consumer", "info", "natsrt_events", "books")
    assert "natsrt: events for keyed agent type books" in keyed and "Pinned Client" in keyed and "feeder" in keyed
    described = json.loads(await nats("consumer", "info", "natsrt_events", encode_token("re.ader"), "--json"))
    assert described["config"]["metadata"]["natsrt_agent_type"] == "re.ader"


async def test_advisories_name_what_became_a_dead_letter_and_why(
    durable: NatsAgentRuntime, start: Callable[..., Process], nats: Nats
) -> None:
    watching = start("events", "--js-advisory")
    await watching.wait_for_line(re.compile("Listening for Advisories"))
    numbers = itertools.count()

    async def one_is_seen() -> bool:  # the command listens some time after it says so
        await durable.publish_message(Headline("poison"), TopicId("news.tech", f"s{next(numbers)}"))
        return "Delivery Terminated" in watching.stdout and "dead letter: no such headline" in watching.stdout

    await eventually(one_is_seen, 15.0)
    assert "natsrt_events > books" in watching.stdout


def _rows(table: str) -> list[list[str]]:
    """The rows of a table that the command prints."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if "│" in line]
