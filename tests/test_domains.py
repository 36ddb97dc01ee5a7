"""JetStream domains: a hub with a leaf node that has a JetStream of its own, and clusters joined by gateways."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, event, rpc
from natsrt_cli.declaration import parse
from natsrt_cli.doctor import examine
from natsrt_cli.grant import PUBLISH, SUBSCRIBE
from natsrt_cli.permissions import grants

import natsrt
from natsrt import NatsAgentRuntime, register
from natsrt.embedded import EmbeddedServer
from natsrt.errors import JetStreamRequired, RegistryUnavailable, StateUnavailable
from natsrt.jetstream.domains import Domain
from natsrt.options import Options
from tests.support.processes import eventually
from tests.support.topology import has_leader, hub_and_leaf, supercluster


@natsrt.keyed
class Count(RoutedAgent):
    """Adds up what it is sent."""

    def __init__(self) -> None:
        super().__init__("count")
        self.total = 0

    @rpc
    async def on_int(self, message: int, ctx: MessageContext) -> int:
        self.total += message
        return self.total

    async def save_state(self) -> dict[str, Any]:
        return {"total": self.total, "bulk": "x" * 700_000}  # more than a record holds

    async def load_state(self, state: Any) -> None:
        self.total = state["total"]


class Echo(RoutedAgent):
    """Returns what it is sent, and remembers events."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__("echo")
        self.seen = seen

    @rpc
    async def on_bytes(self, message: bytes, ctx: MessageContext) -> bytes:
        return message

    @event
    async def on_str(self, message: str, ctx: MessageContext) -> None:
        self.seen.append(message)


async def worker(stack: AsyncExitStack, url: str, name: str, **settings: Any) -> NatsAgentRuntime:
    settings = {"heartbeat_interval": 0.3, "heartbeat_ttl": 1.0, **settings}
    runtime = NatsAgentRuntime(url, name=name, **settings)
    await register(runtime, Count, "count", Count)
    return await stack.enter_async_context(runtime)


@pytest.mark.parametrize(
    ("hub_domain", "leaf_domain", "here", "there"),
    [("hub", None, "hub", None), ("hub", "leaf", "hub", None), ("hub", "leaf", "hub", "hub")],
    ids=["a leaf without JetStream", "a leaf with its own", "the hub's is named there too"],
)
async def test_workers_on_a_leaf_node_use_the_hubs_jetstream(
    tmp_path: Path, hub_domain: str | None, leaf_domain: str | None, here: str | None, there: str | None
) -> None:
    seen: list[str] = []
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(
            hub_and_leaf(tmp_path, hub_domain=hub_domain, leaf_domain=leaf_domain)
        )
        hub = await worker(stack, servers.hub.url, "at-hub", jetstream_domain=there)
        leaf = await worker(stack, servers.leaf.url, "at-leaf", jetstream_domain=here)
        await register(leaf, Echo, "echo", lambda: Echo(seen))
        await leaf.add_subscription(TypeSubscription("news", "echo"))
        await eventually(lambda: hub.health().workers == leaf.health().workers == 2)
        totals = [await runtime.send_message(1, AgentId("count", "k")) for runtime in (hub, leaf, hub, leaf)]
        assert totals == [1, 2, 3, 4]
        await hub.publish_message("x", TopicId("news", "s"))
        await eventually(lambda: seen == ["x"])
        record = await leaf.running.records.read(AgentId("count", "k"))
        owner = hub if record is not None and record.owner == hub.running.worker_id else leaf
        await owner.stop()
        other = leaf if owner is hub else hub
        assert await other.send_message(1, AgentId("count", "k")) == 5
        if leaf_domain is not None:
            async with await nats.connect(servers.leaf.url) as client:
                assert await client.jetstream().streams_info() == []


class Picky(RoutedAgent):
    """Does with an event what it says, and remembers the attempts of those that it handled."""

    def __init__(self, attempts: list[int]) -> None:
        super().__init__("picky")
        self._attempts = attempts

    @event
    async def on_str(self, message: str, ctx: MessageContext) -> None:
        delivery = natsrt.current_delivery()
        assert delivery is not None
        if message == "reject":
            raise natsrt.Reject("no")
        if message == "later" or (message == "again" and delivery.attempt < 3):
            raise natsrt.Retry(after=3600 if message == "later" else 0.05)
        self._attempts.append(delivery.attempt)


@pytest.mark.parametrize("leaf_domain", [None, "leaf"])
async def test_events_of_durable_topics_are_settled_at_a_leaf_node(tmp_path: Path, leaf_domain: str | None) -> None:
    attempts: list[int] = []
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(hub_and_leaf(tmp_path, hub_domain="hub", leaf_domain=leaf_domain))
        settings: dict[str, Any] = {"jetstream_domain": "hub", "durable": ["work."]}
        leaf = await stack.enter_async_context(NatsAgentRuntime(servers.leaf.url, **settings))
        await register(leaf, Picky, "picky", lambda: Picky(attempts))
        await leaf.add_subscription(TypeSubscription("work.x", "picky"))
        for text in ("reject", "later", "again"):
            await leaf.publish_message(text, TopicId("work.x", "s"))
        await eventually(lambda: attempts == [3], 15.0)
        await eventually(lambda: leaf.health().dead_letters == 1, 15.0)
        [letter] = [letter async for letter in leaf.dead_letters()]
        assert letter.reason == "no"
        assert await leaf.running.network.later.count("natsrt_events") == {"picky": 1}


