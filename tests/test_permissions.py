"""Permissions hold by subject: no body, header or reply subject reaches what the subject does not name."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypePrefixSubscription, TypeSubscription, rpc
from autogen_core import event as event_handler
from nats.aio.client import Client
from natsrt_cli import patient
from natsrt_cli.doctor import examine

from natsrt import AgentNotServed, NatsAgentRuntime, PermissionDenied, RegistryUnavailable, register
from natsrt.embedded import EmbeddedServer
from natsrt.options import Options
from tests.support.cli import Ended, natsrt
from tests.support.processes import REPOSITORY, eventually

PASSWORDS = {
    "WORKER_PASSWORD": "for-workers",
    "CALLER_PASSWORD": "for-callers",
    "CLIENT_PASSWORD": "for-clients",
    "OPERATOR_PASSWORD": "for-operators",
}
Builder = Callable[..., AbstractAsyncContextManager["House"]]
CONFIG = """
server_name: "permissions-{name}"
listen: 127.0.0.1:-1
jetstream {{ store_dir: "{data}" }}
"""


@dataclass
class Text:
    text: str


class Echo(RoutedAgent):
    """Returns whatever it is sent, and remembers it."""

    seen: list[Any]

    def __init__(self, seen: list[Any]) -> None:
        super().__init__("echo")
        self.seen = seen
        self.state: dict[str, Any] = {"secret": "of the agent"}

    @rpc
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        self.seen.append(message)
        return message

    @rpc
    async def on_str(self, message: str, ctx: MessageContext) -> str:
        self.seen.append(message)
        return message

    @rpc
    async def on_dict(self, message: dict, ctx: MessageContext) -> dict:
        self.seen.append(message)
        if message.get("wait"):
            await asyncio.sleep(0.4)  # long enough to be accepted
        return message

    async def save_state(self) -> Mapping[str, Any]:
        return self.state

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)


class Listener(RoutedAgent):
    """Remembers events."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__("listens")
        self.seen = seen

    @event_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> None:
        self.seen.append(message)

    @event_handler
    async def on_dict(self, message: dict, ctx: MessageContext) -> None:
        self.seen.append(message)


def documented(path: Path, namespace: str = "") -> str:
    """The authorization block of a document, for a namespace as ``docs/permissions.md`` says."""
    text = path.read_text()
    if path.suffix == ".md":
        found = re.search(r"```conf\n(.*?)```", text, re.DOTALL)
        assert found
        block = found.group(1)
    else:
        lines = [line.removeprefix("#").removeprefix(" ") for line in text.splitlines()]
        start = lines.index("authorization {")
        block = "\n".join(lines[start : lines.index("}", start) + 1])
    if namespace:
        block = re.sub(r'"(agent|topic|natsrt)\.', rf'"{namespace}.\1.', block)
        block = re.sub("(natsrt_registry|natsrt_agents|natsrt_blobs)", rf"{namespace}_\1", block)
    return block


def without(block: str, user: str, *subjects: str) -> str:
    """A block in which a user lacks the permissions to publish to some subjects."""
    before, mark, rest = block.partition(f"  {user}: {{")
    published, subscribe, after = rest.partition("subscribe: [")
    for subject in subjects:
        assert f'"{subject}"' in published, subject
        published = re.sub(rf'"{re.escape(subject)}",?', "", published)
    return before + mark + published + subscribe + after


