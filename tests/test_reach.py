"""A publisher that may not publish on a topic, or not reach its keyed subscribers, is told so, and nothing is lost."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from autogen_core import AgentId, DefaultInterventionHandler, MessageContext, TopicId
from natsrt_cli.declaration import Declaration, parse
from natsrt_cli.exits import Exit
from natsrt_cli.grant import PUBLISH, Grant
from natsrt_cli.permissions import grants

from natsrt import NatsAgentRuntime, PermissionDenied
from natsrt.embedded import EmbeddedServer
from natsrt.sending import reach
from tests.support.cli import natsrt
from tests.support.clients import settled
from tests.support.permission_scene import PASSWORD, Case, Scene, Text, configuration
from tests.support.processes import eventually

DECLARATION = parse(
    """
    namespace = "reach"
    [types.ledger]
    keyed = true
    subscribes = ["orders", "audit"]
    [types.echo]
    subscribes = ["orders", "audit"]
    [users.bank]
    role = "worker"
    hosts = ["ledger", "echo"]
    [users.feed]
    role = "publisher"
    publishes = ["orders"]
    [users.web]
    role = "caller"
    calls = ["ledger"]
    publishes = ["orders"]
    [users.bell]
    role = "publisher"
    publishes = ["bell"]
    [users.look]
    role = "tool"
    publishes = ["orders"]
    """,
    "the test",
)
ORDERS = TopicId("orders", "one")


class Feed:
    """A server whose user ``feed`` may not publish to ``without``, but to ``instead``; None: it has all permissions."""

    def __init__(self, folder: Path, without: str | None, instead: str | None = None) -> None:
        lacking = [grant for grant in grants(DECLARATION, DECLARATION.users["feed"]) if grant.subject == without]
        more = () if instead is None else (instead,)
        self._case = Case(DECLARATION, "feed", lacking[0] if lacking else None, more)
        self._config = configuration([self._case], folder)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Scene:
        server = await self._stack.enter_async_context(EmbeddedServer(config=self._config))
        return Scene(server.url, self._case, self._stack)

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()


def watch_tries(runtime: NatsAgentRuntime, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The subjects that the runtime tries from now on."""
    tried: list[str] = []
    publish = runtime.running.connection.publish

    def watched(subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None) -> Any:
        if headers and "Nats-Trace-Only" in headers:
            tried.append(subject)
        return publish(subject, payload, reply=reply, headers=headers)

    monkeypatch.setattr(runtime.running.connection, "publish", watched)
    return tried


def lines_on(caplog: pytest.LogCaptureFixture, subject: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if f"'{subject}'" in record.getMessage()]


@pytest.mark.parametrize("without", ["reach.agent.ledger", "reach.agent.ledger.*"])
async def test_an_event_that_cannot_reach_a_keyed_subscriber_is_refused(tmp_path: Path, without: str) -> None:
    async with Feed(tmp_path, without) as scene:
        await scene.worker("bank")
        feed = await scene.runtime("feed")
        for _ in range(2):  # the first event is told, and each later one
            with pytest.raises(PermissionDenied) as denied:
                await feed.publish_message({"n": 1}, ORDERS)
            assert denied.value.subject == without.replace("*", "one")
        await feed.running.connection.barrier()
        assert scene.seen == []  # not by the other subscriber either
        assert feed.running.counters.undelivered_events == 0


async def test_only_the_first_event_for_a_type_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Feed(tmp_path, None) as scene:
        await scene.worker("bank")
        feed = await scene.runtime("feed")
        tried = watch_tries(feed, monkeypatch)
        for number in range(3):
            await feed.publish_message({"n": number}, TopicId("orders", f"key-{number}"))
        assert tried == ["reach.topic.orders.key-0", "reach.agent.ledger", "reach.agent.ledger.key-0"]
        await eventually(lambda: len(scene.seen) == 6)  # by both subscribers
        assert all(seen in ({"n": 0}, {"n": 1}, {"n": 2}) for seen in scene.seen)  # and nothing else came to them


async def test_messages_of_other_tasks_keep_their_order_behind_the_first_event(tmp_path: Path) -> None:
    async with Feed(tmp_path, None) as scene:
        await scene.worker("bank")
        web = await scene.runtime("web")
        sent = [asyncio.ensure_future(web.publish_message({"n": number}, ORDERS)) for number in range(5)]
        call = asyncio.ensure_future(web.send_message(Text("last"), AgentId("ledger", "one")))
        await asyncio.gather(*sent, call)
        seen = scene.seen[: scene.seen.index(Text("last"))]  # the keyed agent's events came before its call
        assert {event["n"] for event in seen} == set(range(5))


