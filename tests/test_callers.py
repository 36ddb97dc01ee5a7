"""A caller is only a caller: it reads the registry from workers, and reaches nothing that is between others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from autogen_core import AgentId, CancellationToken, MessageContext, RoutedAgent, rpc

from natsrt import NatsAgentRuntime, UndeliveredCall, UnknownAgentType, register
from natsrt.embedded import EmbeddedServer
from natsrt.hosting.reply_subjects import ReplySubjects
from natsrt.jetstream.registry.entries import FEATURES, PEER, KnownEntry, TypeEntry, WorkerEntry
from natsrt.options import Options
from natsrt.transport.inbox import Inbox
from natsrt.wire import envelope
from natsrt.wire.peer_messages import WaitLink
from natsrt.wire.subjects import Subjects
from tests.support.processes import eventually
from tests.test_permissions import Builder, House, Text, build, house, space, without  # noqa: F401 (fixtures)

ADMIN = AgentId("admin", "k")


def question(kind: str, data: object) -> bytes:
    return envelope.encode(kind, '"id":"q","source":"/"', json.dumps(data).encode())


def call_of(**attributes: str) -> bytes:
    named = {"id": "1", "source": "/", "messagetype": "Text", "subject": "k", **attributes}
    written = ",".join(f'"{name}":{json.dumps(value)}' for name, value in named.items())
    return envelope.encode(envelope.CALL, written, b'{"text":"forged"}')


# -- the registry ------------------------------------------------------------------------------------------------------


async def test_a_caller_sees_what_workers_see_in_as_many_pages_as_it_takes(house: House) -> None:  # noqa: F811
    worker = await house.worker()
    registry = worker.running.registry
    many = [TypeEntry(f"type {number}", str(worker.worker_id), handles=("x" * 300,)) for number in range(1200)]
    await registry.declare(many)
    caller = await house.runtime("caller")
    seen = caller.running.registry
    assert registry.reads_bucket and not seen.reads_bucket
    assert seen.synced and seen.view.applied >= registry.view.applied
    assert {key: entry for key, (_, entry) in seen.view.entries.items()} == {
        key: entry for key, (_, entry) in registry.view.entries.items()
    }
    await registry.withdraw(many[:600])
    await seen.catch_up()
    assert seen.view.entries == registry.view.entries


async def test_a_caller_knows_the_types_that_are_known_without_a_worker(house: House) -> None:  # noqa: F811
    worker = await house.worker()
    await worker.running.registry.declare([KnownEntry(f"former {number}") for number in range(600)])
    caller = await house.runtime("caller")
    registry = caller.running.registry
    assert await registry.is_known("former 7") and not await registry.is_known("never")
    assert {f"former {number}" for number in range(600)} <= (await registry.known()).keys()
    assert set(await registry.known("former 7")) == {"former 7"}
    with pytest.raises(UnknownAgentType, match="former 0"):
        await caller.send_message(Text("hi"), AgentId("never", "k"))


async def test_where_no_worker_lives_the_error_says_that_there_is_nobody_to_call(house: House) -> None:  # noqa: F811
    worker = await house.worker()
    caller = await house.runtime("caller")
    await worker.stop()
    with pytest.raises(UndeliveredCall, match="there is nobody to call") as nobody:
        await caller.send_message(Text("hi"), ADMIN)
    assert "$JS.API" not in str(nobody.value)
    waiting = asyncio.ensure_future(caller.wait_for("admin", timeout=30))
    await house.worker()
    await waiting
    assert await caller.send_message(Text("hi"), ADMIN) == Text("hi")


async def test_a_worker_that_is_not_in_step_refuses_and_the_caller_asks_again(house: House) -> None:  # noqa: F811
    worker = await house.worker()
    in_step = worker.running.registry._follower._synced
    in_step.clear()
    starting = asyncio.ensure_future(house.runtime("caller"))
    client = await house.client("caller")
    answer = await client.request(house.subject("natsrt.view"), question(envelope.VIEW, {"want": "entries"}), timeout=5)
    assert b"not in step" in answer.data
    assert not starting.done()
    in_step.set()
    assert (await starting).running.registry.view.workers


@pytest.mark.parametrize("data", [None, {}, {"want": "states"}, {"want": "entries", "revision": "x"}, [1]])
async def test_questions_about_the_registry_that_cannot_be_read_are_answered_with_errors(
    server: EmbeddedServer, namespace: str, data: object
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        client = worker.running.connection.client
        answer = await client.request(f"{namespace}.natsrt.view", question(envelope.VIEW, data), timeout=5)
        assert answer.headers and answer.headers["Nats-Service-Error"]


async def test_a_runtime_that_may_read_the_bucket_does_so(server: EmbeddedServer, namespace: str) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        assert runtime.running.registry.reads_bucket


async def test_a_caller_has_no_jetstream_request_and_reaches_no_subject_of_workers(house: House) -> None:  # noqa: F811
    worker = await house.worker()
    client = await house.client("caller")
    bucket = f"{house.space}_natsrt_registry" if house.space else "natsrt_registry"
    subjects = [
        f"$JS.API.STREAM.INFO.KV_{bucket}",
        f"$JS.API.DIRECT.GET.KV_{bucket}.$KV.{bucket}.hb.{worker.worker_id}",
        f"$JS.API.CONSUMER.CREATE.KV_{bucket}.x",
        f"$KV.{bucket}.r.worker.x",
        house.subject(f"natsrt.peer.{worker.worker_id}"),
        house.subject("natsrt.control.admin"),
        house.subject("natsrt.registry.worker.x"),
        "_INBOX_worker.x.y",
        "_INBOX_caller.x.y",
    ]
    for subject in subjects:
        await client.publish(subject, b"", reply="_INBOX_caller.answer")
    await eventually(lambda: len(house.violations) == len(subjects))
    for subject in ("natsrt.view", "natsrt.cancel", "natsrt.worker.>", "agent.admin"):
        await client.subscribe(house.subject(subject))
    await eventually(lambda: len(house.violations) == len(subjects) + 4)


# -- between others ----------------------------------------------------------------------------------------------------


def test_reply_subjects_cannot_be_guessed() -> None:
    one, other = (Inbox(None, Options()) for _ in range(2))  # type: ignore[arg-type]
    subjects = [one.new_subject("q") for _ in range(1000)]
    assert len({subject.rpartition(".")[2] for subject in subjects}) == 1000
    assert all(len(subject.rpartition(".")[2]) == 1 + 24 for subject in subjects)
    assert one.subject("accept") == one.subject("accept")
    assert one.subject("accept").rpartition(".")[2] != other.subject("accept").rpartition(".")[2]


async def ask(house: House, kind: str, subject: str, data: object) -> Any:  # noqa: F811
    client = await house.client("caller")
    return json.loads((await client.request(house.subject(subject), question(kind, data), timeout=5)).data)["data"]


async def test_callers_are_not_told_whose_reply_a_worker_waits_for(
    house: House,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = await house.worker()
    link = WaitLink("_INBOX_caller.x.call", "_INBOX_worker.x.secret", "visit-1", "admin/k")
    monkeypatch.setattr(type(worker.running.incoming.deadlocks), "links", lambda self, calls: [link])
    told = await ask(house, envelope.WAITS, f"natsrt.worker.{worker.worker_id}", {"calls": [link.call]})
    [waits] = told["waits"]
    assert (waits["call"], waits["agent"]) == (link.call, link.agent)
    assert "secret" not in waits["awaited"] and "visit-1" not in waits["visit"]

    other = await house.worker()
    other_registry, peers = other.running.registry, other.running.network.peers
    subject = other_registry.peer_subject(str(worker.worker_id))
    assert "natsrt.peer." in subject
    assert await peers.links(subject, [link.call]) == [link]
    older = WorkerEntry("older-1", "older", "host", 1, 0.0, "0.1.0")  # it asks as version 1 says
    await other_registry.declare([older])
    await eventually(lambda: not worker.running.registry.view.all_understand(PEER))
    assert "natsrt.worker." in other_registry.peer_subject("older-1")
    assert await peers.links(house.subject(f"natsrt.worker.{worker.worker_id}"), [link.call]) == [link]
    told = await ask(house, envelope.WAITS, f"natsrt.worker.{worker.worker_id}", {"calls": [link.call]})
    assert "secret" not in told["waits"][0]["awaited"]


async def test_a_user_that_may_not_ask_peers_asks_as_version_1_says(build: Builder, space: str) -> None:  # noqa: F811
    peer = f"{space}.natsrt.peer.*" if space else "natsrt.peer.*"
    async with build(space, lambda block: without(block, "worker", peer)) as house:  # noqa: F811
        one, two = await house.worker(keyed={"admin": True}), await house.worker(keyed={"admin": True})
        caller = await house.runtime("caller")
        assert await caller.send_message(Text("hi"), ADMIN) == Text("hi")
        registry = one.running.registry
        await one.running.network.peers.links(registry.peer_subject(str(two.worker_id)), ["x"])
        await eventually(lambda: "natsrt.worker." in registry.peer_subject(str(two.worker_id)))


async def test_workers_publish_nothing_into_the_inbox_of_a_worker_that_did_not_ask(house: House) -> None:  # noqa: F811
    victim, worker = await house.worker(), await house.worker()
    inbox = victim.running.network.inbox
    heard: list[bytes] = []
    reply = inbox.new_subject("x")
    inbox.receivers[reply] = lambda message: heard.append(message.data)
    await eventually(lambda: inbox.root in worker.running.registry.view.inboxes)
    client = await house.client("caller")
    for accept_to in ("_INBOX_caller.accept", "accept", reply.rpartition(".")[0], ""):
        attributes = {"acceptto": accept_to} if accept_to else {}
        await client.publish(house.subject("agent.admin"), call_of(**attributes), reply=reply)
    await client.publish(house.subject("agent.admin"), b'{"text":"plain"}', reply=reply)
    accept = call_of(acceptto=inbox.subject("accept"))
    await client.publish(house.subject("agent.admin"), accept, reply="_INBOX_caller.answer")
    operator = await house.client("operator")
    for verb in ("PING", "INFO", "STATS"):
        await operator.publish(f"$SRV.{verb}", b"", reply=reply)
    counters = (victim.running.counters, worker.running.counters)
    await eventually(lambda: sum(counter.refused_replies for counter in counters) == 6)
    await eventually(lambda: victim.running.undecodable + worker.running.undecodable >= 7)
    assert heard == [] and house.admin == []
    assert await victim.send_message(Text("hi"), ADMIN) == Text("hi")  # its own calls are answered
    assert await worker.send_message(Text("hi"), ADMIN) == Text("hi")


def test_a_reply_subject_has_no_wildcards() -> None:
    replies = ReplySubjects(Subjects(), None)  # type: ignore[arg-type]
    assert replies.may_answer("_INBOX.a.1")
    assert not any(replies.may_answer(reply) for reply in ("_INBOX.a.*", "_INBOX.>", "*", ">", ""))


# -- cancellations -----------------------------------------------------------------------------------------------------


async def test_a_cancellation_id_is_no_longer_than_a_subject(server: EmbeddedServer, namespace: str) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        await register(worker, Canceller, "canceller", lambda: Canceller("cancels"))
        client, long = worker.running.connection.client, "x" * 1025
        cancellations = worker.running.network.cancellations
        for cancel_id in (long, "ü" * 513, "x" * 1024):
            await client.publish(f"{namespace}.natsrt.cancel", question(envelope.CANCEL, {"cancelid": cancel_id}))
        await eventually(lambda: "x" * 1024 in cancellations._early)
        assert len(cancellations._early) == 1
        answer = await client.request(f"{namespace}.agent.canceller", call_of(cancelid=long), timeout=5)
        assert answer.headers and answer.headers["Nats-Service-Error-Code"] == "400"


class Canceller(RoutedAgent):
    @rpc
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        ctx.cancellation_token.cancel()
        await asyncio.Event().wait()
        return message


async def cancelled_by_its_handler(caller: NatsAgentRuntime) -> None:
    token = CancellationToken()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(10):
            await caller.send_message(Text("hi"), AgentId("canceller", "k"), cancellation_token=token)
    assert token.is_cancelled()


async def test_a_caller_hears_only_of_the_cancellations_of_its_own_tokens(house: House) -> None:  # noqa: F811
    worker = await house.worker()
    await register(worker, Canceller, "canceller", lambda: Canceller("cancels"))
    caller = await house.runtime("caller")
    await cancelled_by_its_handler(caller)
    assert not caller.running.network.cancellations.hears_all
    assert not any(interest.subject.endswith("natsrt.cancel") for interest in caller.running.connection._interests)
    assert worker.running.network.cancellations.hears_all


async def test_a_caller_hears_all_cancellations_while_a_worker_of_version_1_lives(
    server: EmbeddedServer, namespace: str
) -> None:
    async with (
        NatsAgentRuntime(server.url, namespace=namespace) as worker,
        NatsAgentRuntime(server.url, namespace=namespace) as caller,
    ):
        await register(worker, Canceller, "canceller", lambda: Canceller("cancels"))
        cancellations = caller.running.network.cancellations
        assert not cancellations.hears_all
        await worker.running.registry.declare([WorkerEntry("older-1", "older", "host", 1, 0.0, "0.1.0")])
        await eventually(lambda: cancellations.hears_all)
        await cancelled_by_its_handler(caller)


def test_workers_say_what_they_understand() -> None:
    assert FEATURES == ("peer", "cancel", "confirm", "blobs")


@pytest.mark.parametrize(("user", "warned"), [("operator", False), ("worker", True)])
async def test_only_who_hosts_agents_is_warned_that_it_may_not_answer_callers(
    build: Builder,  # noqa: F811
    user: str,
    warned: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with build("", lambda block: block.replace('"natsrt.view"  # questions', "# questions")) as house:  # noqa: F811
        runtime = await house.runtime(user) if user == "operator" else await house.worker()
        assert runtime.running.registry.reads_bucket
        await runtime.running.connection.barrier()
        assert ("natsrt.view" in caplog.text) is warned
