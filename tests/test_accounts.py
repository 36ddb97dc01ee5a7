"""The buckets in an account of their own: the configuration of docs/accounts.md works, and what it keeps users from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
import pytest_asyncio
from autogen_core import AgentId, MessageContext, RoutedAgent, rpc
from nats.aio.client import Client
from nats.aio.msg import Msg
from natsrt_cli.declaration import parse
from natsrt_cli.doctor import examine
from natsrt_cli.forbidden import forbidden
from natsrt_cli.role_check import sample

import natsrt
from natsrt import NatsAgentRuntime, register
from natsrt.embedded import FEATURE_FLAGS, EmbeddedServer
from natsrt.errors import StateNotSaved
from natsrt.options import Options
from tests.support.cli import natsrt as command
from tests.support.clients import settled
from tests.support.documents import accounts_declaration, blocks
from tests.support.processes import eventually
from tests.test_domains import Count

DECLARATION = parse(accounts_declaration(), "docs/accounts.md")
BLOCK, THIRD, IMPORTS = (
    next(block.text for block in blocks("conf") if block.path.name == "accounts.md" and block.remark == remark)
    for remark in ("", "third account", "imports from it")
)
RECORD = "$KV.natsrt_agents.a.account.x"
"""Where the record of a keyed agent is stored."""
IMPORTED = f"$JS.natsrt.API.{RECORD}"
"""Where users publish it to."""


@natsrt.keyed
class Account(Count):
    """The same, under the name of the type in docs/accounts.md."""


class Rates(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("rates")

    @rpc
    async def on_str(self, message: str, ctx: MessageContext) -> str:
        return message


@asynccontextmanager
async def serving(folder: Path, accounts: str) -> AsyncIterator[EmbeddedServer]:
    """A server with these accounts."""
    path = folder / "server.conf"
    for name in DECLARATION.users:
        accounts = accounts.replace(f"${name.upper()}_PASSWORD", "for-tests")
    path.write_text(f"jetstream {{}}\nmax_payload: 8MB\n{FEATURE_FLAGS}{accounts}")
    async with EmbeddedServer(config=path, data_dir=folder / "data", port=-1) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def documented(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with serving(tmp_path_factory.mktemp("accounts"), BLOCK) as server:
        yield server


def login(user: str) -> dict[str, str]:
    inbox = DECLARATION.users[user].inbox if user in DECLARATION.users else f"_INBOX_{user}"
    return {"user": user, "password": "for-tests", "inbox_prefix": inbox}


async def worker(stack: AsyncExitStack, url: str, user: str, agent: type[RoutedAgent], **settings: Any) -> Any:
    settings = {"jetstream_domain": "natsrt", "heartbeat_interval": 0.3, "heartbeat_ttl": 1.0, **settings}
    runtime = NatsAgentRuntime(url, **login(user), **settings)
    await register(runtime, agent, agent.__name__.lower(), agent)
    return await stack.enter_async_context(runtime)


async def test_the_documented_accounts_serve_workers_callers_and_operators(
    documented: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    one = AgentId("account", "one")
    async with AsyncExitStack() as stack:
        first = await worker(stack, documented.url, "ledger", Account, name="first")
        web = await stack.enter_async_context(NatsAgentRuntime(documented.url, **login("web")))
        assert not web.running.registry.reads_bucket
        assert await web.send_message(1, one) == 1
        second, _ = await asyncio.gather(
            worker(stack, documented.url, "ledger", Account, name="second"),
            worker(stack, documented.url, "quotes", Rates),
        )
        await eventually(lambda: first.health().workers == second.health().workers == web.health().workers == 3)
        assert await second.send_message(1, one) == 2
        for text in ("x", "x" * 9_000_000):  # the second one is sent by reference
            assert await first.send_message(text, AgentId("rates", "default")) == text
        assert (await first.running.records.read(one)).owner == first.running.worker_id
        assert await workers_stored(documented) == 3
        await first.stop()
        assert await web.send_message(1, one) == 3
        options = ["--server", documented.url, "--js-domain", "natsrt"]
        options += [part for name, value in login("ops").items() for part in (f"--{name.replace('_', '-')}", value)]
        listed = await command("state", "ls", *options)
        assert listed.code == 0 and "account/one" in listed.stdout, listed
        assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")], caplog.text
        await eventually(lambda: has_no_consumers(documented))
        findings = await examine(Options(servers=documented.url, jetstream_domain="natsrt", **login("ops")), None, ())
        assert not [finding for finding in findings if finding.level == "problem"], findings


async def workers_stored(server: EmbeddedServer) -> int:
    """How many workers the registry has, read by one request that has an answer for each."""
    async with connected(server, "ops") as client:
        answers = await client.subscribe(client.new_inbox())
        wanted = {"multi_last": ["$KV.natsrt_registry.r.worker.*"]}
        request = "$JS.natsrt.API.DIRECT.GET.KV_natsrt_registry"
        await client.publish(request, json.dumps(wanted).encode(), reply=answers.subject)
        found = 0
        while "Status" not in ((await answers.next_msg(5)).headers or {}):
            found += 1
        return found


async def has_no_consumers(server: EmbeddedServer) -> bool:
    async with connected(server, "ops") as client:
        info = await answer(client, "$JS.natsrt.API.STREAM.INFO.KV_natsrt_registry", {})
        return info["state"]["consumer_count"] == 0


@pytest.mark.parametrize("user", list(DECLARATION.users))
async def test_the_documented_users_are_refused_what_they_are_not_for(documented: EmbeddedServer, user: str) -> None:
    refused: list[str] = []
    requests = ["$JS.API.INFO", "$JS.API.STREAM.INFO.KV_natsrt_agents", RECORD]
    if user in ("quotes", "web"):
        requests += [
            IMPORTED,
            "$JS.natsrt.API.STREAM.PURGE.KV_natsrt_agents",
            "$JS.natsrt.API.STREAM.MSG.GET.KV_natsrt_agents",
            "$JS.natsrt.API.CONSUMER.CREATE.KV_natsrt_agents.x",
        ]
    never = forbidden(DECLARATION, DECLARATION.users[user])
    requests += [sample(grant.subject, "x") for grant in never if grant.operation == "publish"]
    async with connected(documented, user, refused) as client:
        for subject in requests:
            await client.publish(subject, b"")
        await eventually(lambda: len(refused) == len(requests), message=f"{requests} {refused}")


@asynccontextmanager
async def connected(server: EmbeddedServer, user: str, refused: list[str] | None = None) -> AsyncIterator[Client]:
    async def on_error(error: Exception) -> None:
        if refused is not None:
            refused.append(str(error))

    async with await nats.connect(server.url, **login(user), error_cb=on_error) as client:
        yield client


async def test_jetstream_that_is_full_is_named(tmp_path: Path) -> None:
    limited = BLOCK.replace("jetstream: enabled", "jetstream: { max_file: 500KB, max_mem: 1MB }")
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(tmp_path, limited))
        ledger = await worker(stack, server.url, "ledger", Account)
        with pytest.raises(StateNotSaved, match="the account's storage is full"):
            await ledger.send_message(1, AgentId("account", "one"))


# -- attacks -----------------------------------------------------------------------------------------------------------

USERS = """\
      { user: everything, password: "for-tests" }
      { user: outsider, password: "for-tests", permissions: { publish: { deny: [ "$JS.natsrt.>", "$KV.>" ] } } }
