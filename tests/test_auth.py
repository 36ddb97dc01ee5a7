"""``natsrt auth`` and ``natsrt doctor --as``: permissions from a declaration, and whether they are in force."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shlex
import signal
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, cast

import nats
import nkeys
import pytest
from autogen_core import AgentId, TopicId
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.msg import Msg
from natsrt_cli.declaration import EXAMPLE, ROLES, Declaration, Role, of_role, overlap, parse
from natsrt_cli.doctor import examine
from natsrt_cli.forbidden import forbidden, forms
from natsrt_cli.grant import PUBLISH, SUBSCRIBE, Grant
from natsrt_cli.patient import Finding
from natsrt_cli.permission_texts import conf, nsc
from natsrt_cli.permissions import grants
from natsrt_cli.recording import Recording
from natsrt_cli.role_check import RoleCheck, told, touched

from natsrt import ConfigurationError, NatsAgentRuntime, Options, register
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.registry.entries import Rule, SubscriptionEntry, TypeEntry, WorkerEntry
from natsrt.jetstream.registry.view import View
from natsrt.wire.filters import covers, intersects
from natsrt.wire.subjects import Subjects, encode_token
from tests.support.cli import natsrt
from tests.support.permission_scene import CONFIG, PASSWORD, Case, Scene, Served, Text, configuration
from tests.support.processes import Processes, eventually

BANK = """
namespace = "bank"
[types.ledger]
keyed = true
subscribes = ["orders"]
[types.echo]
subscribes = ["news.*"]
[users.bank]
role = "worker"
hosts = ["ledger", "echo"]
publishes = ["booked"]
[users.web]
role = "caller"
calls = ["ledger", "echo"]
publishes = ["orders", "news.sport"]
[users.feed]
role = "publisher"
publishes = ["orders"]
[users.shop]
role = "client"
calls = ["echo"]
[users.ops]
role = "operator"
"""

# -- declarations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[users", "not TOML"),
        ("[types.a]", "declares no user"),
        ("[users.a]\nrole = 'boss'", "'boss' is none of worker"),
        ("[users.a]\nrole = 'caller'\nhosts = ['x']", "users.a: hosts"),
        ("[users.a]\nrole = 'caller'\ncalls = ['x']", r"add \[types.x\]"),
        ("[users.a]\nrole = 'caller'\ncalls = 'x'", "not a list"),
        ("[users.a]\nrole = 'caller'\npublishes = ['a b']", "no topic type|topic"),
        ("[users.'a b']\nrole = 'caller'", "letters, digits"),
        ("[users.a]\nrole = 'caller'\ninbox_prefix = 'x.>'", "without wildcards"),
        ("[users.a]\nrole = 'caller'\nnkey = 'U123'", "public NKEY"),
        ("jetstream_account = 'STATE'\n[users.a]\nrole = 'caller'", "needs jetstream_domain"),
        ("jetstream_account = 'AGENTS'\njetstream_domain = 'x'\n[users.a]\nrole = 'caller'", "'AGENTS' is not"),
        ("jetstream_account = 'a b'\njetstream_domain = 'x'\n[users.a]\nrole = 'caller'", "'a b' is not"),
        ("[users.a]\nrole = 'caller'\n[users.b]\nrole = 'caller'\ninbox_prefix = '_INBOX_a'", "are not apart"),
        ("[users.a]\nrole = 'caller'\n[users.b]\nrole = 'caller'\ninbox_prefix = '_INBOX_a.b'", "are not apart"),
        ("[types.x]\nkeyed = 1\n[users.a]\nrole = 'caller'", "neither true nor false"),
        ("[types.x]\nkind = 1\n[users.a]\nrole = 'caller'", "types.x: kind"),
        ("types = 3\n[users.a]\nrole = 'caller'", "must hold tables"),
        ("namespace = 3\n[users.a]\nrole = 'caller'", "not text"),
        ("namespace = 'a.b'\n[users.a]\nrole = 'caller'", "namespace"),
        *(
            (f"namespace = 'bank'\n[users.a]\nrole = 'caller'\ninbox_prefix = '{prefix}'", "users.a.inbox_prefix")
            for prefix in ("agent", "agent.x", "topic.x", "natsrt", "bank", "bank.natsrt", "bank.agent.x", "$KV.x", "*")
        ),
        ("[users.a-b]\nrole = 'caller'\n[users.a_b]\nrole = 'caller'", r"users.a_b: .*\$A_B_PASSWORD, as that of a-b"),
        ("[users.Web]\nrole = 'caller'\n[users.web]\nrole = 'caller'", r"users.web: .*\$WEB_PASSWORD, as that of Web"),
        ("[users.a]\nrole = 'caller'\npublishes = ['news*']", "'news' for that topic, 'news.*' for those below it"),
        ("[users.a]\nrole = 'caller'\npublishes = ['a.b.or*']", r"'a\.b\.\*' if all"),
        ("[types.'a b']\n[users.a]\nrole = 'caller'", "types.a b: 'a b' cannot be an agent type"),
        ("[types.'']\n[users.a]\nrole = 'caller'", "'' cannot be an agent type"),
        ("[types.'a.b c']\n[users.a]\nrole = 'worker'\nhosts = ['a.b c']", "'a.b c' cannot be an agent type"),
        (f"[types.'{'a.' * 600}b']\n[users.a]\nrole = 'caller'", "at most 1,024 are sent"),
    ],
)
def test_a_declaration_that_is_wrong_is_refused_with_the_reason(text: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        parse(text, "file.toml")


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("a", "a", True), ("a", "b", False), ("a.b", "a.*", True), ("b.a", "a.*", False), ("a*", "ab*", True),
        ("*", "x", True), ("a.*", "b.*", False), ("abc", "ab", False),
    ],
)  # fmt: skip
def test_topics_overlap_where_one_event_may_be_on_both(one: str, other: str, both: bool) -> None:
    assert overlap(one, other) is overlap(other, one) is both


@pytest.mark.parametrize(
    ("pattern", "subject", "whole", "part"),
    [
        ("a.>", "a.b.c", True, True), ("a.>", "a", False, False), ("a.*", "a.b", True, True),
        ("a.*", "a.>", False, True), ("a.b", "a.*", False, True), (">", "a.>", True, True),
        ("a.b", "a.c", False, False), ("a.*.c", "a.b.>", False, True), ("a.*", "a.b.c", False, False),
    ],
)  # fmt: skip
def test_subjects_are_compared_as_the_server_does(pattern: str, subject: str, whole: bool, part: bool) -> None:
    assert (covers(pattern, subject), intersects(pattern, subject)) == (whole, part)


def test_no_user_has_what_makes_it_another_role() -> None:
    declaration = parse(BANK, "bank")
    for user in declaration.users.values():
        assert not [
            (grant.subject, subject)
            for grant in grants(declaration, user)
            for never in forbidden(declaration, user)
            for subject in forms(declaration, user, never, "nobody")
            if grant.operation == never.operation and intersects(grant.subject, subject)
        ]
    for name in ("web", "feed", "shop"):
        subjects = [grant.subject for grant in grants(declaration, declaration.users[name])]
        assert not [subject for subject in subjects if subject.startswith("$")]


def test_a_worker_of_one_type_has_nothing_of_another() -> None:
    declaration = parse("[types.a]\n[types.b]\nkeyed = true\n[users.w]\nrole = 'worker'\nhosts = ['a']", "two")
    own = grants(declaration, declaration.users["w"])
    others = ("agent.b", "agent.b.x", "natsrt.control.b", "natsrt.control.b.at.w", "topic.b=3A.x.s", "topic.x.s")
    for subject in others:
        assert not [grant for grant in own if covers(grant.subject, subject)], subject
    assert not [grant for grant in own if "natsrt_agents" in grant.subject]  # it has no keyed agents


def test_a_domain_changes_the_requests_to_jetstream_only() -> None:
    declaration = parse('jetstream_domain = "hub"\n' + BANK, "hub")
    subjects = [grant.subject for grant in grants(declaration, declaration.users["bank"])]
    assert "$JS.hub.API.INFO" in subjects and "$JS.hub.API.$KV.bank_natsrt_registry.>" in subjects
    assert not [subject for subject in subjects if subject.startswith(("$JS.API", "$KV"))]


# -- the command -------------------------------------------------------------------------------------------------------


async def test_the_command_prints_what_a_declaration_needs(tmp_path: Path) -> None:
    file = tmp_path / "bank.toml"
    file.write_text(BANK)
    declaration = parse(BANK, "bank")
    assert (await natsrt("auth", "conf", str(file))).stdout == conf(declaration)
    assert (await natsrt("auth", "nsc", str(file), "--account", "A")).stdout == nsc(declaration, "A")
    rows = (await natsrt("auth", "table", "--json", str(file))).json
    assert {row["user"] for row in rows} == set(declaration.users) and all(row["why"] for row in rows)
    assert "agent.ledger" in (await natsrt("auth", "table", str(file))).stdout
    assert (await natsrt("auth", "example")).stdout == EXAMPLE
    other = (await natsrt("auth", "conf", "--namespace", "acme")).stdout
    assert '"acme.agent.>"' in other and '"$KV.acme_natsrt_registry.>"' in other
    missing = await natsrt("auth", "conf", str(tmp_path / "nothing.toml"))
    assert missing.code == 2 and "cannot be read" in missing.stderr


def test_a_permission_that_is_wider_than_what_is_declared_says_so() -> None:
    text = "[types.a]\nsubscribes = ['news*', 'bell.*']\n[users.w]\nrole = 'worker'\nhosts = ['a']"
    lines = conf(parse(text, "wide")).splitlines()
    assert any("topic.*.>" in line and "NATS cannot tell news* from the other topics" in line for line in lines)
    [exact] = grants_on("topic.bell.*.>", parse(text.replace("news*", "news.*"), "exact"))
    assert exact.why == "events for these agents"


def grants_on(subject: str, declaration: Declaration) -> list[Grant]:
    return [one for user in declaration.users.values() for one in grants(declaration, user) if one.subject == subject]


async def test_the_block_is_one_that_a_server_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = BANK + "[users.token]\nrole = 'client'\n[users.with-dash]\nrole = 'caller'\n[users.true]\nrole = 'caller'\n"
    text += "[users.token_permissions]\nrole = 'caller'\n"
    declaration = parse(text, "bank")
    for user in declaration.users.values():
        monkeypatch.setenv(user.password_variable, PASSWORD)
    config = tmp_path / "server.conf"
    config.write_text(CONFIG.format(name="block", store=tmp_path / "store") + conf(declaration))
    async with EmbeddedServer(config=config) as server:
        for name in declaration.users:
            client = await nats.connect(server.url, user=name, password=PASSWORD, inbox_prefix=f"_INBOX_{name}")
            await client.close()


# -- JWTs --------------------------------------------------------------------------------------------------------------


def _key(prefix: int) -> nkeys.KeyPair:
    return nkeys.from_seed(nkeys.encode_seed(os.urandom(32), prefix))


def _jwt(issuer: nkeys.KeyPair, subject: nkeys.KeyPair, name: str, claims: dict[str, Any]) -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    body = {
        "jti": name,
        "iat": int(time.time()),
        "iss": issuer.public_key.decode(),
        "name": name,
        "sub": subject.public_key.decode(),
        "nats": {**claims, "version": 2},
    }
    text = f"{part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{part(body)}"
    return f"{text}.{base64.urlsafe_b64encode(issuer.sign(text.encode())).decode().rstrip('=')}"


def _claims(command: str) -> tuple[str, dict[str, Any]]:
    """The name and the permissions of a user, as nsc takes them from a command."""
    words = shlex.split(command)
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert words[:3] == ["nsc", "add", "user"]
    permissions = {
        kind: {
            which: options[flag].split(",") for which in ("allow", "deny") if (flag := f"--{which}-{kind}") in options
        }
        for kind in ("pub", "sub")
    }
    return options["--name"], {"type": "user", "subs": -1, "data": -1, "payload": -1, **permissions}


async def test_the_claims_for_nsc_are_permissions_of_users_with_jwts(tmp_path: Path) -> None:
    operator, account, system = (
        _key(kind) for kind in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_ACCOUNT)
    )
    unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
    storage = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
    limits = {**unlimited, **storage, "wildcards": True}
    account_jwt = _jwt(operator, account, "AGENTS", {"type": "account", "limits": limits})
    system_jwt = _jwt(operator, system, "SYS", {"type": "account", "limits": {**unlimited, "wildcards": True}})
    operator_jwt = _jwt(operator, operator, "operator", {"type": "operator"})
    config = tmp_path / "server.conf"
    config.write_text(
        CONFIG.format(name="jwt", store=tmp_path / "store")
        + f"operator: {operator_jwt}\nresolver: MEMORY\n"
        + f"system_account: {system.public_key.decode()}\n"
        + f"resolver_preload: {{ {account.public_key.decode()}: {account_jwt}\n"
        + f"{system.public_key.decode()}: {system_jwt} }}\n"
    )
    declaration, creds = parse(BANK, "bank"), {}
    for command in nsc(declaration, None).splitlines():
        name, claims = _claims(command)
        user = _key(nkeys.PREFIX_BYTE_USER)
        jwt, seed = _jwt(account, user, name, claims), user.seed.decode()
        creds[name] = tmp_path / f"{name}.creds"
        creds[name].write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
    async with EmbeddedServer(config=config) as server, AsyncExitStack() as stack:
        scene = WithCredentials(server.url, Case(declaration, "web", None), stack)
        scene.creds = creds
        await scene.worker("bank")
        web = await scene.runtime("web")
        assert await web.send_message(Text("hi"), AgentId("ledger", "k")) == Text("hi")
        client = await scene.client("shop")
        await client.publish(scene.subject("agent.ledger"), b"{}")
        await eventually(lambda: any("bank.agent.ledger" in text for text in scene.violations))


class WithCredentials(Scene):
    """A scene whose users have credentials files."""

    creds: dict[str, Path]

    def _login(self, name: str) -> dict[str, Any]:
        return {"creds": str(self.creds[name]), "inbox_prefix": f"_INBOX_{name}"}

    async def client(self, name: str) -> Any:
        async def on_error(error: Exception) -> None:
            self.violations.append(str(error).lower())

        login = {"user_credentials": str(self.creds[name]), "inbox_prefix": f"_INBOX_{name}"}
        client = await nats.connect(self.url, **login, error_cb=on_error)
        self._stack.push_async_callback(client.close)
        return client


# -- doctor --as -------------------------------------------------------------------------------------------------------


async def findings(scene: Scene, user: str, file: Path, role: str | None = None) -> dict[str, Any]:
    ended = await scene.command(user, "doctor", "--json", "--as", role or user, "--declaration", str(file), code=None)
    [finding] = [one for one in ended.json if one["check"].startswith("permissions of ")]
    return finding


@pytest.mark.parametrize("user", ["bank", "web", "feed", "ops"])
async def test_doctor_finds_the_permissions_of_each_role_in_force(tmp_path: Path, user: str) -> None:
    file = tmp_path / "bank.toml"
    file.write_text(BANK)
    declaration = parse(BANK, "bank")
    lacking = next(grant for grant in grants(declaration, declaration.users[user]) if ".natsrt." in grant.subject)
    for without, more, level in ((None, (), "ok"), (lacking, (), "problem"), (None, ("_INBOX_shop.>",), "problem")):
        folder = tmp_path / f"{level}-{bool(more)}"
        folder.mkdir()
        case = Case(declaration, user, without, more)
        async with EmbeddedServer(config=configuration([case], folder)) as server, AsyncExitStack() as stack:
            scene = Scene(server.url, case, stack)
            if user != "bank":
                await scene.worker("bank")
            elif more:
                continue  # a worker replies to all who may ask it
            found = await findings(scene, user, file)
            assert found["level"] == level, found
            if without is not None:
                assert without.subject in found["text"] and without.why in found["text"]
            if more and user == "ops":
                assert "forges replies to shop" in found["text"]


async def test_doctor_finds_that_a_caller_may_do_too_much(tmp_path: Path) -> None:
    declaration = parse(BANK, "bank")
    case = Case(declaration, "web", None, ("$JS.API.STREAM.INFO.*", "$JS.API.INFO", "bank.natsrt.control.>"))
    file = tmp_path / "bank.toml"
    file.write_text(BANK)
    async with EmbeddedServer(config=configuration([case], tmp_path)) as server, AsyncExitStack() as stack:
        scene = Scene(server.url, case, stack)
        await scene.worker("bank")
        found = await findings(scene, "web", file)
        assert found["level"] == "problem"
        assert "bank.natsrt.control.> (it reads and writes the states of agents)" in found["text"]
        plain = await natsrt(
            *("doctor", "--json", "--as", "caller", "--server", server.url, "--user", "bank-plain"),
            *("--password", PASSWORD, "--namespace", "bank"),
        )
        [found] = [one for one in plain.json if one["check"] == "permissions of caller"]
        assert found["level"] == "problem" and "$JS.> (any request to JetStream can write" in found["text"]


EXCESS = [
    (PUBLISH, "$JS.API.>"),
    (PUBLISH, "$JS.API.DIRECT.GET.KV_natsrt_registry.>"),
    (PUBLISH, "$JS.API.STREAM.INFO.KV_natsrt_agents"),
    (PUBLISH, "$JS.API.STREAM.MSG.DELETE.*"),
    (PUBLISH, "$KV.natsrt_agents.a.ledger.*"),
    (PUBLISH, "$KV.natsrt_agents.c.ledger.>"),
    (PUBLISH, "natsrt.control.ledger.at.*"),
    (PUBLISH, "natsrt.control.echo"),
    (PUBLISH, "natsrt.registry.worker.*"),
    (SUBSCRIBE, "agent.echo"),
    (SUBSCRIBE, "agent.ledger.*"),
    (SUBSCRIBE, "natsrt.view"),
    (SUBSCRIBE, "natsrt.worker.*"),
    (SUBSCRIBE, "$KV.natsrt_agents.a.>"),
]
"""What the caller of the documents must not have, beside what it has."""


async def test_doctor_certifies_the_documented_users_and_none_that_may_do_more(tmp_path: Path) -> None:
    declaration = parse(EXAMPLE, "the example")
    documented = {name: grants(declaration, user) for name, user in declaration.users.items()}
    allowed = {"caller": documented["caller"], "client": documented["client"], "operator": documented["operator"]}
    allowed |= {f"more-{n}": [*documented["caller"], Grant(*more, "")] for n, more in enumerate(EXCESS)}
    allowed["wide"] = [*documented["client"], Grant(PUBLISH, "$JS.API.>", ""), Grant(PUBLISH, "$KV.>", "")]
    users: list[dict[str, Any]] = [{"user": "plain", "password": PASSWORD}]
    for name, own in allowed.items():
        permissions = {kind: [one.subject for one in own if one.operation == kind] for kind in (PUBLISH, SUBSCRIBE)}
        users.append({"user": name, "password": PASSWORD, "permissions": permissions})
    config = tmp_path / "server.conf"
    config.write_text(
        CONFIG.format(name="users", store=tmp_path / "store") + "authorization: " + json.dumps({"users": users})
    )
    async with EmbeddedServer(config=config) as server, AsyncExitStack() as stack:
        plain = await stack.enter_async_context(
            NatsAgentRuntime(server.url, user="plain", password=PASSWORD, keyed={"ledger": True})
        )
        seen: list[Any] = []
        await register(plain, Served, "ledger", lambda: Served(seen))
        await register(plain, Served, "echo", lambda: Served(seen))
        assert await plain.send_message(Text("hi"), AgentId("ledger", "one")) == Text("hi")
        js = plain.running.connection.jetstream

        async def examined(user: str, role: str) -> list[Finding]:
            login = {"user": user, "password": PASSWORD, "inbox_prefix": f"_INBOX_{role}"}
            options = Options(servers=server.url, **login)
            own = of_role(cast(Role, role), "", options.inbox_prefix)
            return await examine(options, None, (), RoleCheck(own, own.users[role]))

        before = await js.stream_info("KV_natsrt_agents")
        for name in ("caller", "client", "operator"):
            found = await examined(name, name)
            assert not [one for one in found if one.level == "problem"], found
            assert name == "operator" or not [one for one in found if "allow this user" in one.advice], found
        more = [("client", "wide"), *(("caller", f"more-{number}") for number in range(len(EXCESS)))]
        reports = await asyncio.gather(*(examined(user, role) for role, user in more))
        for (role, user), found in zip(more, reports, strict=True):
            [finding] = [one for one in found if one.check == f"permissions of {role}"]
            assert finding.level == "problem" and "should not have" in finding.text, (user, finding)
        after = await js.stream_info("KV_natsrt_agents")
        assert (after.created, after.config, after.state.last_seq) == (
            before.created,
            before.config,
            before.state.last_seq,
        )
        assert seen == [Text("hi")]


def test_what_cannot_be_tried_is_said_not_to_be_excluded() -> None:
    declaration = parse(EXAMPLE, "the example")
    check = RoleCheck(declaration, declaration.users["client"])
    level, text, _ = check.judge(check.wanted, (), (), check.unwanted[:1], untold=True)
    assert level == "warning" and f"cannot be excluded: publish to {check.unwanted[0].subject}" in text
    level, text, _ = check.judge(check.wanted, (), untold=True)
    assert level == "ok" and "cannot be excluded" in text
    level, text, _ = check.judge(check.wanted, ())
    assert level == "ok" and "cannot be excluded" not in text


def test_permissions_as_the_server_tells_them_are_compared() -> None:
    wanted = [Grant(PUBLISH, "a.*", ""), Grant(PUBLISH, "b", ""), Grant(SUBSCRIBE, "c", "")]
    permissions = {"publish": {"allow": ["a.>", "b"], "deny": ["b"]}, "subscribe": {"deny": ["d"]}}
    assert told(permissions, wanted) == {wanted[0], wanted[2]}
    assert told({}, wanted) == set(wanted)
    unwanted = [Grant(PUBLISH, "a.>", ""), Grant(PUBLISH, "b", ""), Grant(SUBSCRIBE, "d", "")]
    assert touched(permissions, unwanted) == {unwanted[0]}
    own = [Grant(PUBLISH, "a.b", "")]  # of a tree that is forbidden, the user needs a part
    assert touched({"publish": {"allow": ["a.b"]}}, unwanted, own) == {unwanted[2]}
    for more in ("a.c", "a.>", ">"):
        assert unwanted[0] in touched({"publish": {"allow": ["a.b", more]}}, unwanted, own)


async def test_doctor_says_which_roles_and_users_there_are(tmp_path: Path, server: EmbeddedServer) -> None:
    wrong = await natsrt("doctor", "--as", "boss", "--server", server.url)
    assert wrong.code == 2 and all(role in wrong.stderr for role in ROLES)
    file = tmp_path / "bank.toml"
    file.write_text(BANK)
    wrong = await natsrt("doctor", "--as", "boss", "--declaration", str(file), "--server", server.url)
    assert wrong.code == 2 and "feed" in wrong.stderr


# -- recording ---------------------------------------------------------------------------------------------------------


async def test_a_recording_declares_what_a_running_system_does(tmp_path: Path, processes: Processes) -> None:
    declaration = parse(BANK, "bank")
    case = Case(declaration, "web", None)
    async with EmbeddedServer(config=configuration([case], tmp_path)) as server, AsyncExitStack() as stack:
        scene = Scene(server.url, case, stack)
        bank = await scene.worker("bank")
        recorder = processes.natsrt(
            *("auth", "record", "--server", server.url, "--user", "bank-plain", "--password", PASSWORD),
            *("--namespace", "bank"),
        )
        await eventually(lambda: "recording until" in recorder.stderr, timeout=15)
        web, feed = await scene.runtime("web"), await scene.runtime("feed")
        await web.send_message(Text("hi"), AgentId("ledger", "k"))
        await web.publish_message({"n": 1}, TopicId("news.sport", "s"))
        await feed.publish_message({"n": 1}, TopicId("orders", "s"))
        await bank.publish_message({"n": 1}, TopicId("booked", "s"), sender=AgentId("echo", "s"))
        await scene.ask("shop", "agent.echo", b'{"text":"hi"}')
        await eventually(lambda: len(scene.seen) == 3)  # the topic news.sport is nobody's
        recorder.send_signal(signal.SIGINT)
        assert await recorder.wait() == 0
    recorded = parse(recorder.stdout, "the recording")
    assert recorded.types["ledger"] == declaration.types["ledger"]
    users = recorded.users
    assert (users["bank"].role, set(users["bank"].hosts)) == ("worker", {"ledger", "echo"})
    assert users["bank"].publishes == ("booked",)
    assert (users["web"].role, users["web"].calls, users["web"].publishes) == ("caller", ("ledger",), ("news.sport",))
    assert (users["feed"].role, users["feed"].publishes) == ("publisher", ("orders",))
    assert (users["shop"].role, users["shop"].calls) == ("client", ("echo",))


HOSTILE = [
    "a",
    "a b",
    "a.b c",
    "",
    "*",
    "news*",
    ">",
    'q"]',
    "\n[users.x]\n",
    "é",
    "=",
    "x:y",
    "a." * 600,
    "a-b",
    "a_b",
    "A_B",
]
names = st.sampled_from(HOSTILE) | st.text(max_size=8)
prefixes = st.sampled_from(
    ['_INBOX"]', "_INBOX", "_INBOX_a-b", "_INBOX_a_b", "_INBOX_A_B", "_INBOX_a-b.c", "_INBOX_client", "_INBOX_caller.x"]
    + ["_INBOX_caller", "agent", "bank", "bank.natsrt", "$KV.x", "a-b", "a_b-2", "_INBOX_a_b-2", "", "1", "é"]
) | st.text(max_size=8)


@given(
    st.lists(
        st.tuples(st.sampled_from(["agent", "topic", "natsrt.control"]), names, prefixes, st.booleans(), st.booleans()),
        max_size=8,
    ),
    st.lists(st.tuples(names, prefixes, names), max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_what_a_recording_writes_can_be_read(
    messages: list[tuple[str, str, str, bool, bool]], workers: list[tuple[str, str, str]]
) -> None:
    recording = Recording(Subjects("bank"))
    view = View()
    for number, (name, prefix, agent_type) in enumerate(workers):
        worker = WorkerEntry(f"w{number}", name, "host", 1, 1.0, "1", inbox=f"{prefix}.nonce")
        view.workers[worker.worker_id] = worker
        view.hosts.setdefault(agent_type, {})[worker.worker_id] = TypeEntry(agent_type, worker.worker_id)
        rules = (Rule(agent_type, "type", name), Rule(agent_type, "prefix", name))
        view.declared[agent_type] = dict.fromkeys(rules, dict[str, SubscriptionEntry]())
    recording.registered(view)
    recording.take(Msg(None, "bank.agent.good", "_INBOX_good.x.y", b'"hi"'))
    for tree, name, prefix, is_runtime, replies in messages:
        body = b'{"specversion":"1.0","type":"natsrt.call","id":"r-1","source":"/","data":1}' if is_runtime else b'"hi"'
        with suppress(ValueError):  # a subject that nobody can send
            subject = f"bank.{tree}.{encode_token(name)}" + (".s" if tree == "topic" else "")
            recording.take(Msg(None, subject, f"{prefix}.r.r" if replies else "", body))
    recorded = parse(recording.toml("bank"), "the recording")
    assert "good" in recorded.types and conf(recorded)
