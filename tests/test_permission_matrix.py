"""Each permission that natsrt generates is necessary and sufficient.

See `tests.support.permission_matrix`. ``tests/test_durable_permissions.py`` has those of durable topics.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import pytest
from autogen_core import AgentId, CancellationToken, TopicId
from natsrt_cli.declaration import parse
from natsrt_cli.exits import Exit
from natsrt_cli.grant import Grant
from natsrt_cli.permissions import grants

from natsrt import NatsAgentRuntime
from natsrt.errors import UnknownAgentType
from tests.support.clients import settled
from tests.support.permission_matrix import Matrix, label
from tests.support.permission_scene import Scene, Text
from tests.support.permission_tests import MatrixTests
from tests.support.processes import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

DECLARATION = parse(
    """
    [types.ledger]
    keyed = true
    subscribes = ["orders"]
    [types.echo]
    subscribes = ["news"]
    [types.vault]
    keyed = true
    [types.desk]
    instances = true
    subscribes = ["bell"]

    [users.bank]
    role = "worker"
    hosts = ["ledger", "echo"]
    calls = ["vault", "desk"]
    publishes = ["bell"]
    controls = ["vault", "desk"]
    subscribes = ["later"]
    [users.safe]
    role = "worker"
    hosts = ["vault", "desk"]
    calls = ["echo"]
    controls = ["echo"]
    [users.web]
    role = "caller"
    calls = ["echo", "ledger", "desk"]
    publishes = ["orders", "news"]
    [users.feed]
    role = "publisher"
    publishes = ["orders", "news"]
    [users.shop]
    role = "client"
    calls = ["echo"]
    publishes = ["news"]
    [users.look]
    role = "tool"
    calls = ["echo"]
    subscribes = ["news"]
    [users.ops]
    role = "operator"
    [users.free]
    role = "worker"
    hosts = ["*"]
    calls = ["*"]
    publishes = ["*"]
    controls = ["*"]
    """,
    "the matrix",
)


def _permissions() -> list[tuple[str, Grant]]:
    """Every permission of every user; of ``free`` those that ``bank`` lacks. ``safe`` is a worker such as ``bank``."""
    own = {name: grants(DECLARATION, user) for name, user in DECLARATION.users.items() if name != "safe"}
    shared = {label(grant) for grant in own["bank"]}
    own["free"] = [grant for grant in own["free"] if label(grant) not in shared]
    return [(name, grant) for name, all_of_it in own.items() for grant in all_of_it]


MATRIX = Matrix(DECLARATION, _permissions(), "m")
needs = MATRIX.needs
RESTORED = '{"type":"ledger","key":"one","state":{"kept":"from elsewhere"}}\n'
LEDGER, ECHO, VAULT, DESK = (AgentId(name, "one") for name in ("ledger", "echo", "vault", "desk"))
HI = Text("hi")


async def within(seconds: float, awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(seconds):
        return await awaitable


# -- a worker ----------------------------------------------------------------------------------------------------------


@needs(
    "bank",
    "subscribe to _INBOX_bank.>",
    "subscribe to natsrt.registry.>",
    "subscribe to agent.ledger",
    "subscribe to agent.echo",
    "subscribe to natsrt.control.ledger",
    "subscribe to natsrt.control.ledger.at.*",
    "subscribe to natsrt.control.echo",
    "subscribe to topic.ledger=3A.*.>",
    "subscribe to topic.orders.*",
    "subscribe to topic.echo=3A.*.>",
    "subscribe to topic.news.*",
    "subscribe to natsrt.worker.*",
    "subscribe to natsrt.peer.*",
    "publish to $KV.natsrt_registry.>",
    "publish to $JS.API.INFO",
    "publish to $JS.API.STREAM.CREATE.KV_natsrt_registry",
    "publish to $JS.API.STREAM.INFO.KV_natsrt_registry",
    "publish to $JS.API.DIRECT.GET.KV_natsrt_registry.>",
    "publish to $JS.API.CONSUMER.CREATE.KV_natsrt_registry.>",
    "publish to $JS.API.CONSUMER.INFO.KV_natsrt_registry.>",
)
async def starts_in_an_empty_account(scene: Scene) -> None:
    await scene.worker("bank")


@needs("bank", "publish to $JS.API.CONSUMER.MSG.NEXT.KV_natsrt_registry.>")
async def starts_beside_another_worker(scene: Scene) -> None:
    await scene.worker("safe")
    await scene.worker("bank")


@needs("bank", "publish to $JS.API.CONSUMER.DELETE.KV_natsrt_registry.>")
async def leaves_no_consumer_when_it_has_read_the_registry(scene: Scene) -> None:
    safe = await scene.worker("safe")
    await scene.worker("bank")
    await eventually(lambda: has_no_consumers(safe, scene, "natsrt_registry"))


async def has_no_consumers(runtime: NatsAgentRuntime, scene: Scene, bucket: str) -> bool:
    js = runtime.running.connection.jetstream
    return (await js.stream_info(f"KV_{scene.case.declaration.namespace}_{bucket}")).state.consumer_count == 0


@needs("bank", "publish to $JS.API.DIRECT.GET.KV_natsrt_registry")
async def stores_again_what_has_vanished(scene: Scene) -> None:
    safe, bank = await scene.worker("safe"), await scene.worker("bank")
    js = safe.running.connection.jetstream
    stream = f"KV_{scene.case.declaration.namespace}_natsrt_registry"
    entry = f"$KV.{stream[3:]}.r.worker.{bank.worker_id}"
    await js.purge_stream(stream, subject=entry)

    async def is_stored() -> bool:
        return entry in ((await js.stream_info(stream, subjects_filter=entry)).state.subjects or {})

    await eventually(is_stored, timeout=20)


@needs("bank", "publish to $JS.API.STREAM.PURGE.KV_natsrt_registry")
async def leaves_nothing_when_it_stops(scene: Scene) -> None:
    safe, bank = await scene.worker("safe"), await scene.worker("bank")
    await bank.stop()
    await eventually(lambda: len(safe.running.registry.view.workers) == 1)
    js = safe.running.connection.jetstream
    stream = f"KV_{scene.case.declaration.namespace}_natsrt_registry"
    info = await js.stream_info(stream, subjects_filter=f"$KV.{stream[3:]}.hb.>")
    assert len(info.state.subjects or {}) == 1


@needs(
    "bank",
    "subscribe to agent.ledger.*",
    "publish to _INBOX_web.>",
    "publish to $KV.natsrt_agents.>",
    "publish to $JS.API.STREAM.CREATE.KV_natsrt_agents",
    "publish to $JS.API.STREAM.INFO.KV_natsrt_agents",
)
async def answers_calls_to_keyed_agents(scene: Scene) -> None:
    await scene.worker("bank")
    web = await scene.runtime("web")
    assert await web.send_message(HI, LEDGER) == HI


@needs("bank", "publish to _INBOX_bank.>")
async def answers_its_own_calls(scene: Scene) -> None:
    bank = await scene.worker("bank")
    other = await scene.worker("bank")
    await other.running.network.peers.links(bank.running.registry.peer_subject(str(bank.worker_id)), ["x"])
    assert await other.running.network.peers.alive(str(bank.worker_id), 3.0)


@needs("bank", "publish to _INBOX_shop.>")
async def answers_clients(scene: Scene) -> None:
    await scene.worker("bank")
    assert json.loads((await scene.ask("shop", "agent.echo", b'{"text":"hi"}')).data) == {"text": "hi"}


@needs("bank", "publish to _INBOX_safe.>")
async def answers_workers(scene: Scene) -> None:
    await scene.worker("bank")
    safe = await scene.worker("safe")
    assert await safe.send_message(HI, ECHO) == HI
    assert await safe.agent_save_state(ECHO) == {"kept": "small"}


@needs("bank", "publish to _INBOX_feed.>", "subscribe to natsrt.view")
async def tells_publishers_what_is_in_the_registry(scene: Scene) -> None:
    await scene.worker("bank")
    await scene.runtime("feed")


@needs("bank", "publish to _INBOX_look.>")
async def answers_tools(scene: Scene) -> None:
    await scene.worker("bank")
    await scene.command("look", "agents", "ping")


@needs("bank", "publish to _INBOX_ops.>", "subscribe to $SRV.>")
async def answers_operators(scene: Scene) -> None:
    await scene.worker("bank")
    assert (await scene.command("ops", "agents", "stats", "--json")).json


@needs("bank", "publish to agent.vault", "publish to agent.vault.*")
async def calls_keyed_agents_of_others(scene: Scene) -> None:
    await scene.worker("safe")
    bank = await scene.worker("bank")
    assert await bank.send_message(HI, VAULT) == HI


@needs("bank", "publish to agent.desk.*")
async def calls_instances_of_others(scene: Scene) -> None:
    await scene.worker("safe")
    bank = await scene.worker("bank")
    assert await bank.send_message(HI, DESK) == HI


@needs("bank", "publish to topic.bell.*")
async def publishes_events(scene: Scene) -> None:
    await scene.worker("safe")
    bank = await scene.worker("bank")
    await bank.publish_message({"ring": 1}, TopicId("bell", "one"))
    await eventually(lambda: {"ring": 1} in scene.seen)


@needs("bank", "subscribe to topic.later.*")
async def adds_subscriptions_later(scene: Scene) -> None:
    from autogen_core import TypeSubscription

    bank = await scene.worker("bank")
    await bank.add_subscription(TypeSubscription("later", "echo"))
    assert "later" not in [interest.subject for interest in bank.running.connection.refusals]
    assert not bank.running.connection.refusals


@needs("bank", "publish to natsrt.control.vault.at.*", "publish to natsrt.control.desk.*")
async def reads_states_of_others(scene: Scene) -> None:
    await scene.worker("safe")
    bank = await scene.worker("bank")
    assert await bank.agent_save_state(VAULT) == {"kept": "small"}
    assert await bank.agent_save_state(DESK) == {"kept": "small"}


@needs("bank", "publish to natsrt.cancel")
async def cancels_calls(scene: Scene) -> None:
    await scene.worker("safe")
    bank = await scene.worker("bank")
    await cancels(scene, bank, DESK)


@needs("bank", "subscribe to natsrt.cancel")
async def hears_that_calls_are_cancelled(scene: Scene) -> None:
    await scene.worker("bank")
    await cancels(scene, await scene.runtime("web"), ECHO)


async def cancels(scene: Scene, runtime: NatsAgentRuntime, agent: AgentId) -> None:
    token = CancellationToken()
    call = asyncio.ensure_future(runtime.send_message(Text("wait"), agent, cancellation_token=token))
    await eventually(lambda: Text("wait") in scene.seen)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await eventually(lambda: "cancelled" in scene.seen)


@needs("bank", "publish to natsrt.worker.*")
async def waits_for_types_of_others(scene: Scene) -> None:
    await scene.worker("safe")
    bank = await scene.worker("bank")
    await bank.wait_for("vault", timeout=5)
    await bank.wait_for("desk", timeout=5)


@needs("bank", "publish to natsrt.peer.*")
async def asks_other_workers_as_one_of_them(scene: Scene) -> None:
    safe, bank = await scene.worker("safe"), await scene.worker("bank")
    registry = bank.running.registry
    await bank.running.network.peers.links(registry.peer_subject(str(safe.worker_id)), ["x"])
    assert ".natsrt.peer." in registry.peer_subject(str(safe.worker_id))


@needs("bank", "publish to agent.ledger", "publish to agent.ledger.*")
async def forwards_to_the_owner(scene: Scene) -> None:
    await scene.worker("bank"), await scene.worker("bank")
    client = await scene.client("ops")
    for number in range(12):  # each to any of the two workers
        body = json.dumps({"text": str(number)}).encode()
        answer = await client.request(scene.subject("agent.ledger"), body, timeout=5, headers={"Natsrt-Key": "one"})
        assert json.loads(answer.data) == {"text": str(number)}


@needs("bank", "publish to natsrt.control.ledger.at.*")
async def forwards_control_to_the_owner(scene: Scene) -> None:
    await scene.worker("bank"), await scene.worker("bank")
    web, client = await scene.runtime("web"), await scene.client("ops")
    assert await web.send_message(HI, LEDGER) == HI
    body = {"specversion": "1.0", "type": "natsrt.control", "id": "1", "source": "/", "subject": "one"}
    question = json.dumps({**body, "operation": "save_state", "data": None}).encode()
    for _ in range(12):
        answer = await client.request(scene.subject("natsrt.control.ledger"), question, timeout=5)
        assert json.loads(answer.data)["data"] == {"kept": "small"}


@needs(
    "bank",
    "publish to $JS.API.STREAM.MSG.GET.KV_natsrt_agents",
    "publish to $JS.API.DIRECT.GET.KV_natsrt_agents.>",
)
async def keeps_large_states(scene: Scene) -> None:
    first = await scene.worker("bank")
    large = {"kept": "x" * 600_000}
    for state in (large, {"kept": "small"}, large):
        await first.agent_load_state(LEDGER, state)
        await first.store_state(LEDGER)
    second = await scene.worker("bank")
    await first.stop()
    assert await second.agent_save_state(LEDGER) == large


@needs("bank", "publish to $JS.API.STREAM.PURGE.KV_natsrt_agents")
async def keeps_nothing_of_former_states(scene: Scene) -> None:
    bank = await scene.worker("bank")
    for state in ({"kept": "x" * 600_000}, {"kept": "small"}):
        await bank.agent_load_state(LEDGER, state)
        await bank.store_state(LEDGER)
    js, stream = bank.running.connection.jetstream, f"KV_{scene.case.declaration.namespace}_natsrt_agents"

    async def is_small() -> bool:
        return int((await js.stream_info(stream)).state.bytes) < 100_000

    await eventually(is_small)


@needs(
    "free",
    "subscribe to _INBOX_free.>",
    "subscribe to agent.>",
    "subscribe to natsrt.control.>",
    "subscribe to topic.*.>",
)
async def hosts_everything(scene: Scene) -> None:
    await scene.worker("free")


@needs("free", "publish to agent.>", "publish to topic.*.>", "publish to natsrt.control.>")
async def calls_publishes_and_controls_everything(scene: Scene) -> None:
    await scene.worker("bank")
    await scene.worker("safe")
    free = await scene.runtime("free")
    assert await free.send_message(HI, VAULT) == HI
    assert await free.agent_save_state(VAULT) == {"kept": "small"}
    await publishes_orders_and_news(scene, free)


@needs("free")
async def is_told_that_a_type_is_unknown(scene: Scene) -> None:
    await scene.worker("bank")
    with pytest.raises(UnknownAgentType, match="echo"):
        await (await scene.runtime("free")).send_message(HI, AgentId("nobody", "one"))


@needs("bank", "publish to _INBOX_free.>")
async def answers_workers_of_everything(scene: Scene) -> None:
    await scene.worker("bank")
    assert await (await scene.runtime("free")).send_message(HI, ECHO) == HI


# -- payloads by reference ---------------------------------------------------------------------------------------------

LARGE = Text("x" * 2_000_000)
"""Twice as much as this server takes in one message."""
IN_STREAM = tuple(
    f"publish to {subject}"
    for subject in (
        "natsrt.blob.*.*",
        "$JS.API.STREAM.CREATE.natsrt_blobs",
        "$JS.API.STREAM.INFO.natsrt_blobs",
        "$JS.API.STREAM.PURGE.natsrt_blobs",
        "$JS.API.DIRECT.GET.natsrt_blobs.>",
    )
)
AT_WORKERS = ("publish to natsrt.blobs",)


async def has_no_chunks(runtime: NatsAgentRuntime, scene: Scene) -> bool:
    js = runtime.running.connection.jetstream
    return not (await js.stream_info(f"{scene.case.declaration.namespace}_natsrt_blobs")).state.messages


@needs("bank", *IN_STREAM)
async def calls_with_large_payloads(scene: Scene) -> None:
    bank = await scene.worker("bank")
    assert await bank.send_message(LARGE, LEDGER) == LARGE
    await eventually(lambda: has_no_chunks(bank, scene))


@needs("bank", "subscribe to natsrt.blobs")
@needs("web", *AT_WORKERS)
async def calls_workers_with_large_payloads(scene: Scene) -> None:
    bank, web = await scene.worker("bank"), await scene.runtime("web")
    assert await web.send_message(LARGE, LEDGER) == LARGE
    await eventually(lambda: has_no_chunks(bank, scene))


@needs("feed", *AT_WORKERS)
async def publishes_large_events(scene: Scene) -> None:
    await scene.worker("bank")
    feed = await scene.runtime("feed")
    await feed.publish_message({"text": LARGE.text}, TopicId("orders", "one"))
    await eventually(lambda: {"text": LARGE.text} in scene.seen)


@needs("ops", *(permission for permission in IN_STREAM if "INFO" not in permission))
async def calls_as_an_operator_with_large_payloads(scene: Scene) -> None:
    bank = await scene.worker("bank")
    assert await (await scene.runtime("ops")).send_message(LARGE, LEDGER) == LARGE
    await eventually(lambda: has_no_chunks(bank, scene))


@needs("look", *AT_WORKERS)
async def sends_a_large_body(scene: Scene) -> None:
    await scene.worker("bank")
    body = json.dumps({"text": LARGE.text})
    sent = await scene.command("look", "send", "echo", "--type-name", "Text", "-", stdin=body)
    assert len(sent.stdout) > len(LARGE.text)


@needs("ops", "publish to $JS.API.STREAM.INFO.natsrt_blobs")
async def examines_large_payloads(scene: Scene) -> None:
    bank = await scene.worker("bank")
    assert await bank.send_message(LARGE, LEDGER) == LARGE
    findings = {finding["check"]: finding for finding in (await scene.command("ops", "doctor", "--json")).json}
    assert findings["large payloads"]["level"] == "ok"


# -- a caller, a publisher and a client --------------------------------------------------------------------------------


@needs("web", "subscribe to _INBOX_web.>", "subscribe to natsrt.registry.>", "publish to natsrt.view")
async def starts(scene: Scene) -> None:
    await scene.worker("bank")
    web = await scene.runtime("web")
    await scene.worker("safe")
    await eventually(lambda: "desk" in web.running.registry.view.hosts)


@needs(
    "web", "publish to agent.echo", "publish to agent.ledger", "publish to agent.ledger.*", "publish to agent.desk.*"
)
async def calls(scene: Scene) -> None:
    await scene.worker("bank")
    await scene.worker("safe")
    web = await scene.runtime("web")
    for agent in (ECHO, LEDGER, DESK):
        assert await web.send_message(HI, agent) == HI


@needs("web", "publish to topic.orders.*", "publish to topic.news.*")
async def publishes(scene: Scene) -> None:
    await scene.worker("bank")
    web = await scene.runtime("web")
    await publishes_orders_and_news(scene, web)


async def publishes_orders_and_news(scene: Scene, runtime: NatsAgentRuntime) -> None:
    for topic in ("orders", "news"):
        await runtime.publish_message({"on": topic}, TopicId(topic, "one"))
    await runtime.running.connection.barrier()
    runtime.running.connection.check()
    await eventually(lambda: {"on": "orders"} in scene.seen and {"on": "news"} in scene.seen)
    runtime_client = runtime.running.connection
    heard: list[str] = []

    async def tap(message: Any) -> None:
        heard.append(message.subject)

    ops = await scene.client("ops")
    await ops.subscribe(scene.subject("topic.*.>"), cb=tap)
    await settled(ops)
    await runtime.publish_message({"on": "orders"}, TopicId("orders", "two"))
    await runtime_client.barrier()
    await eventually(lambda: scene.subject("topic.orders.two") in heard)


@needs("web", "publish to natsrt.worker.*")
async def waits_for_types(scene: Scene) -> None:
    await scene.worker("bank")
    await (await scene.runtime("web")).wait_for("echo", timeout=5)


@needs("web", "publish to natsrt.cancel")
async def cancels_its_calls(scene: Scene) -> None:
    await scene.worker("bank")
    await cancels(scene, await scene.runtime("web"), ECHO)


@needs(
    "feed",
    "subscribe to _INBOX_feed.>",
    "subscribe to natsrt.registry.>",
    "publish to natsrt.view",
    "publish to topic.orders.*",
    "publish to topic.news.*",
    "publish to agent.ledger",
    "publish to agent.ledger.*",
)
async def only_publishes(scene: Scene) -> None:
    await scene.worker("bank")
    feed = await scene.runtime("feed")
    await publishes_orders_and_news(scene, feed)
    await scene.worker("safe")
    await eventually(lambda: "desk" in feed.running.registry.view.hosts)


@needs("feed", "publish to natsrt.worker.*")
async def waits_for_types_before_it_publishes(scene: Scene) -> None:
    await scene.worker("bank")
    await (await scene.runtime("feed")).wait_for("echo", timeout=5)


@needs("feed", "publish to natsrt.cancel")
async def cancels_its_events(scene: Scene) -> None:
    await scene.worker("bank")
    feed, token = await scene.runtime("feed"), CancellationToken()
    await feed.publish_message({"wait": 1}, TopicId("news", "one"), cancellation_token=token)
    await eventually(lambda: {"wait": 1} in scene.seen)
    token.cancel()
    await eventually(lambda: "cancelled" in scene.seen)


@needs("shop", "subscribe to _INBOX_shop.>", "publish to agent.echo")
async def calls_with_plain_bodies(scene: Scene) -> None:
    await answers_clients(scene)


@needs("shop", "publish to topic.news.*")
async def publishes_plain_bodies(scene: Scene) -> None:
    await scene.worker("bank")
    client = await scene.client("shop")
    await client.publish(scene.subject("topic.news.one"), b'{"plain":1}')
    await eventually(lambda: {"plain": 1} in scene.seen)


# -- tools and operators -----------------------------------------------------------------------------------------------


def runs(*arguments: str, user: str, permissions: tuple[str, ...], stdin: str | None = None) -> None:
    """A use of ``user`` that is a command of natsrt."""

    async def use(scene: Scene) -> None:
        await scene.worker("bank")
        await scene.worker("safe")
        assert await (await scene.runtime("web")).send_message(HI, LEDGER) == HI
        await scene.command(user, *arguments, stdin=stdin)

    use.__name__ = f"natsrt {' '.join(arguments)}"
    needs(user, *permissions)(use)


LOGS_IN = ("subscribe to _INBOX_look.>", "subscribe to natsrt.registry.>", "publish to natsrt.view")
HELLO = ("send", "echo/one", '{"text": "hi"}', "--type-name", "Text")
runs("agents", "info", "echo", user="look", permissions=LOGS_IN)
runs("agents", "wait", "echo", user="look", permissions=("publish to natsrt.worker.*",))
runs("agents", "stats", user="look", permissions=("publish to $SRV.>",))
runs(*HELLO, user="look", permissions=("publish to agent.echo",))


@needs("look", "subscribe to topic.news.*")
async def looks_at_events(scene: Scene) -> None:
    await looks_at(scene, "look")


async def looks_at(scene: Scene, user: str) -> None:
    await scene.worker("bank")
    shop = await scene.client("shop")
    tail = asyncio.ensure_future(scene.command(user, "tail", scene.subject("topic.news.*"), "--count", "1"))
    while not tail.done():
        await shop.publish(scene.subject("topic.news.one"), b'{"plain":1}')
        await asyncio.wait({tail}, timeout=0.2)
    assert '"plain":1' in (await tail).stdout


@needs("ops", "subscribe to topic.*.>")
async def looks_at_all_events(scene: Scene) -> None:
    await looks_at(scene, "ops")


READS_THE_REGISTRY = (
    "subscribe to _INBOX_ops.>",
    "subscribe to natsrt.registry.>",
    "publish to $JS.API.STREAM.INFO.KV_natsrt_registry",
    "publish to $JS.API.DIRECT.GET.KV_natsrt_registry.>",
    *(f"publish to $JS.API.CONSUMER.{what}.KV_natsrt_registry.>" for what in ("CREATE", "INFO", "MSG.NEXT")),
)
LISTS_STATES = (
    "publish to $JS.API.STREAM.INFO.KV_natsrt_agents",
    *(f"publish to $JS.API.CONSUMER.{what}.KV_natsrt_agents.>" for what in ("CREATE", "INFO", "MSG.NEXT")),
)
runs("agents", "info", "echo", user="ops", permissions=READS_THE_REGISTRY)


@needs(
    "ops",
    "publish to $JS.API.CONSUMER.DELETE.KV_natsrt_registry.>",
    "publish to $JS.API.CONSUMER.DELETE.KV_natsrt_agents.>",
)
async def leaves_no_consumers_when_it_has_listed_states(scene: Scene) -> None:
    bank = await scene.worker("bank")
    await bank.agent_load_state(LEDGER, {"kept": "x"})
    await scene.command("ops", "agents", "info", "echo")
    await scene.command("ops", "state", "ls")
    for bucket in ("natsrt_registry", "natsrt_agents"):
        await eventually(lambda bucket=bucket: has_no_consumers(bank, scene, bucket))  # type: ignore[misc]


runs("agents", "wait", "echo", user="ops", permissions=("publish to natsrt.worker.*",))
runs("agents", "stats", user="ops", permissions=("publish to $SRV.>",))
runs(*HELLO, user="ops", permissions=("publish to agent.>",))
runs("publish", "news/one", "{}", user="ops", permissions=("publish to topic.*.>",))
runs(
    "state",
    "get",
    "--live",
    "ledger/one",
    user="ops",
    permissions=("publish to natsrt.control.>", "publish to natsrt.peer.*"),
)
runs("state", "ls", user="ops", permissions=LISTS_STATES)
runs(
    *("state", "get", "ledger/one"),
    user="ops",
    permissions=(
        "publish to $JS.API.STREAM.MSG.GET.KV_natsrt_agents",
        "publish to $JS.API.DIRECT.GET.KV_natsrt_agents.>",
    ),
)
runs(
    *("state", "rm", "--force", "ledger/one"),
    user="ops",
    permissions=("publish to $KV.natsrt_agents.>", "publish to $JS.API.STREAM.PURGE.KV_natsrt_agents"),
)


@needs("ops", "publish to $JS.API.DIRECT.GET.KV_natsrt_agents.>")
async def reads_large_states(scene: Scene) -> None:
    bank = await scene.worker("bank")
    await bank.agent_load_state(LEDGER, {"kept": "x" * 600_000})
    await bank.store_state(LEDGER)
    assert len((await scene.command("ops", "state", "get", "ledger/one")).stdout) > 600_000


@needs("ops", "publish to _INBOX_ops.>")
async def waits_for_plain_responders(scene: Scene) -> None:
    await scene.worker("bank")
    client = await scene.client("plain")
    await client.subscribe(scene.subject("agent.foreign"), queue="foreign", cb=client.flush)
    await settled(client)
    await scene.command("ops", "agents", "wait", "foreign")


@needs("ops", "publish to $KV.natsrt_registry.>", "publish to $JS.API.STREAM.PURGE.KV_natsrt_registry")
async def forgets_types(scene: Scene) -> None:
    safe = await scene.worker("safe")
    await (await scene.worker("bank")).stop()
    await eventually(lambda: "echo" not in safe.running.registry.view.hosts)
    await scene.command("ops", "agents", "forget", "echo")


@needs("ops", "publish to $JS.API.DIRECT.GET.KV_natsrt_registry")
async def names_the_types_that_there_are(scene: Scene) -> None:
    await scene.worker("bank")
    ended = await scene.command("ops", "send", "nobody/one", "{}", code=Exit.UNKNOWN_AGENT)
    assert "echo" in ended.stderr


@needs(
    "ops",
    "publish to $JS.API.STREAM.CREATE.KV_natsrt_registry",
    "publish to $JS.API.STREAM.CREATE.KV_natsrt_agents",
)
async def restores_states_into_an_empty_account(scene: Scene) -> None:
    await scene.command("ops", "state", "import", "--force", "-", stdin=RESTORED)


@needs("ops", "publish to $JS.API.INFO", "publish to $SYS.REQ.USER.INFO", "publish to natsrt.cancel")
async def examines_everything(scene: Scene) -> None:
    await scene.worker("bank")
    findings = {finding["check"]: finding for finding in (await scene.command("ops", "doctor", "--json")).json}
    for check in ("JetStream", "clock", "permission to call"):
        assert findings[check]["level"] == "ok", findings[check]


# -- the tests ---------------------------------------------------------------------------------------------------------


class TestEachPermission(MatrixTests):
    pass
