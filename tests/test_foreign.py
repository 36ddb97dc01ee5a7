"""A participant that was written from docs/PROTOCOL.md alone hosts agents and makes calls beside natsrt's runtimes."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import nats
import pytest
from autogen_core import AgentId, CancellationToken, MessageContext, RoutedAgent, TopicId, TypeSubscription, rpc
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.kv import KeyValue

import natsrt
from natsrt import CannotDecode, NatsAgentRuntime, NoLiveWorker, RemoteAgentError, WorkerLost
from natsrt.embedded import EmbeddedServer
from tests.support.cli import Ended
from tests.support.cli import natsrt as command
from tests.support.clients import settled
from tests.support.processes import REPOSITORY, Process, Processes, eventually

PROGRAM = REPOSITORY / "tests" / "programs" / "participant.py"
SHOP = AgentId("shop", "k")


@dataclass
class Order:
    do: str
    seconds: float = 0.0
    error: str = ""
    times: int = 0
    to: str = ""
    key: str = ""
    type: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Receipt:
    text: str


@dataclass
class Visit:
    text: str = ""
    seconds: float = 0.0


class Clerk(RoutedAgent):
    """Answers calls of the participant."""

    def __init__(self) -> None:
        super().__init__("a clerk")

    @rpc
    async def visit(self, message: Visit, ctx: MessageContext) -> Visit:
        if message.text == "fail":
            raise FileNotFoundError(2, "No such file or directory", "lamps")
        if message.text == "wait for it":
            while not ctx.cancellation_token.is_cancelled():
                await asyncio.sleep(0.01)
            raise LookupError("cancelled from afar")
        await asyncio.sleep(message.seconds)
        return Visit(message.text.upper())


@natsrt.keyed
class Account(RoutedAgent):
    """A keyed agent that calls itself by way of the participant."""

    def __init__(self) -> None:
        super().__init__("an account")

    @rpc
    async def visit(self, message: Visit, ctx: MessageContext) -> Visit:
        if message.text == "inner":
            return Visit("was let in")
        visit = {"text": "inner", "seconds": 0.0}
        order = Order("relay", to="account", key=self.id.key, type="Visit", data=visit)
        receipt = await self.runtime.send_message(order, SHOP, reply_type=Receipt)
        return Visit(json.loads(receipt.text)["text"])


Start = Callable[..., Awaitable[Process]]


@pytest.fixture
async def start(server: EmbeddedServer, namespace: str, processes: Processes) -> Start:
    """Starts a participant. Its worker id is in the line in which it says that it is ready."""

    async def start(name: str = "page", *options: str) -> Process:
        process = processes.python(PROGRAM, server.url, namespace, name, *options, name=name)
        await process.wait_for_line("ready", 20)
        return process

    return start


@pytest.fixture
async def runtime(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(server.url, namespace=namespace, drain_timeout=2.0) as started:
        yield started


@pytest.fixture
async def client(server: EmbeddedServer) -> AsyncIterator[Client]:
    connected = await nats.connect(server.url)
    yield connected
    await connected.close()


@pytest.fixture
async def page(start: Start) -> Process:
    return await start()


def id_of(process: Process) -> str:
    found = re.search(r'^ready "(.*)"$', process.stdout, re.MULTILINE)
    assert found is not None
    return found[1]


async def ask(client: Client, namespace: str, text: str, key: str = "k", timeout: float = 15, **more: Any) -> Any:
    """What the participant gets that calls the clerk."""
    seconds = more.pop("seconds", 0.0)
    order = {"call": "clerk", "key": key, "type": "Visit", "data": {"text": text, "seconds": seconds}, **more}
    answer = await client.request(f"{namespace}.commands.page", json.dumps(order).encode(), timeout=timeout)
    return json.loads(answer.data)


def test_the_participant_imports_nothing_of_natsrt() -> None:
    for path in (PROGRAM, PROGRAM.with_name("participant_parts.py")):
        assert not re.search(r"^\s*(from|import) (natsrt|autogen)", path.read_text("utf-8"), re.MULTILINE)


# -- as a worker -------------------------------------------------------------------------------------------------------


async def test_it_answers_calls(runtime: NatsAgentRuntime, page: Process) -> None:
    assert await runtime.send_message(Order("hello"), SHOP, reply_type=Receipt) == Receipt("HELLO")


async def test_a_call_of_more_than_two_seconds_is_answered(runtime: NatsAgentRuntime, page: Process) -> None:
    assert await runtime.send_message(Order("wait", 3.0), SHOP, reply_type=Receipt) == Receipt("waited")


async def test_a_worker_need_not_accept_calls(start: Start, runtime: NatsAgentRuntime) -> None:
    await start("page", "--no-acceptance")
    assert await runtime.send_message(Order("wait", 3.0), SHOP, reply_type=Receipt) == Receipt("waited")


@pytest.mark.slow
@pytest.mark.parametrize(("option", "within"), [("--no-subject", 6.0), ("--mute", 20.0)])
async def test_a_worker_that_does_not_answer_questions_loses_calls_that_take_long(
    start: Start, runtime: NatsAgentRuntime, option: str, within: float
) -> None:
    await start("page", option)
    assert await runtime.send_message(Order("hello"), SHOP, reply_type=Receipt) == Receipt("HELLO")
    async with asyncio.timeout(within):
        with pytest.raises(WorkerLost):
            await runtime.send_message(Order("wait", 60.0), SHOP)


@pytest.mark.parametrize(
    ("name", "more", "kind"),
    [
        ("builtins.ValueError", {}, ValueError),
        ("natsrt.UnhandledMessage", {}, natsrt.UnhandledMessage),
        ("natsrt.errors.UnhandledMessage", {"code": 422}, natsrt.UnhandledMessage),
        ("builtins.FileNotFoundError", {"args": [2, "no lamps"], "fields": {"filename": "f"}}, FileNotFoundError),
        ("builtins.ExceptionGroup", {"exceptions": [{"type": "builtins.KeyError", "message": "a"}]}, ExceptionGroup),
        ("shop.OutOfStock", {}, RemoteAgentError),
    ],
)
async def test_its_errors_arrive_as_what_their_names_say(
    runtime: NatsAgentRuntime, page: Process, name: str, more: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="no lamps") as raised:
        await runtime.send_message(Order("fail", error=name, more=more), SHOP)
    assert type(raised.value) is kind
    assert raised.value.natsrt_remote.worker_id == id_of(page)  # type: ignore[attr-defined]


class OutOfStock(Exception):
    pass


async def test_its_own_error_arrives_as_the_class_that_was_added_under_the_name(
    runtime: NatsAgentRuntime, page: Process
) -> None:
    runtime.add_error_type(OutOfStock, name="shop.OutOfStock")
    with pytest.raises(OutOfStock, match="no lamps"):
        await runtime.send_message(Order("fail", error="shop.OutOfStock"), SHOP)


async def test_a_call_that_it_refuses_is_sent_again(runtime: NatsAgentRuntime, page: Process) -> None:
    receipt = await runtime.send_message(Order("refuse", times=3), SHOP, reply_type=Receipt)
    assert receipt == Receipt("refused 3 times")
    with pytest.raises(RemoteAgentError, match=r"shop\.Busy: too many customers"):
        await runtime.send_message(Order("refuse", times=10_000), SHOP)


async def test_a_cancellation_reaches_it(runtime: NatsAgentRuntime, page: Process) -> None:
    token = CancellationToken()
    call = asyncio.ensure_future(runtime.send_message(Order("wait", 60.0), SHOP, cancellation_token=token))
    await eventually(lambda: runtime.running.calls.pending)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await page.wait_for_line("cancelled")


async def test_it_passes_the_chain_on_so_that_a_keyed_agent_can_be_called_back(
    runtime: NatsAgentRuntime, page: Process
) -> None:
    await natsrt.register(runtime, Account, "account", Account)
    async with asyncio.timeout(10):
        reply = await runtime.send_message(Visit("outer"), AgentId("account", "a"))
    assert reply == Visit("was let in")


async def test_it_passes_the_cancellation_on(runtime: NatsAgentRuntime, page: Process) -> None:
    await natsrt.register(runtime, Clerk, "clerk", Clerk)
    token = CancellationToken()
    order = Order("relay", to="clerk", key="k", type="Visit", data={"text": "wait for it", "seconds": 0.0})
    call = asyncio.ensure_future(runtime.send_message(order, SHOP, cancellation_token=token))
    await eventually(lambda: runtime.health().handlers_running)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await eventually(lambda: runtime.health().handlers_running == 0)


async def test_it_serves_the_subscriptions_that_others_declare(runtime: NatsAgentRuntime, page: Process) -> None:
    await runtime.publish_message(Order("first"), TopicId("orders", "here"))
    await page.wait_for_line("orders.here")
    await runtime.add_subscription(TypeSubscription("returns", "shop"))  # raises if it does not confirm it
    await runtime.publish_message(Order("second"), TopicId("returns", "there"))
    await page.wait_for_line("returns.there")


async def restored(client: Client, namespace: str, worker_id: str) -> bool:
    info = await client.jetstream().stream_info(f"KV_{namespace}_natsrt_registry", subjects_filter=">")
    subjects = info.state.subjects or {}
    return sum(subject.endswith(f".{worker_id}") for subject in subjects) >= 4


async def test_it_declares_everything_again_when_it_was_removed(
    runtime: NatsAgentRuntime, page: Process, client: Client, namespace: str
) -> None:
    worker_id = id_of(page)
    await runtime.running.registry._store.remove_worker(worker_id)
    await page.wait_for_line("evicted")
    await eventually(lambda: restored(client, namespace, worker_id))
    await eventually(lambda: worker_id in runtime.running.registry.view.workers_hosting("shop"))
    assert await runtime.send_message(Order("wait", 2.5), SHOP, reply_type=Receipt) == Receipt("waited")
    assert [rule.pattern for rule in runtime.running.registry.view.rules("shop")] == ["orders"]


async def test_it_leaves_in_order(runtime: NatsAgentRuntime, page: Process, client: Client, namespace: str) -> None:
    worker_id = id_of(page)
    view = runtime.running.registry.view
    await client.publish(f"{namespace}.commands.page", b'{"leave": true}')
    assert await page.wait() == 0
    await eventually(lambda: worker_id not in view.workers)
    with pytest.raises(NoLiveWorker):
        await runtime.send_message(Order("hello"), SHOP)


@pytest.mark.slow
async def test_it_is_removed_while_it_is_frozen_and_comes_back(
    runtime: NatsAgentRuntime, page: Process, namespace: str
) -> None:
    await natsrt.register(runtime, Clerk, "clerk", Clerk)  # a worker beside it looks after it
    view, worker_id = runtime.running.registry.view, id_of(page)
    page.pause()
    await eventually(lambda: worker_id not in view.workers, 30)
    page.resume()
    await eventually(lambda: worker_id in view.workers_hosting("shop"), 20)
    assert await runtime.send_message(Order("hello"), SHOP, reply_type=Receipt) == Receipt("HELLO")


@pytest.mark.slow
async def test_it_removes_a_worker_that_was_killed(
    page: Process, server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    target = ("natsrt_cli.demo_agents:Upper", "--type", "upper", "--name", "doomed")
    doomed = processes.natsrt("worker", *target, "--server", server.url, "--namespace", namespace)
    await doomed.wait_for_line("ready")
    doomed.kill()
    await page.wait_for_line('removed "doomed-', 20)
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        assert not runtime.running.registry.view.workers_hosting("upper")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["data kept", "data lost"])
async def test_it_is_there_again_after_a_restart_of_the_server(
    own_server: EmbeddedServer, namespace: str, processes: Processes, data: str
) -> None:
    page = processes.python(PROGRAM, own_server.url, namespace, "page", name="page")
    await page.wait_for_line("ready", 20)
    await own_server.kill()
    if data == "data lost":
        assert own_server.data_dir is not None
        shutil.rmtree(own_server.data_dir / "jetstream")
    await own_server.start()
    await page.wait_for_line("reconnected", 20)
    async with NatsAgentRuntime(own_server.url, namespace=namespace) as runtime:
        await eventually(lambda: runtime.running.registry.view.workers_hosting("shop"), 15)
        await runtime.publish_message(Order("x"), TopicId("orders", "here"))
        await page.wait_for_line("orders.here")
        assert await runtime.send_message(Order("wait", 2.5), SHOP, reply_type=Receipt) == Receipt("waited")


# -- as a caller -------------------------------------------------------------------------------------------------------


async def test_it_calls_agents(runtime: NatsAgentRuntime, page: Process, client: Client, namespace: str) -> None:
    await natsrt.register(runtime, Clerk, "clerk", Clerk)
    assert await ask(client, namespace, "hi") == {"result": {"text": "HI", "seconds": 0.0}}
    assert (await ask(client, namespace, "hi", seconds=3.0))["result"]["text"] == "HI"
    failed = (await ask(client, namespace, "fail"))["failed"]
    assert failed == {
        "type": "builtins.FileNotFoundError",
        "message": "[Errno 2] No such file or directory: 'lamps'",
        "code": 500,
    }


async def test_its_calls_to_nobody_end(
    runtime: NatsAgentRuntime, page: Process, client: Client, namespace: str
) -> None:
    failed = (await ask(client, namespace, "hi"))["failed"]
    assert failed["type"] == "natsrt.NoLiveWorker"


async def test_it_cancels_a_call(runtime: NatsAgentRuntime, page: Process, client: Client, namespace: str) -> None:
    await natsrt.register(runtime, Clerk, "clerk", Clerk)
    call = asyncio.ensure_future(ask(client, namespace, "wait for it", attributes={"cancelid": "c-1"}))
    await eventually(lambda: runtime.health().handlers_running)
    cancellation = {
        "specversion": "1.0",
        "type": "natsrt.cancel",
        "id": "c",
        "source": "/",
        "data": {"cancelid": "c-1"},
    }
    await client.publish(f"{namespace}.natsrt.cancel", json.dumps(cancellation).encode())
    assert (await call)["failed"]["type"] == "builtins.LookupError"


# -- as an operator sees it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--service",)], ids=["not a service", "a service without metadata"])
async def test_the_command_line_finds_it_alive(
    start: Start, server: EmbeddedServer, namespace: str, options: tuple[str, ...]
) -> None:
    page = await start("page", *options)

    async def run(*arguments: str) -> Ended:
        return await command(*arguments, "--json", "--server", server.url, "--namespace", namespace)

    ended = await run("agents", "ping")
    assert ended.code == 0
    (row,) = ended.json
    assert (row["worker_id"], row["answered"]) == (id_of(page), True)
    assert row["round_trip_ms"] > 0
    ended = await run("agents", "stats")
    assert (ended.code, ended.json) == (0, [])
    assert ("has no statistics" in ended.stderr) is not bool(options)
    ended = await run("doctor")
    assert ended.code == 0
    assert [finding["text"] for finding in ended.json if finding["check"] == "workers"] == [
        "1 of 1 have a heartbeat and answer"
    ]
    assert not [finding for finding in ended.json if finding["check"] == "worker"]


async def test_the_doctor_names_the_field_that_an_entry_lacks(
    page: Process, client: Client, server: EmbeddedServer, namespace: str
) -> None:
    bucket: KeyValue = await client.jetstream().key_value(f"{namespace}_natsrt_registry")
    alive = {"Nats-TTL": "60s"}  # otherwise the participant removes it
    await client.jetstream().publish(f"$KV.{namespace}_natsrt_registry.hb.other", b"", headers=alive)
    await bucket.put("r.worker.other", b'{"worker_id":"other","name":"other","hostname":"h","started":1,"version":"1"}')
    await bucket.put("r.type.shop.other", b'{"agent_type":"shop"}')
    ended = await command("doctor", "--json", "--server", server.url, "--namespace", namespace)
    assert ended.code == 7
    assert [finding["text"] for finding in ended.json if finding["check"] == "registry entry"] == [
        "r.worker.other: the field 'pid' is missing",
        "r.type.shop.other: the field 'worker_id' is missing",
    ]
    assert "1 of 1 have a heartbeat and answer" in [finding["text"] for finding in ended.json]


async def test_a_worker_without_control_subjects_is_said_to_have_none(
    runtime: NatsAgentRuntime, client: Client, namespace: str
) -> None:
    async def answer(message: Msg) -> None:
        body = {"specversion": "1.0", "type": "natsrt.reply", "id": "fate-r", "source": "/"}
        calls = json.loads(message.data)["data"]["calls"]
        data = {"worker": "bare", "running": [], "finished": [], "unknown": calls, "remembers": 60}
        await message.respond(json.dumps({**body, "data": data}).encode())

    await client.subscribe(f"{namespace}.natsrt.worker.bare", cb=answer)
    bucket: KeyValue = await client.jetstream().key_value(f"{namespace}_natsrt_registry")
    worker = {"worker_id": "bare", "name": "b", "hostname": "h", "pid": 5, "started": 1, "version": "1"}
    await bucket.put("r.worker.bare", json.dumps(worker).encode())
    await bucket.put("r.type.bare.bare", b'{"agent_type":"bare","worker_id":"bare"}')
    async with asyncio.timeout(3):
        with pytest.raises(natsrt.UndeliveredCall, match="worker bare does not answer control messages for bare/k"):
            await runtime.agent_metadata(AgentId("bare", "k"))


# -- plain responders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body", "reply_type", "expected"),
    [
        ("Receipt", b'{"text":"a"}', None, Receipt("a")),
        ("Order", b'{"do":"a"}', None, Order("a")),
        ("str", b'"7"', None, "7"),
        ("bytes", b'{"text":"a"}', None, b'{"text":"a"}'),
        ("Receipt", b'{"text":"a"}', Receipt, Receipt("a")),
        ("shop.Receipt", b'{"text":"a"}', Receipt, Receipt("a")),
        ("shop.Receipt", b'{"text":"a"}', None, CannotDecode),
        ("Receipt", b'{"later":1}', None, CannotDecode),
        (None, b'{"text":"a"}', None, {"text": "a"}),
    ],
)
async def test_the_type_that_a_plain_reply_names_is_honoured(
    runtime: NatsAgentRuntime,
    client: Client,
    namespace: str,
    name: str | None,
    body: bytes,
    reply_type: type[Any] | None,
    expected: Any,
) -> None:
    async def answer(message: Msg) -> None:
        await client.publish(message.reply, body, headers={"Natsrt-Type": name} if name else None)

    await client.subscribe(f"{namespace}.agent.plain", "plain", cb=answer)
    await asyncio.sleep(0)
    await settled(client)
    call = runtime.send_message(Order("x"), AgentId("plain", "k"), reply_type=reply_type)
    if expected is CannotDecode:
        with pytest.raises(CannotDecode, match=name or ""):
            await call
    else:
        assert await call == expected


@pytest.mark.parametrize("name", ["natsrt.StateConflict", "natsrt.errors.StateConflict"])
async def test_a_plain_responder_reports_an_error_of_natsrt(
    runtime: NatsAgentRuntime, client: Client, namespace: str, name: str
) -> None:
    async def answer(message: Msg) -> None:
        error = {"Nats-Service-Error": "conflict", "Nats-Service-Error-Code": "500"}
        await client.publish(message.reply, json.dumps({"type": name, "message": "conflict"}).encode(), headers=error)

    await client.subscribe(f"{namespace}.agent.plain", "plain", cb=answer)
    await asyncio.sleep(0)
    await settled(client)
    with pytest.raises(natsrt.StateConflict, match="conflict"):
        await runtime.send_message(Order("x"), AgentId("plain", "k"))


async def test_a_plain_responder_refuses_a_call_in_its_headers(
    runtime: NatsAgentRuntime, client: Client, namespace: str
) -> None:
    received = 0

    async def answer(message: Msg) -> None:
        nonlocal received
        received += 1
        busy = {"Nats-Service-Error": "busy", "Nats-Service-Error-Code": "429"} if received < 3 else None
        await client.publish(message.reply, b'"done"', headers=busy)

    await client.subscribe(f"{namespace}.agent.plain", "plain", cb=answer)
    await asyncio.sleep(0)
    await settled(client)
    assert await runtime.send_message(Order("x"), AgentId("plain", "k")) == "done"
    assert received == 3