"""
"""One who may do everything, and one who may do everything but use the JetStream of the buckets."""
OWN_STREAM = "own.>"
REPUBLISHED = "own.again"


def with_users(accounts: str, more_imports: str = "") -> str:
    return accounts.replace("    users: [\n", f"    users: [\n{USERS}").replace(
        "    imports: [\n", f"    imports: [\n{more_imports}"
    )


def in_one_account() -> str:
    return f"authorization {{\n  users: [\n{USERS}  ]\n}}\n"


def with_own_jetstream() -> str:
    return with_users(BLOCK).replace("  AGENTS {", "  AGENTS {\n    jetstream: enabled")


def with_a_third_account() -> str:
    third, imported = ("".join(text.splitlines(keepends=True)[1:-1]) for text in (THIRD, IMPORTS))
    return with_users(BLOCK, imported).replace("accounts {\n", f"accounts {{\n{third}", 1)


def with_an_import_without_wildcards() -> str:
    pattern = (
        '{ service: { account: STATE, subject: "$KV.natsrt_agents.>" }, to: "$JS.natsrt.API.$KV.natsrt_agents.>" }'
    )
    literal = f'{{ service: {{ account: STATE, subject: "{RECORD}" }}, to: "{IMPORTED}" }}'
    assert pattern in BLOCK
    return with_users(BLOCK.replace(pattern, literal))


class Attack:
    """Two users, and the buckets, where one entry is in the registry and none among the agents."""

    def __init__(self, url: str, stack: AsyncExitStack, *, split: bool) -> None:
        self._url, self._stack = url, stack
        self._api, self.record = ("$JS.natsrt.API.", IMPORTED) if split else ("$JS.API.", RECORD)
        self._heard: list[bytes] = []
        """What was published to the record's subject in the users' account."""

    async def prepare(self, *, own: bool) -> None:
        self.everything, self.outsider = [
            await self._stack.enter_async_context(await nats.connect(self._url, **login(user)))
            for user in ("everything", "outsider")
        ]
        for bucket in ("KV_natsrt_registry", "KV_natsrt_agents"):
            await self.ask(f"STREAM.CREATE.{bucket}", name=bucket, subjects=[f"$KV.{bucket[3:]}.>"], allow_direct=True)
        await self.ask("CONSUMER.CREATE.KV_natsrt_registry.pull", **consumer("KV_natsrt_registry", "pull"))
        await self.everything.request(f"{'' if self._api == '$JS.API.' else self._api}$KV.natsrt_registry.k", b"entry")
        if own:
            republish = {"src": REPUBLISHED, "dest": self.record}
            stream = {"name": "OWN", "subjects": [OWN_STREAM], "allow_direct": True, "republish": republish}
            await answer(self.outsider, "$JS.API.STREAM.CREATE.OWN", stream)
            await answer(self.outsider, "$JS.API.CONSUMER.CREATE.OWN.pull", consumer("OWN", "pull"))
            await self.outsider.request("own.k", b"own")

        async def hear(message: Msg) -> None:
            self._heard.append(message.data)

        await self.everything.subscribe(self.record, cb=hear)
        await self.everything.subscribe(f"{self._api}STREAM.PURGE.KV_natsrt_registry", cb=hear)
        await settled(self.everything)

    async def ask(self, request: str, **body: Any) -> dict[str, Any]:
        return await answer(self.everything, f"{self._api}{request}", body)

    async def reaches(self, way: str) -> bool:
        """Whether something in a bucket has changed after the attack."""
        user, request, body, reply = WAYS[way]
        before = await self._buckets()
        self._heard.clear()
        reply = reply.format(api=self._api, record=self.record)
        client = self.everything if user == "everything" else self.outsider
        if reply:
            await client.publish(request.format(api=self._api), body, reply=reply)
            await eventually(lambda: self._heard, message=way)
        else:
            await client.request(request, body)
        await self._buckets()  # whatever the answer caused is before the answer to this
        return await self._buckets() != before

    async def _buckets(self) -> list[Any]:
        infos = [await self.ask(f"STREAM.INFO.{bucket}") for bucket in ("KV_natsrt_registry", "KV_natsrt_agents")]
        return [(info["state"]["messages"], info["state"]["last_seq"]) for info in infos]


WAYS = {
    "an answer of the buckets' JetStream": ("everything", "{api}STREAM.INFO.KV_natsrt_registry", b"", "{record}"),
    "an entry read": (
        "everything",
        "{api}DIRECT.GET.KV_natsrt_registry.$KV.natsrt_registry.k",
        b"",
        "{record}",
    ),
    "an entry pulled": ("everything", "{api}CONSUMER.MSG.NEXT.KV_natsrt_registry.pull", b"", "{record}"),
    "an answer as a request": (
        "everything",
        "{api}DIRECT.GET.KV_natsrt_registry",
        b'{"last_by_subj": "$KV.natsrt_registry.k"}',
        "{api}STREAM.PURGE.KV_natsrt_registry",
    ),
    "an answer of the server": ("outsider", "$SYS.REQ.USER.INFO", b"", "{record}"),
    "an answer of another JetStream": ("outsider", "$JS.API.STREAM.INFO.OWN", b"", "{record}"),
    "another message read": ("outsider", "$JS.API.DIRECT.GET.OWN.own.k", b"", "{record}"),
    "another message pulled": ("outsider", "$JS.API.CONSUMER.MSG.NEXT.OWN.pull", b"", "{record}"),
    "an acknowledgement": ("outsider", "own.k", b"", "{record}"),
    "a message republished": ("outsider", REPUBLISHED, b"", ""),
}
"""Ways to have something delivered to a record's subject: the user, the request, its body and its reply subject."""
OF_STREAMS = list(WAYS)[5:]
"""Those that need a stream of the user's own."""


