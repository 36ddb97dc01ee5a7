"""Each permission that natsrt generates for durable topics is necessary and sufficient.

See `tests.support.permission_matrix`. The matrix has the permissions that durable topics add.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from autogen_core import MessageContext, RoutedAgent, TopicId, TypeSubscription, event
from nats.aio.msg import Msg
from natsrt_cli.declaration import Declaration, User, parse
from natsrt_cli.grant import Grant
from natsrt_cli.permissions import grants
from natsrt_cli.recording import Recording

import natsrt
from natsrt import DurableTopics, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import ConfigurationError
from natsrt.jetstream.registry.entries import DurableEntry
from natsrt.jetstream.registry.view import View
from natsrt.wire.filters import covers
from natsrt.wire.subjects import Subjects
from tests.support.cli import natsrt as run
from tests.support.permission_matrix import Matrix, delete_streams, label
from tests.support.permission_scene import PASSWORD, Case, Scene, configuration
from tests.support.permission_tests import MatrixTests
from tests.support.processes import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]  # each permission is a case with workers of its own

TEXT = """
    durable = ["work."]
    [types.jobs]
    subscribes = ["work.jobs", "audit"]
    [types.idle]
    subscribes = ["news"]

    [users.mill]
    role = "worker"
    hosts = ["jobs"]
    publishes = ["work.*"]
    [users.press]
    role = "worker"
    hosts = ["idle"]
    [users.web]
    role = "publisher"
    publishes = ["work.*"]
    [users.ops]
    role = "operator"
    """
DECLARATION = parse(TEXT, "durable topics")
KEYED = parse(TEXT.replace("[types.jobs]", "[types.jobs]\n    keyed = true"), "durable topics of keyed agents")


def added(user: str, declaration: Declaration = DECLARATION) -> list[Grant]:
    """The permissions that durable topics add."""
    without = replace(declaration, durable=())
    usual = {label(grant) for grant in grants(without, without.users[user])}
    return [grant for grant in grants(declaration, declaration.users[user]) if label(grant) not in usual]


MATRIX = Matrix(DECLARATION, [(user, grant) for user in DECLARATION.users for grant in added(user)], "d")
needs = MATRIX.needs
TOPIC = TopicId("work.jobs", "one")
EVENTS, DEAD = "natsrt_events", "natsrt_dead"
API = "publish to $JS.API"


@dataclass
class Job:
    number: int
    what: str = ""


@dataclass
class Desk:
    handled: list[tuple[int, int]] = field(default_factory=list)
    """Number and attempt of each job."""
    begun: list[int] = field(default_factory=list)


class Works(RoutedAgent):
    def __init__(self, desk: Desk) -> None:
        super().__init__("works")
        self._desk = desk

    @event
    async def on_job(self, message: Job, ctx: MessageContext) -> None:
        self._desk.begun.append(message.number)
        if message.what == "reject":
            raise natsrt.Reject("no such job")
        if message.what == "wait":
            await asyncio.Event().wait()
        delivery = natsrt.current_delivery()
        assert delivery is not None
        if delivery.attempt == 1 and message.what in ("soon", "later"):
            raise natsrt.Retry(after=0.01 if message.what == "soon" else 3600)
        self._desk.handled.append((message.number, delivery.attempt))


async def worker(scene: Scene, desk: Desk, user: str = "mill", **settings: Any) -> NatsAgentRuntime:
    runtime = scene.unstarted(user, **{"durable": ["work."], **settings})
    await natsrt.register(runtime, Works, "jobs", lambda: Works(desk))
    await runtime.add_subscription(TypeSubscription("work.jobs", "jobs"))
    return await scene._stack.enter_async_context(runtime)


# -- a worker ----------------------------------------------------------------------------------------------------------


@needs(
    "mill",
    f"{API}.STREAM.NAMES",
    *(f"{API}.STREAM.{what}.{stream}" for what in ("INFO", "CREATE") for stream in (EVENTS, DEAD, "natsrt_attempts")),
    *(f"{API}.CONSUMER.{what}.{EVENTS}.jobs" for what in ("CREATE", "MSG.NEXT")),
    f"publish to $JS.ACK.{EVENTS}.jobs.>",
)
async def handles_events_in_an_empty_account(scene: Scene) -> None:
    desk = Desk()
    runtime = await worker(scene, desk)
    await runtime.publish_message(Job(1), TOPIC)
    await eventually(lambda: desk.handled == [(1, 1)], 5.0)
    plain = await scene.client("plain")
    stream = scene.case.declaration.namespace + f"_{EVENTS}"

    async def is_acknowledged() -> bool:
        answer = await plain.request(f"$JS.API.CONSUMER.INFO.{stream}.jobs", b"")
        return bool(json.loads(answer.data)["num_ack_pending"] == 0)

    await eventually(is_acknowledged, 3.0)


@needs("mill", *(f"{API}.CONSUMER.{what}.{EVENTS}.jobs" for what in ("RESET", "PAUSE", "INFO")))
async def begins_after_what_is_stored(scene: Scene) -> None:
    publisher = await scene.runtime("plain", durable=["work."])
    await publisher.publish_message(Job(1), TOPIC)
    desk = Desk()
    await worker(scene, desk)
    await publisher.publish_message(Job(2), TOPIC)
    await eventually(lambda: desk.handled == [(2, 1)], 5.0)


@needs("mill", f"{API}.STREAM.UPDATE.{EVENTS}")
async def adds_topics(scene: Scene) -> None:
    await scene.runtime("plain", durable=["audit"])
    await worker(scene, Desk())


@needs("mill", "publish to natsrt.dead.jobs.>", f"{API}.DIRECT.GET.{DEAD}.natsrt.dead.jobs.>")
async def writes_dead_letters(scene: Scene) -> None:
    plain = await scene.runtime("plain", durable=["work."])
    namespace = scene.case.declaration.namespace
    former = f"{namespace}.natsrt.dead.jobs.{namespace}_{EVENTS}.1"
    await plain.running.connection.jetstream.publish(former, b"{}", headers={"Natsrt-Message-Id": "of another event"})
    runtime = await worker(scene, Desk())
    await runtime.publish_message(Job(1, "reject"), TOPIC)
    await eventually(lambda: runtime.health().dead_letters == 1, 5.0)


@needs("mill", "publish to natsrt.attempts.jobs.>")
async def counts_what_was_given_back_as_no_attempt(scene: Scene) -> None:
    desk = Desk()
    first = await worker(scene, desk, max_running=1, drain_timeout=0.1)
    await first.publish_message(Job(1, "wait"), TOPIC)
    await eventually(lambda: desk.begun == [1], 5.0)
    await first.publish_message(Job(2), TOPIC)
    await eventually(lambda: first.health().messages_queued == 1, 5.0)
    await first.stop()
    await worker(scene, desk)
    await eventually(lambda: desk.handled == [(2, 1)], 8.0)


@needs("mill", f"publish to natsrt.later.{EVENTS}.retry.jobs.*.*")
async def puts_events_aside_for_much_later(scene: Scene) -> None:
    runtime = await worker(scene, Desk())
    await runtime.publish_message(Job(1, "later"), TOPIC)

    async def waits() -> bool:
        return bool(await runtime.running.network.later.count(f"{scene.case.declaration.namespace}_{EVENTS}"))

    await eventually(waits, 5.0)


@needs("mill", f"{API}.DIRECT.GET.{EVENTS}")
async def finds_out_whether_an_event_was_put_aside(scene: Scene) -> None:
    desk = Desk()
    runtime = await worker(scene, desk)
    await runtime.publish_message(Job(1, "soon"), TOPIC)
    await eventually(lambda: desk.handled == [(1, 2)], 5.0)


# -- a publisher -------------------------------------------------------------------------------------------------------


@needs("web")
async def publishes(scene: Scene) -> None:
    desk = Desk()
    await worker(scene, desk)
    web = await scene.runtime("web")
    await web.publish_message(Job(1), TOPIC)
    await eventually(lambda: desk.handled == [(1, 1)])


# -- an operator -------------------------------------------------------------------------------------------------------


@needs("ops", f"{API}.STREAM.INFO.{EVENTS}", f"{API}.CONSUMER.LIST.{EVENTS}")
async def lists_topics(scene: Scene) -> None:
    await worker(scene, Desk())
    [row] = (await scene.command("ops", "topics", "ls", "--json")).json
    assert (row["events"], row["agent_types"]) == (0, 1)


@needs("ops", f"{API}.STREAM.UPDATE.{EVENTS}")
async def removes_topics(scene: Scene) -> None:
    await scene.runtime("plain", durable=["work."])
    await scene.command("ops", "topics", "rm", "work.", "--yes")


@needs(
    "ops",
    *(f"{API}.{what}.{DEAD}" for what in ("STREAM.INFO", "DIRECT.GET", "STREAM.MSG.DELETE")),
    f"publish to natsrt.again.{EVENTS}.redrive.*.*.*",
)
async def redrives_dead_letters(scene: Scene) -> None:
    runtime = await worker(scene, Desk())
    await runtime.publish_message(Job(1, "reject"), TOPIC)
    await eventually(lambda: runtime.health().dead_letters == 1)
    ended = await scene.command("ops", "dlq", "redrive", "--all")
    assert ended.stderr.endswith("redriven: 1\n")
    await eventually(lambda: runtime.health().dead_letters == 2)


@needs("ops", f"{API}.DIRECT.GET.{EVENTS}", f"publish to natsrt.again.{EVENTS}.*")
async def reads_and_replays_events(scene: Scene) -> None:
    desk = Desk()
    runtime = await worker(scene, desk)
    await runtime.publish_message(Job(1), TOPIC)
    await eventually(lambda: desk.handled == [(1, 1)])
    [shown] = (await scene.command("ops", "tail", "--since", "1h", "--count", "1", "--json")).stdout.splitlines()
    assert json.loads(shown)["data"]["number"] == 1
    await scene.command("ops", "replay", "work.", "--since", "1h", "--to", "jobs")
    await eventually(lambda: desk.handled == [(1, 1), (1, 1)])


# -- the tests ---------------------------------------------------------------------------------------------------------


def test_publishers_and_callers_need_nothing_more() -> None:
    assert added("press") == added("web") == []


def test_a_worker_that_hosts_everything_may_do_the_same_for_every_type() -> None:
    """Whether keyed or not is not known of them."""
    users = {**KEYED.users, "free": User("free", "worker", hosts=("*",))}
    wide = added("free", replace(KEYED, users=users))
    own = added("mill", KEYED)
    assert len(wide) == len(own)
    assert all(any(covers(one.subject, grant.subject) for one in wide) for grant in own)
    assert all(any(covers(one.subject, grant.subject) for grant in own) for one in wide)


class TestEachPermission(MatrixTests):
    before = delete_streams


async def test_tail_ends_if_its_user_may_not_read_the_stream(matrix: EmbeddedServer) -> None:
    permission = f"{API}.DIRECT.GET.{EVENTS}"
    async with AsyncExitStack() as stack:
        scene = Scene(matrix.url, MATRIX.case_of("ops", permission), stack)
        await worker(scene, Desk())
        login = ("--user", scene.case.login("ops"), "--password", PASSWORD, "--inbox-prefix", "_INBOX_ops")
        place = ("--server", matrix.url, "--namespace", scene.case.declaration.namespace)
        ended = await run("tail", "--since", "1h", *login, *place)
        assert (ended.code, f"DIRECT.GET.{scene.case.declaration.namespace}_{EVENTS}" in ended.stderr) == (3, True)


@pytest.mark.parametrize("user", ["mill", "web", "ops"])
async def test_doctor_finds_them_in_force(tmp_path: Path, user: str) -> None:
    file = tmp_path / "durable.toml"
    file.write_text(TEXT)
    lacking = added(user)[-1] if added(user) else None
    for without in {None, lacking}:
        folder = tmp_path / ("all" if without is None else "less")
        folder.mkdir()
        case = Case(DECLARATION, user, without)
        async with EmbeddedServer(config=configuration([case], folder)) as server, AsyncExitStack() as stack:
            scene = Scene(server.url, case, stack)
            await worker(scene, Desk(), "mill" if user != "mill" else "plain")
            command = ("doctor", "--json", "--as", user, "--declaration", str(file))
            said = (await scene.command(user, *command, code=None)).json
            [found] = [one for one in said if one["check"] == f"permissions of {user}"]
            assert (found["level"] == "problem") == (without is not None), found
            assert without is None or without.subject in found["text"]
            plain = await scene.client("plain")
            for stream in (EVENTS, DEAD, "natsrt_attempts"):
                assert (await plain.jetstream().stream_info(stream)).state.messages == 0, stream


async def test_doctor_finds_a_publisher_that_may_give_events_to_single_types(tmp_path: Path) -> None:
    file = tmp_path / "durable.toml"
    file.write_text(TEXT)
    case = Case(DECLARATION, "web", None, ("natsrt.again.>",))
    async with EmbeddedServer(config=configuration([case], tmp_path)) as server, AsyncExitStack() as stack:
        scene = Scene(server.url, case, stack)
        await worker(scene, Desk())
        command = ("doctor", "--json", "--as", "web", "--declaration", str(file))
        said = (await scene.command("web", *command, code=None)).json
        [found] = [one for one in said if one["check"] == "permissions of web"]
        assert (found["level"], "gives events to single agent types" in found["text"]) == ("problem", True), found
        events = await (await scene.client("plain")).jetstream().stream_info(EVENTS)
        assert events.state.messages == 0


def test_streams_in_an_account_of_their_own_cannot_store_events() -> None:
    text = 'durable = ["a."]\njetstream_domain = "hub"\njetstream_account = "KEPT"\n[users.w]\nrole = "worker"\n'
    with pytest.raises(ConfigurationError, match="streams store what is published in their own account only"):
        parse(text, "file")
    with pytest.raises(ConfigurationError, match="durable: the pattern"):
        parse('durable = ["a.*"]\n[users.w]\nrole = "worker"\n', "file")


def test_a_recording_declares_durable_topics() -> None:
    recording, view = Recording(Subjects()), View()
    for topics in (DurableTopics("a.", "b"), DurableTopics("c:", name="short", max_age=60)):
        entry = DurableEntry.of(f"natsrt_events_{topics.name}", topics)
        view.put(entry.key, len(view.entries) + 1, entry)
    recording.registered(view)
    recording.take(Msg(None, "agent.good", "_INBOX_good.x.y", b'"hi"'))
    recorded = parse(recording.toml(""), "the recording")
    assert [(one.name, one.patterns) for one in recorded.durable] == [(None, ("a.", "b")), ("short", ("c:",))]


async def test_a_worker_of_a_keyed_type_may_feed_its_agents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = Case(KEYED, "mill", None)
    async with EmbeddedServer(config=configuration([case], tmp_path)) as server, AsyncExitStack() as stack:
        scene = Scene(server.url, case, stack)
        desk = Desk()
        runtime = scene.unstarted("mill", durable=["work."], keyed=["jobs"], max_pending_bytes=100_000)
        await natsrt.register(runtime, Works, "jobs", lambda: Works(desk))
        await runtime.add_subscription(TypeSubscription("work.jobs", "jobs"))
        async with runtime:
            for number in range(20):
                await runtime.publish_message(Job(number, "-" * 5000), TOPIC)
            await eventually(lambda: desk.handled == [(number, 1) for number in range(20)], 15.0)
    assert "ermission" not in caplog.text