@pytest.fixture(params=["", "acme"], ids=["no namespace", "a namespace"])
def space(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class House:
    """A server with the documented permissions, and runtimes and clients of its users."""

    def __init__(self, url: str, space: str, stack: AsyncExitStack) -> None:
        self.url, self.space, self._stack = url, space, stack
        self.public: list[Any] = []
        self.admin: list[Any] = []
        self.events: list[Any] = []
        self.violations: list[str] = []

    def subject(self, rest: str) -> str:
        return f"{self.space}.{rest}" if self.space and not rest.startswith(("$", "_")) else rest

    async def runtime(self, user: str, start: bool = True, **settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(
            self.url,
            name=user,
            namespace=self.space,
            user=user,
            password=PASSWORDS[f"{user.upper()}_PASSWORD"],
            **{"inbox_prefix": f"_INBOX_{user}", **settings},
        )
        return await self._stack.enter_async_context(runtime) if start else runtime

    async def worker(self, **settings: Any) -> NatsAgentRuntime:
        """A worker with the agents ``public`` and ``admin``, and ``listener`` of the topic ``inside``."""
        worker = await self.runtime("worker", start=False, **settings)
        await register(worker, Echo, "public", lambda: Echo(self.public))
        await register(worker, Echo, "admin", lambda: Echo(self.admin))
        await register(worker, Listener, "listener", lambda: Listener(self.events))
        await worker.add_subscription(TypeSubscription("inside", "listener"))
        await self._stack.enter_async_context(worker)
        return worker

    async def client(self, user: str) -> Client:
        async def on_error(error: Exception) -> None:
            self.violations.append(str(error).lower())

        client = await nats.connect(
            self.url,
            user=user,
            password=PASSWORDS[f"{user.upper()}_PASSWORD"],
            inbox_prefix=f"_INBOX_{user}",
            error_cb=on_error,
        )
        self._stack.push_async_callback(client.close)
        return client


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """Opens a house of a namespace; ``change`` makes other permissions of the documented ones."""
    for name, value in PASSWORDS.items():
        monkeypatch.setenv(name, value)

    @asynccontextmanager
    async def open_house(space: str, change: Callable[[str], str] = str) -> AsyncIterator[House]:
        config = tmp_path / "server.conf"
        head = CONFIG.format(name=tmp_path.name, data=tmp_path / "data")
        config.write_text(head + change(documented(REPOSITORY / "docs" / "permissions.md", space)))
        async with EmbeddedServer(config=config) as server, AsyncExitStack() as stack:
            yield House(server.url, space, stack)

    return open_house


@pytest.fixture
async def house(build: Builder, space: str) -> AsyncIterator[House]:
    async with build(space) as house:
        yield house


def refused(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says the server refused."""
    return [r.getMessage() for r in caplog.records if "permission" in r.getMessage().lower()]


async def test_the_documented_permissions_are_all_that_workers_and_callers_need(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await house.worker()
    caller = await house.runtime("caller")
    assert await caller.send_message(Text("hi"), AgentId("public", "k")) == Text("hi")
    assert await caller.send_message({"wait": True}, AgentId("admin", "k")) == {"wait": True}
    await caller.publish_message(Text("news"), TopicId("inside", "s"))
    await eventually(lambda: house.events == [Text("news")])
    with pytest.raises(LookupError):
        await caller.send_message(Text("hi"), AgentId("unheard-of", "k"))

    other = await house.runtime("worker", start=False)
    await register(other, Echo, "public", lambda: Echo(house.public))
    await register(other, Echo, "more", lambda: Echo(house.public))
    async with other:
        await other.add_subscription(TypePrefixSubscription("news.", "public"))
        assert await other.agent_save_state(AgentId("admin", "k")) == {"secret": "of the agent"}
        assert await worker.send_message(Text("hi"), AgentId("more", "k")) == Text("hi")
        assert await caller.send_message(Text("hi"), AgentId("more", "k")) == Text("hi")
    with pytest.raises(Exception, match="no worker that hosts it is alive"):
        await caller.send_message(Text("hi"), AgentId("more", "k"))
    assert refused(caplog) == []


@pytest.mark.slow
@pytest.mark.timeout(240)  # it runs twenty commands
async def test_the_documented_permissions_are_all_that_operators_need(house: House, tmp_path: Path) -> None:
    password = PASSWORDS["OPERATOR_PASSWORD"]
    login = ("--server", house.url, "--user", "operator", "--password", password, "--inbox-prefix", "_INBOX_operator")

    async def run(*arguments: str, code: int = 0, stdin: str | None = None) -> Ended:
        ended = await natsrt(*arguments, *login, "--namespace", house.space, stdin=stdin)
        assert (ended.code, "permission" in ended.stderr, "not let" in ended.stderr) == (code, False, False), ended
        return ended

    worker = await house.worker(keyed=KEYED)
    await run("send", "admin/x", '{"text": "hi"}', "--type-name", "Text")
    await run("publish", "inside/s", '{"text": "hi"}')
    findings = {finding["check"]: finding for finding in (await run("doctor", "--json")).json}
    assert {check: finding["level"] for check, finding in findings.items()} == {
        **dict.fromkeys(findings, "ok"),
        "permission to host": "warning",  # it hosts nothing
        "server settings": "skipped",  # without --monitor-url
    }
    for command in (
        "ls", "ls admin", "ls --owners", "ls --instances", "ping", "stats", "wait admin", "info admin",
        "info admin/x", "where admin/x", "rebalance admin",
    ):  # fmt: skip
        await run("agents", *command.split())
    await run("state", "set", "admin/x", "-", stdin='{"secret": "of the agent"}')
    for command in ("ls", "get admin/x", "get --live admin/x", "export -", "rm --force admin/x"):
        await run("state", *command.split())
    await worker.stop()
    await run("agents", "forget", "admin", "--records")
    await run("agents", "forget", "public")


async def test_doctor_does_not_report_the_permissions_of_operators_as_problems(house: House) -> None:
    await house.worker(keyed=KEYED)
    for user in ("worker", "caller"):
        password = PASSWORDS[f"{user.upper()}_PASSWORD"]
        login = ("--server", house.url, "--user", user, "--password", password, "--inbox-prefix", f"_INBOX_{user}")
        ended = await natsrt("doctor", "--json", "--namespace", house.space, *login)
        assert ended.code == 0
        levels = {finding["check"]: finding["level"] for finding in ended.json}
        assert "problem" not in levels.values()
        assert levels["registry"] == "ok"
        skipped = {finding["check"]: finding for finding in ended.json if finding["level"] == "skipped"}
        advice = {finding["advice"] for finding in skipped.values()}
        assert any("an operator's user: see docs/permissions.md" in text for text in advice)
        assert "refused" in skipped["clock"]["text"]
        assert "publish to $SYS.REQ.USER.INFO" in skipped["clock"]["advice"]
        if user == "caller":
            assert "refused" in skipped["JetStream"]["text"]
            assert "publish to $JS.API.INFO" in skipped["JetStream"]["advice"]
            assert "workers tell them what is in it" in skipped["registry bucket"]["text"]
            assert "refused" in skipped["keyed agents"]["text"]
            stream = f"KV_{house.subject('natsrt_agents').replace('.', '_')}"
            assert f"publish to $JS.API.STREAM.INFO.{stream}" in skipped["keyed agents"]["advice"]


@pytest.mark.parametrize(
    ("user", "prefix", "refused"),
    [("client", "_INBOX_client", "subscribe to "), ("caller", "_INBOX", "subscribe to _INBOX.")],
)
async def test_doctor_names_what_is_refused_without_waiting_for_an_answer(
    house: House, monkeypatch: pytest.MonkeyPatch, user: str, prefix: str, refused: str
) -> None:
    await house.worker()
    monkeypatch.setattr(patient, "REQUEST_SECONDS", 60.0)
    options = Options(
        servers=house.url,
        namespace=house.space,
        user=user,
        password=PASSWORDS[f"{user.upper()}_PASSWORD"],
        inbox_prefix=prefix,
        connect_timeout=60.0,
    )
    async with asyncio.timeout(4.0):  # JetStream's own timeout is 5 s
        findings = {finding.check: finding for finding in await examine(options, None, ())}
    assert findings["registry"].level == "problem"
    assert f"allow this user to {refused}" in findings["registry"].advice
    assert "timeout" not in " ".join(finding.text for finding in findings.values())


async def test_a_user_that_may_not_ask_for_statistics_is_told_so_and_nothing_of_workers(build: Builder) -> None:
    login = ("--user", "caller", "--password", PASSWORDS["CALLER_PASSWORD"], "--inbox-prefix", "_INBOX_caller")
    async with build("") as house:
        await house.worker()
        stats = await natsrt("agents", "stats", "--server", house.url, *login)
        text = "natsrt: this user may not ask $SRV.STATS; use an operator's user (docs/permissions.md)\n"
        assert (stats.code, stats.stdout) == (3, "")
        assert stats.stderr == text
        assert (await natsrt("agents", "ping", "--server", house.url, *login)).code == 0  # it may ask each worker
    async with build("", lambda block: without(block, "caller", "natsrt.worker.*")) as house:
        await house.worker()
        ping = await natsrt("agents", "ping", "--server", house.url, *login)
        assert (ping.code, ping.stdout) == (3, "")
        assert ping.stderr == text.replace("STATS", "PING")


KEYED: dict[str, Any] = {"public": {"concurrency": "concurrent"}, "admin": True, "listener": True}


async def test_the_documented_permissions_are_all_that_keyed_agents_need(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    worker, caller = await house.worker(keyed=KEYED), await house.runtime("caller")
    admins = [AgentId("admin", f"k{number}") for number in range(8)]
    for admin in admins:
        assert await caller.send_message(Text("hi"), admin) == Text("hi")
    await caller.publish_message(Text("news"), TopicId("inside", "s"))
    await eventually(lambda: house.events == [Text("news")])
    large = {"secret": "x" * 200_000}
    for state in (large, large, {"secret": "small"}):
        await worker.agent_load_state(admins[0], state)
        assert await worker.agent_save_state(admins[0]) == state

    other = await house.worker(keyed=KEYED)
    operator = await house.runtime("operator")  # who may list them; workers need not
    assert {record.agent async for record in operator.running.records.records("admin")} == set(admins)
    await worker.stop()
    for admin in admins:
        assert await caller.send_message(Text("hi"), admin) == Text("hi")
    assert await other.agent_save_state(admins[0]) == {"secret": "small"}
    await caller.publish_message(Text("more"), TopicId("inside", "s"))
    await eventually(lambda: house.events == [Text("news"), Text("more")])
    assert refused(caplog) == []


async def test_a_publisher_that_may_not_reach_keyed_subscribers_is_told_so(build: Builder, space: str) -> None:
    calls = f"{space}.agent.>" if space else "agent.>"
    async with build(space, lambda block: without(block, "caller", calls)) as house:
        await house.worker(keyed=KEYED)
        caller = await house.runtime("caller")
        with pytest.raises(PermissionDenied, match=r"agent\.admin"):
            await caller.send_message(Text("hi"), AgentId("admin", "k"))
        for _ in range(2):  # a refusal is not remembered, and an event is never lost in silence
            with pytest.raises(PermissionDenied, match=r"publish to '.*agent\.listener'"):
                await caller.publish_message(Text("news"), TopicId("inside", "s"))
        assert caller.running.counters.undelivered_events == 0
        client = await house.client("caller")
        await client.publish(house.subject("topic.inside.s"), b'{"text":"plain"}')  # its worker passes it on
        await eventually(lambda: house.events == [Text("plain")])


async def test_a_caller_waits_for_a_type_with_the_documented_permissions_and_is_told_if_it_has_less(
    build: Builder, space: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with build(space) as house:
        await house.worker()
        caller = await house.runtime("caller")
        with caplog.at_level("INFO", logger="natsrt.connection"):
            for agent_type in ("admin", "public", "listener"):
                await caller.wait_for(agent_type, timeout=20)
            with pytest.raises(AgentNotServed):
                await caller.wait_for("nobody", timeout=1.5)
        # The server reports to the inbox in the caller's name: without that permission, the caller does without.
        (said,) = [record for record in caplog.records if "permission" in record.getMessage()]
        assert said.levelname == "INFO" and "wait_for does not notice plain responders" in said.getMessage()
    questions = f"{space}.natsrt.worker.*" if space else "natsrt.worker.*"
    async with build(space, lambda block: without(block, "caller", questions)) as house:
        await house.worker()
        with pytest.raises(PermissionDenied, match=r"natsrt\.worker\."):
            await (await house.runtime("caller")).wait_for("admin", timeout=20)


async def test_a_caller_may_neither_read_nor_write_state_and_is_told_so(house: House) -> None:
    worker = await house.worker()
    caller = await house.runtime("caller")
    admin = AgentId("admin", "x")
    with pytest.raises(PermissionDenied, match=r"natsrt\.control\.admin"):
        await caller.agent_save_state(admin)
    with pytest.raises(PermissionDenied, match=r"natsrt\.control\.admin"):
        await caller.agent_load_state(admin, {"secret": "stolen"})
    assert await worker.agent_save_state(admin) == {"secret": "of the agent"}


async def test_a_user_without_an_inbox_of_its_own_is_told_so(house: House) -> None:
    await house.worker()
    with pytest.raises(PermissionDenied, match="subscribe to"):
        await house.runtime("caller", inbox_prefix="_INBOX")


async def test_a_caller_may_not_write_the_registry_and_is_told_so(house: House) -> None:
    await house.worker()
    caller = await house.runtime("caller")
    with pytest.raises(PermissionDenied):
        await caller.add_subscription(TypeSubscription("inside", "public"))
    with pytest.raises(PermissionDenied):
        await caller.register_factory("admin", lambda: Echo([]))
    assert await caller.send_message(Text("hi"), AgentId("admin", "k")) == Text("hi")


def call(data: Any, key: str | None = None, **attributes: Any) -> dict[str, Any]:
    body = {"specversion": "1.0", "type": "natsrt.call", "id": "1", "source": "/", "messagetype": "dict"}
    return {**body, **({"subject": key} if key is not None else {}), **attributes, "data": data}


ADMIN_CALL = call({"text": "do it"}, "x")
LOAD = call({"secret": "stolen"}, "x", type="natsrt.control", operation="load_state")
SAVE = call({}, "x", type="natsrt.control", operation="save_state")
EVENT = call({"text": "event"}, type="natsrt.event")
CHANGE = {"agent_type": "public", "worker_id": "w", "handles": ["x"]}
CANCEL = call({"cancelid": "x"}, type="natsrt.cancel")
FORBIDDEN = [
    "agent.admin",
    "agent.admin.x",
    "natsrt.control.admin",
    "natsrt.control.admin.x",
    "natsrt.control.public",
    "natsrt.cancel",
    "natsrt.registry.type.admin.w",
    "topic.inside.s",
]
STREAM = "KV_{}natsrt_registry"


def attacks(house: House, worker_id: str) -> list[tuple[str, bytes, dict[str, str] | None]]:
    """Reply subject, body and headers of messages to ``agent.public`` that would like to reach further."""
    bucket = f"{house.space}_natsrt_registry" if house.space else "natsrt_registry"
    targets = [
        *map(house.subject, [*FORBIDDEN, f"natsrt.worker.{worker_id}"]),
        house.subject(f"natsrt.control.admin.at.{worker_id}"),
        f"$KV.{bucket}.r.type.admin.w",
        f"$KV.{bucket.replace('registry', 'agents')}.a.admin.x",
        f"$JS.API.STREAM.PURGE.KV_{bucket}",
        f"$JS.API.STREAM.DELETE.KV_{bucket}",
        f"$SRV.PING.worker.{worker_id}",
        "$SYS.REQ.SERVER.PING",
    ]
    wanted = [ADMIN_CALL, LOAD, SAVE, EVENT, CANCEL, CHANGE, {}]
    inbox = "_INBOX_client.answer"
    made: list[tuple[str, bytes, dict[str, str] | None]] = []
    for target in targets:
        for body in wanted:
            text = json.dumps(body, separators=(",", ":"))
            # The echo's answer is the body itself, where it is plain, or inside of an envelope.
            made.append((target, text.encode(), None))
            made.append((target, text.encode(), {"Natsrt-Type": "dict"}))
            made.append((target, text.encode(), {"Natsrt-Type": "str"}))
            made.append((target, json.dumps({"text": text}).encode(), None))
            made.append((target, json.dumps(call(body, "x")).encode(), None))
            made.append((target, json.dumps(call(text, "x", messagetype="str")).encode(), None))
            made.append((target, json.dumps(call({"wait": True}, "x", acceptto=target)).encode(), None))
            made.append((inbox, json.dumps(call({"wait": True}, "x", acceptto=target)).encode(), None))
        # An error's text is partly the caller's too.
        made.append((target, json.dumps(call({}, "x", messagetype=target)).encode(), None))
        made.append((target, b"", {"Natsrt-Key": "x", "Nats-Trace-Dest": target}))
        made.append((inbox, b'{"text":"traced"}', {"Nats-Trace-Dest": target, "Nats-Msg-Id": "x"}))
    for header in ("Natsrt-Key", "Natsrt-Type", "Natsrt-Subject", "Nats-Subject", "Nats-Reply", "Natsrt-Agent"):
        for value in ("x", "admin/x", house.subject("agent.admin"), "../admin"):
            made.append((inbox, b'{"text":"header"}', {header: value}))
    for body in wanted:
        made.append((inbox, json.dumps(body).encode(), None))
        for name in (
            *("subject", "source", "agenttype", "agent_type", "recipient", "keyed", "operation", "topictype"),
            *("topicsource", "chain"),
        ):
            for value in ("admin", "admin/x", "admin.x", "x", house.subject("agent.admin")):
                made.append((inbox, json.dumps({**body, name: value}).encode(), None))
    return made


@pytest.mark.parametrize("keyed", [{}, KEYED], ids=["not keyed", "keyed"])
async def test_a_client_of_one_agent_reaches_no_other_by_anything_it_sends(house: House, keyed: dict[str, Any]) -> None:
    worker = await house.worker(keyed=keyed)
    if keyed:  # two of them pass on to one another what comes to the wrong one
        worker, passing = await house.worker(keyed=keyed), worker
    client = await house.client("client")
    for reply, body, headers in attacks(house, str(worker.worker_id)):
        await client.publish(house.subject("agent.public"), body, reply=reply, headers=headers)
    answer = await client.request(house.subject("agent.public"), b'{"text":"last"}', timeout=20)
    assert answer.data == b'{"text":"last"}'
    await worker.running.wait_idle()
    if keyed:
        await passing.running.wait_idle()

    assert house.public  # some were calls that it may make
    assert house.admin == []
    assert house.events == []
    assert await worker.agent_save_state(AgentId("admin", "x")) == {"secret": "of the agent"}
    assert await worker.agent_save_state(AgentId("public", "x")) == {"secret": "of the agent"}
    assert worker.ready and worker.running.connection.reconnects == 0
    assert worker.running.counters.refused_replies > 0
    caller = await house.runtime("caller")
    assert await caller.send_message(Text("hi"), AgentId("admin", "k")) == Text("hi")


async def test_a_client_of_one_agent_may_publish_nowhere_else(house: House) -> None:
    worker = await house.worker()
    client = await house.client("client")
    subjects = [house.subject(rest) for rest in [*FORBIDDEN, f"natsrt.worker.{worker.worker_id}"]]
    for subject in subjects:
        await client.publish(subject, json.dumps(LOAD).encode(), reply="_INBOX_client.answer")
    await eventually(lambda: len(house.violations) == len(subjects))
    assert house.admin == house.events == []


async def test_those_who_may_ask_a_worker_cannot_make_it_speak_for_them(house: House) -> None:
    worker = await house.worker()
    caller = await house.client("caller")
    targets = [house.subject(rest) for rest in FORBIDDEN if not rest.startswith(("agent.", "topic."))]
    asked = json.dumps(call({"calls": [*targets, house.subject("agent.admin")]}, type="natsrt.fate")).encode()
    served = json.dumps(call({"agent_type": "admin", "revision": 0}, type="natsrt.serve")).encode()
    for target in [*targets, house.subject("agent.admin")]:
        for body in (asked, served, b"nonsense"):
            await caller.publish(house.subject(f"natsrt.worker.{worker.worker_id}"), body, reply=target)
    server_side = await house.client("worker")
    for verb in ("PING", "INFO", "STATS"):
        await server_side.publish(f"$SRV.{verb}", b"", reply=house.subject("agent.admin"))
    await eventually(lambda: worker.running.undecodable >= 3)
    await worker.running.wait_idle()
    assert house.admin == []


def test_the_example_in_nats_conf_is_the_documented_one() -> None:
    def lines(block: str) -> list[str]:
        return [line.strip() for line in block.splitlines() if line.strip() and not line.strip().startswith("#")]

    assert lines(documented(REPOSITORY / "nats.conf")) == lines(documented(REPOSITORY / "docs" / "permissions.md"))


@pytest.mark.parametrize("agent_type", ["Admin", "aDMIN_2"])
async def test_a_refusal_names_the_subject_in_its_true_case(
    build: Builder, agent_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with build("", lambda block: without(block, "caller", "agent.>")) as house:
        worker = await house.worker()
        await worker.register_factory(agent_type, lambda: Echo([]))
        caller = await house.runtime("caller")
        with pytest.raises(PermissionDenied) as denied:
            await caller.send_message(Text("hi"), AgentId(agent_type, "k"))
        assert denied.value.subject == f"agent.{agent_type}"
        with pytest.raises(PermissionDenied) as denied:  # a subscription to it is not allowed either
            await caller.register_factory("More", lambda: Echo([]))
        assert denied.value.subject.startswith(("natsrt.worker.caller-", "$SRV."))
        assert denied.value.subject in {line.split("'")[1] for line in refused(caplog)}


async def test_a_caller_before_the_first_worker_is_told_that_none_has_started(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RegistryUnavailable, match="no worker has started yet") as early:
        await house.runtime("caller")
    assert "Start a worker first" in str(early.value)
    assert "$JS.API" not in str(early.value) and refused(caplog) == []
    await house.worker()
    caller = await house.runtime("caller")
    assert await caller.send_message(Text("hi"), AgentId("admin", "k")) == Text("hi")


async def test_a_worker_that_may_not_make_the_registry_is_told_so_too(build: Builder, space: str) -> None:
    async with build(space, lambda block: without(block, "worker", "$JS.API.INFO")) as house:
        with pytest.raises(RegistryUnavailable, match="may not create it") as missing:
            await house.worker()
        assert isinstance(missing.value.__cause__, PermissionDenied)
        assert missing.value.__cause__.subject == "$JS.API.INFO"


async def test_a_worker_that_may_not_even_look_for_the_registry_is_told_that(build: Builder, space: str) -> None:
    def blind(block: str) -> str:
        return re.sub(r"\$JS\.API\.STREAM\.INFO\.KV_(\w*natsrt_registry)", r"nothing.\1", block)

    async with build(space, blind) as house:
        with pytest.raises(PermissionDenied, match=r"natsrt\.view") as missing:  # nor may it ask others
            await house.worker()
        assert isinstance(missing.value.__cause__, PermissionDenied)
        assert missing.value.__cause__.subject.startswith("$JS.API.STREAM.INFO.KV_")