def test_a_publisher_of_a_topic_with_keyed_subscribers_may_reach_their_agents() -> None:
    own = grants(DECLARATION, DECLARATION.users["feed"])
    for subject in ("reach.agent.ledger", "reach.agent.ledger.*"):
        assert Grant(PUBLISH, subject, "events for keyed agents") in own
    without_keyed = Declaration({"echo": DECLARATION.types["echo"]}, DECLARATION.users, "reach")
    assert not [grant for grant in grants(without_keyed, DECLARATION.users["feed"]) if ".agent." in grant.subject]


async def test_a_publisher_that_may_reach_some_agents_only_is_not_refused_for_them(tmp_path: Path) -> None:
    async with Feed(tmp_path, "reach.agent.ledger.*", instead="reach.agent.ledger.one") as scene:
        await scene.worker("bank")
        feed = await scene.runtime("feed")
        await feed.publish_message({"n": 1}, ORDERS)
        await eventually(lambda: scene.seen == [{"n": 1}, {"n": 1}])


async def test_a_publisher_whose_refusals_cannot_be_told_publishes_as_it_may(tmp_path: Path) -> None:
    async with Feed(tmp_path, "reach.natsrt.worker.*") as scene:
        await scene.worker("bank")
        feed = await scene.runtime("feed")
        await feed.publish_message({"n": 1}, ORDERS)
        await eventually(lambda: scene.seen == [{"n": 1}, {"n": 1}])


@pytest.mark.parametrize("user", ["web", "bell"])  # the server does not say to bell what it refuses of what it traces
@pytest.mark.parametrize("topic", ["audit", "unlisted", "ledger:"])
async def test_an_event_on_a_refused_topic_reaches_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, user: str, topic: str
) -> None:
    async with Feed(tmp_path, None) as scene:
        await scene.worker("bank")
        publisher = await scene.runtime(user)
        with pytest.raises(PermissionDenied) as denied:
            await publisher.publish_message({"n": 1}, TopicId(topic, "one"))
        if user == "web" or topic == "unlisted":  # bell may not reach keyed agents either
            assert denied.value.subject == f"reach.topic.{topic.replace(':', '=3A.')}.one".replace("..", ".=.")
        await publisher.running.connection.barrier()
        assert scene.seen == []
        assert not lines_on(caplog, denied.value.subject)


async def test_refusals_are_told_in_the_turn_of_an_intervention_and_to_handlers(tmp_path: Path) -> None:
    class Interventions(DefaultInterventionHandler):
        async def on_publish(self, message: Any, *, message_context: MessageContext) -> Any:
            if message_context.sender is None:  # what an intervention publishes has a turn of its own
                with pytest.raises(PermissionDenied):
                    await web.publish_message({"n": 0}, TopicId("unlisted", "one"), sender=AgentId("echo", "one"))
            return message

    async with Feed(tmp_path, None) as scene:
        await scene.worker("bank")
        web = await scene.runtime("web", intervention_handlers=[Interventions()])
        for number in range(2):
            with pytest.raises(PermissionDenied):
                await web.publish_message({"n": 0}, TopicId("audit", "one"))
            await web.publish_message({"n": number}, ORDERS)
        await eventually(lambda: len(scene.seen) == 4)


async def test_a_publisher_without_reports_publishes_where_it_may(tmp_path: Path) -> None:
    async with Feed(tmp_path, None) as scene:
        await scene.worker("bank")
        bell = await scene.runtime("bell")
        client = await scene.client("plain")
        heard = await client.subscribe(scene.subject("topic.bell.*"))
        await settled(client)
        await asyncio.gather(*(bell.publish_message({"n": n}, TopicId("bell", f"key-{n}")) for n in range(5)))
        assert [(await heard.next_msg()).subject for _ in range(5)] == [f"reach.topic.bell.key-{n}" for n in range(5)]
        with pytest.raises(PermissionDenied):
            await bell.publish_message({"n": 1}, TopicId("unlisted", "one"))