async def test_what_vanished_at_the_hub_is_stored_again_from_the_leaf(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(hub_and_leaf(tmp_path))
        leaf = await worker(stack, servers.leaf.url, "at-leaf", jetstream_domain="hub")
        client = await stack.enter_async_context(await nats.connect(servers.hub.url))
        await client.jetstream().delete_stream("KV_natsrt_registry")
        hub = await worker(stack, servers.hub.url, "at-hub")
        await eventually(lambda: hub.health().workers == leaf.health().workers == 2, timeout=15)


async def test_a_worker_with_a_newer_registry_of_its_own_does_not_start_beside_the_hubs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(hub_and_leaf(tmp_path))
        hub = await worker(stack, servers.hub.url, "at-hub")
        assert await hub.send_message(1, AgentId("count", "k")) == 1
        for _ in range(3):  # as a supervisor starts it again and again
            with pytest.raises(RegistryUnavailable) as raised:
                await worker(stack, servers.leaf.url, "at-leaf")
            assert "set jetstream_domain to 'hub'" in str(raised.value)
            assert "this runtime's is in JetStream domain 'leaf'" in str(raised.value)
        assert hub.ready and hub.health().workers == 1
        assert (hub.health().foreign_registry or "").endswith(" leaf")
        assert "this runtime's is in JetStream domain 'hub'" in caplog.text
        assert await hub.send_message(1, AgentId("count", "k")) == 2
        async with await nats.connect(servers.hub.url) as client:
            info = await client.jetstream().stream_info("KV_natsrt_registry", subjects_filter=">")
            assert not any("at-leaf" in subject for subject in info.state.subjects or {})


@pytest.mark.parametrize("hub_domain", ["hub", None], ids=["named", "the hub's domain has no name"])
async def test_of_two_registries_that_meet_later_the_newer_owns_no_more_keyed_agents(
    tmp_path: Path, hub_domain: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(hub_and_leaf(tmp_path, hub_domain=hub_domain, joined=False))
        hub = await worker(stack, servers.hub.url, "at-hub")
        leaf = await worker(stack, servers.leaf.url, "at-leaf")
        assert await leaf.send_message(1, AgentId("count", "there")) == 1
        await servers.link.restore()
        await eventually(lambda: leaf.health().foreign_registry and hub.health().foreign_registry, timeout=30)
        assert hub.ready and not leaf.ready
        assert "There are two registries natsrt_registry" in " ".join(leaf.health().reasons)
        assert hub.health().workers == leaf.health().workers == 1
        assert caplog.text.count("There are two registries") == 2
        findings = await examine(Options(servers=servers.hub.url), None, ())
        found = next(finding for finding in findings if finding.check == "other registries")
        assert found.level == "problem" and found.text.startswith(leaf.running.worker_id)
        with pytest.raises(StateUnavailable, match="There are two registries"):
            await leaf.send_message(1, AgentId("count", "k"))
        assert await hub.send_message(1, AgentId("count", "k")) == 1


async def test_a_registry_is_announced_although_the_worker_that_should_do_it_hangs(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(hub_and_leaf(tmp_path, hub_domain=None, joined=False))
        await worker(stack, servers.hub.url, "at-hub")  # it announces nothing by itself: its domain has no name
        first = await worker(stack, servers.leaf.url, "a")
        second = await worker(stack, servers.leaf.url, "b")
        await eventually(lambda: first.health().workers == 2)
        await first.running.registry._integrity.stop()
        await servers.link.restore()
        await eventually(lambda: second.health().foreign_registry, timeout=30)
        assert not second.ready


async def test_two_registries_with_a_namespace_each_do_not_meet(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(hub_and_leaf(tmp_path))
        hub = await worker(stack, servers.hub.url, "at-hub", namespace="h")
        leaf = await worker(stack, servers.leaf.url, "at-leaf", namespace="l")
        assert (
            await hub.send_message(1, AgentId("count", "k")) == await leaf.send_message(1, AgentId("count", "k")) == 1
        )
        assert hub.ready and leaf.ready and hub.health().foreign_registry is leaf.health().foreign_registry is None
        findings = await examine(Options(servers=servers.hub.url, namespace="h"), None, ())
        assert "other registries" not in {finding.check for finding in findings}


async def test_on_a_leaf_node_without_jetstream_the_setting_is_named(tmp_path: Path) -> None:
    async with hub_and_leaf(tmp_path, leaf_domain=None) as servers:
        with pytest.raises(JetStreamRequired, match="set jetstream_domain to the domain of its hub"):
            await NatsAgentRuntime(servers.leaf.url).start()


async def test_a_domain_that_is_not_there_is_named(tmp_path: Path) -> None:
    async with hub_and_leaf(tmp_path) as servers:
        with pytest.raises(RegistryUnavailable, match="reaches no JetStream domain 'hbu': see jetstream_domain"):
            await NatsAgentRuntime(servers.leaf.url, jetstream_domain="hbu").start()


async def test_a_runtime_whose_hub_is_away_comes_back_with_it(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(hub_and_leaf(tmp_path))
        hub = await worker(stack, servers.hub.url, "at-hub")
        leaf = await worker(stack, servers.leaf.url, "at-leaf", jetstream_domain="hub")
        assert await leaf.send_message(1, AgentId("count", "k")) == 1
        servers.link.cut()
        await eventually(lambda: not leaf.ready and hub.health().workers == 1, timeout=30)
        assert leaf.health().connected and not leaf.health().in_step
        await eventually(lambda: "reaches no JetStream domain 'hub'" in " ".join(leaf.health().reasons), timeout=15)
        with pytest.raises(RegistryUnavailable, match="reaches no JetStream domain 'hub'"):
            await NatsAgentRuntime(servers.leaf.url, jetstream_domain="hub").start()
        await servers.link.restore()
        await servers.joined()
        await eventually(lambda: leaf.ready and leaf.health().workers == hub.health().workers == 2, timeout=30)
        assert await leaf.send_message(1, AgentId("count", "k")) == 2


async def test_a_side_of_a_supercluster_without_the_other_does_not_say_that_jetstream_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        east, west = await stack.enter_async_context(supercluster(tmp_path))
        there = await worker(stack, west.url, "west")  # its side has the buckets
        here = await worker(stack, east.url, "east")
        await eventually(lambda: here.health().workers == there.health().workers == 2, timeout=15)
        assert await here.send_message(1, AgentId("count", "k")) == 1
        assert await there.send_message(1, AgentId("count", "k")) == 2
        await there.stop()
        await west.stop()
        await eventually(lambda: is_leaderless(east), timeout=30)
        await eventually(lambda: not here.ready, timeout=30)
        assert here.health().connected and "not in step with the registry. " in here.health().reasons[0]
        for namespace in ("", "new"):  # with a registry, and without
            late = NatsAgentRuntime(east.url, namespace=namespace)
            with pytest.raises(natsrt.NatsrtError) as raised:
                await asyncio.wait_for(late.start(), 20)
            assert not isinstance(raised.value, JetStreamRequired), str(raised.value)
            assert "without JetStream" not in str(raised.value) + caplog.text
        await west.start()
        await eventually(lambda: has_leader(east), timeout=60)
        async with NatsAgentRuntime(east.url, connect_timeout=10) as again:
            assert again.ready
        await eventually(lambda: here.ready, timeout=30)


async def is_leaderless(server: EmbeddedServer) -> bool:
    return not await has_leader(server)


def test_the_subjects_of_a_domain() -> None:
    hub, own = Domain("Hub"), Domain(None)
    assert hub.api("STREAM.INFO.S") == "$JS.Hub.API.STREAM.INFO.S"
    assert own.api("STREAM.INFO.S") == "$JS.API.STREAM.INFO.S"
    assert hub.publish("$KV.b.k") == "$JS.Hub.API.$KV.b.k"
    assert own.publish("$KV.b.k") == "$KV.b.k"
    assert hub.plain("$js.hub.api.$kv.b.k") == own.plain("$KV.b.k") == "$kv.b.k"
    assert hub.plain("$JS.Hub.API.INFO") == own.plain("$JS.API.INFO") == "$js.api.info"
    assert hub.plain("$js.api.info") == "$js.api.info"


async def test_the_generated_permissions_are_enough_at_a_leaf_node_and_a_caller_there_reads_the_registry_from_workers(
    tmp_path: Path,
) -> None:
    declaration = parse(
        """
        jetstream_domain = "hub"
        [types.count]
        keyed = true
        [users.bank]
        role = "worker"
        hosts = ["count"]
        [users.web]
        role = "caller"
        calls = ["count"]
        """,
        "the test",
    )
    users = []
    for user in declaration.users.values():
        allowed = {
            operation: [grant.subject for grant in grants(declaration, user) if grant.operation == operation]
            for operation in (PUBLISH, SUBSCRIBE)
        }
        users.append({"user": user.name, "password": user.name, "permissions": allowed})
    rules = f"authorization {{ users: {json.dumps(users)} }}\n"
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(hub_and_leaf(tmp_path, leaf_domain=None, joined=False, at_leaf=rules))
        await servers.link.restore()

        def login(name: str) -> dict[str, str]:
            inbox = declaration.users[name].inbox
            return {"user": name, "password": name, "inbox_prefix": inbox, "jetstream_domain": "hub"}

        await worker(stack, servers.leaf.url, "bank", **login("bank"))
        web = await stack.enter_async_context(NatsAgentRuntime(servers.leaf.url, **login("web")))
        assert not web.running.registry.reads_bucket
        assert await web.send_message(2, AgentId("count", "one")) == 2