def consumer(stream: str, name: str, **more: Any) -> dict[str, Any]:
    return {"stream_name": stream, "config": {"name": name, "deliver_policy": "all", "ack_policy": "none", **more}}


async def answer(client: Client, subject: str, body: dict[str, Any]) -> dict[str, Any]:
    found = json.loads((await client.request(subject, json.dumps(body).encode() if body else b"", timeout=5)).data)
    assert "error" not in found, found
    return found


@pytest.mark.parametrize(
    ("accounts", "own", "reaching"),
    [
        (with_users(BLOCK), False, set()),
        (with_a_third_account(), True, set()),
        (in_one_account(), False, set(WAYS) - set(OF_STREAMS)),
        (with_own_jetstream(), True, set(OF_STREAMS) - {"an answer of another JetStream"}),
        (
            with_an_import_without_wildcards(),
            False,
            {"an answer of the buckets' JetStream", "an entry read", "an answer of the server", "an entry pulled"},
        ),
    ],
    ids=[
        "as documented",
        "streams of users in a third account",
        "one account for all",
        "streams of users in the agents' account",
        "an import without wildcards",
    ],
)
async def test_answers_reach_the_buckets_only_where_the_documents_say_so(
    tmp_path: Path, accounts: str, own: bool, reaching: set[str]
) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(tmp_path, accounts))
        attack = Attack(server.url, stack, split="STATE" in accounts)
        await attack.prepare(own=own)
        tried = [way for way in WAYS if own or way not in OF_STREAMS]
        assert {way for way in tried if await attack.reaches(way)} == reaching


async def test_a_worker_without_keyed_types_has_nothing_delivered_to_a_record(documented: EmbeddedServer) -> None:
    async with AsyncExitStack() as stack:
        ledger = await worker(stack, documented.url, "ledger", Account)
        two = AgentId("account", "two")
        assert await ledger.send_message(1, two) == 1
        before = await ledger.running.records.read(two)
        async with connected(documented, "quotes") as quotes:
            api = "$JS.natsrt.API.CONSUMER"
            pushing = consumer("KV_natsrt_registry", "push", deliver_subject="$KV.natsrt_agents.a.account.two")
            await answer(quotes, f"{api}.CREATE.KV_natsrt_registry.push", pushing)
            info = await answer(quotes, f"{api}.INFO.KV_natsrt_registry.push", {})
            await answer(quotes, f"{api}.DELETE.KV_natsrt_registry.push", {})
        assert info["num_pending"] > 0 and not info.get("push_bound") and info["delivered"]["consumer_seq"] == 0
        assert await ledger.running.records.read(two) == before