async def test_tasks_that_publish_at_once_share_one_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Feed(tmp_path, None) as scene:
        await scene.worker("bank")
        web = await scene.runtime("web")
        tried = watch_tries(web, monkeypatch)
        await asyncio.gather(*(web.publish_message({"n": n}, TopicId("orders", f"key-{n}")) for n in range(9)))
        assert tried == ["reach.topic.orders.key-0", "reach.agent.ledger", "reach.agent.ledger.key-0"]
        tried.clear()
        refused = [web.publish_message({"n": n}, TopicId("audit", "one")) for n in range(9)]
        told = await asyncio.gather(*refused, return_exceptions=True)
        assert {type(error) for error in told} == {PermissionDenied}
        assert tried == ["reach.topic.audit.one"]


async def test_a_new_connection_is_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Feed(tmp_path, None) as scene:
        await scene.worker("bank")
        web = await scene.runtime("web")
        await web.publish_message({"n": 1}, ORDERS)
        await eventually(lambda: len(scene.seen) == 2)
        connection = web.running.connection
        tried = watch_tries(web, monkeypatch)
        connection.client.cut()
        await eventually(lambda: connection.reconnects == 1)
        await web.publish_message({"n": 2}, ORDERS)
        assert tried[0] == "reach.topic.orders.one"
        await eventually(lambda: len(scene.seen) == 4)


async def test_what_is_refused_later_is_told_to_the_next_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Feed(tmp_path, "reach.topic.orders.*", instead="reach.topic.orders.one") as scene:
        await scene.worker("bank")
        feed = await scene.runtime("feed")
        await feed.publish_message({"n": 1}, ORDERS)
        other = TopicId("orders", "two")
        await feed.publish_message({"n": 2}, other)  # the permission is for one source, which nobody can know
        await feed.running.connection.barrier()
        for _ in range(2):
            with pytest.raises(PermissionDenied) as denied:
                await feed.publish_message({"n": 2}, other)
            assert denied.value.subject == "reach.topic.orders.two"
            await feed.publish_message({"n": 1}, ORDERS)
        with pytest.raises(PermissionDenied):  # each source is tried from now on
            await feed.publish_message({"n": 3}, TopicId("orders", "three"))
        tried = watch_tries(feed, monkeypatch)
        with pytest.raises(PermissionDenied):
            await feed.publish_message({"n": 2}, other)
        await feed.publish_message({"n": 1}, ORDERS)
        assert tried == []


async def test_a_permission_may_be_taken_away_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        case = Case(DECLARATION, "web", None)
        config = configuration([case], tmp_path)
        server = await stack.enter_async_context(EmbeddedServer(config=config))
        scene = Scene(server.url, case, stack)
        await scene.worker("bank")
        web = await scene.runtime("web")
        await web.publish_message({"n": 1}, ORDERS)
        connection = web.running.connection
        denials: list[str] = []
        connection.on_denied(lambda denied: denials.append(denied.subject))

        async def reload(without: Grant | None) -> None:
            """Have the server take the permissions without this one, and wait until they are in force."""
            configuration([Case(DECLARATION, "web", without)], tmp_path)
            server.send_signal(signal.SIGHUP)

            async def in_force() -> bool:
                denials.clear()
                await connection.publish("reach.topic.orders.probe", b"")
                await connection.barrier()
                return bool(denials) == (without is not None)

            await eventually(in_force)

        await reload(Grant(PUBLISH, "reach.topic.orders.*", "events"))
        for topic in (ORDERS, TopicId("orders", "two")):
            with pytest.raises(PermissionDenied):
                await web.publish_message({"n": 2}, topic)
        monkeypatch.setattr(reach, "REFUSED_AGAIN", 0.0)
        await reload(None)
        await web.publish_message({"n": 3}, ORDERS)
        await eventually(lambda: scene.seen.count({"n": 3}) == 2)
        assert {"n": 2} not in scene.seen


@pytest.mark.parametrize("command", [("publish", "audit/one"), ("send", "echo/one")])
async def test_commands_say_in_one_line_that_they_may_not_send(tmp_path: Path, command: tuple[str, ...]) -> None:
    async with Feed(tmp_path, None) as scene:
        await scene.worker("bank")
        login = ("--user", scene.case.login("look"), "--password", PASSWORD, "--inbox-prefix", "_INBOX_look")
        ended = await natsrt(*command, "{}", "--server", scene.url, "--namespace", "reach", *login)
        assert ended.code == Exit.NOT_CONNECTED
        assert len(ended.stderr.splitlines()) == 1, ended.stderr
        assert "does not let this user publish to" in ended.stderr
