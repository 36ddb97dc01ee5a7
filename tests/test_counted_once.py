"""A call whose link stalls is sent again over another one, and counts once, whenever the lost copy arrives."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler

import natsrt
from benchmarks.chaos.proxy import Proxy
from benchmarks.chaos.scenario import broken
from benchmarks.chaos.scenarios import thawed_server
from natsrt import CannotDecode, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.hosting.withdrawn import REMEMBERED_FOR, WithdrawnCalls
from natsrt.keyed.slots import AgentSlot
from natsrt.keyed_types import KeyedOptions
from natsrt.transport.call_judgement import Judge, PendingCall, Verdict
from natsrt.wire import envelope
from natsrt.wire.envelope import SUPERSEDES_HEADER
from natsrt.wire.ids import MAX_IDS, former_copies
from tests.support.processes import eventually

handled: Counter[int] = Counter()


class Plain(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("plain")

    @message_handler
    async def take(self, message: int, ctx: MessageContext) -> int:
        handled[message] += 1
        return message


@natsrt.keyed
class Keyed(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("keyed")
        self.total = 0

    @message_handler
    async def add(self, message: int, ctx: MessageContext) -> int:
        handled[message] += 1
        self.total += message
        return self.total

    async def save_state(self) -> dict[str, Any]:
        return {"total": self.total}

    async def load_state(self, state: Any) -> None:
        self.total = state["total"]


KINDS = {"plain": Plain, "keyed": Keyed}
AGENT = AgentId("counts", "k")


@pytest.fixture(autouse=True)
def nothing_handled() -> None:
    handled.clear()


@pytest.fixture
async def proxy(server: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with Proxy(server.url) as proxy:
        yield proxy


async def hosting(url: str, namespace: str, kind: str) -> NatsAgentRuntime:
    """A started worker."""
    worker = NatsAgentRuntime(url, namespace=namespace)
    await worker.start()
    await natsrt.register(worker, KINDS[kind], AGENT.type, KINDS[kind])
    return worker


async def settle(*runtimes: NatsAgentRuntime) -> None:
    """Wait until what the server had for them before is handled."""
    for _ in range(2):
        for runtime in runtimes:
            await runtime.running.connection.barrier()
            await eventually(lambda runtime=runtime: runtime.running.idle)  # type: ignore[misc]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_that_was_sent_again_is_handled_once_although_the_lost_copy_arrives(
    kind: str, workers: int, server: EmbeddedServer, proxy: Proxy, namespace: str
) -> None:
    hosts = [await hosting(server.url, namespace, kind) for _ in range(workers)]
    async with NatsAgentRuntime(proxy.url, namespace=namespace) as caller:
        await caller.send_message(1, AGENT)
        proxy.freeze()
        assert await caller.send_message(10, AGENT) == (11 if kind == "keyed" else 10)
        proxy.thaw()
        await settle(caller, *hosts)
        assert await caller.send_message(100, AGENT) == (111 if kind == "keyed" else 100)
        assert caller.health().reconnects == 1
    assert handled == {1: 1, 10: 1, 100: 1}
    for host in hosts:
        await host.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_worker_that_starts_later_does_not_handle_the_lost_copy_either(
    kind: str, server: EmbeddedServer, proxy: Proxy, namespace: str
) -> None:
    first = await hosting(server.url, namespace, kind)
    async with NatsAgentRuntime(proxy.url, namespace=namespace) as caller:
        await caller.send_message(1, AGENT)
        proxy.freeze()
        await caller.send_message(10, AGENT)
        second = await hosting(server.url, namespace, kind)
        await first.stop()
        proxy.thaw()
        await settle(caller, second)
        total = await caller.send_message(100, AGENT)
    assert handled == {1: 1, 10: 1, 100: 1}
    assert total == (111 if kind == "keyed" else 100)
    await second.stop()


async def test_a_worker_that_was_removed_and_comes_back_learns_the_promises_of_the_others(
    server: EmbeddedServer, namespace: str
) -> None:
    """As one that was cut off while a call was lost on its way and sent again: nobody asked it for its promise."""
    first, second = [await hosting(server.url, namespace, "plain") for _ in range(2)]
    subjects, client = first.running.network.subjects, first.running.connection.client
    lost = first.running.network.inbox.subject("lost")
    question = envelope.encode(
        envelope.FATE, '"id":"1","source":"/"', orjson.dumps({"calls": [lost], "withdraw": [lost]})
    )
    await client.request(subjects.worker(str(first.worker_id)), question, timeout=10)
    assert lost in first.running.incoming.call_log.withdrawn
    assert lost not in second.running.incoming.call_log.withdrawn
    bucket = subjects.bucket("natsrt_registry")
    await client.publish(
        f"$KV.{bucket}.r.worker.{second.worker_id}", headers={"KV-Operation": "DEL"}
    )  # as others do who take it for dead
    await eventually(lambda: lost in second.running.incoming.call_log.withdrawn)
    await eventually(lambda: second.running.registry.synced)
    await first.stop()
    await second.running.connection.client.publish(subjects.agent(AGENT.type), b"10", reply=lost)
    await settle(second)
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        assert await caller.send_message(100, AGENT) == 100
    assert handled == {100: 1}
    await second.stop()


async def test_calls_wait_until_a_worker_that_may_have_been_removed_has_learned_the_promises(
    server: EmbeddedServer, namespace: str
) -> None:
    worker = await hosting(server.url, namespace, "plain")
    registry, follower = worker.running.registry, worker.running.registry._follower
    learned = asyncio.Event()
    registry.on_rejoined(learned.wait)  # type: ignore[arg-type]
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        assert await caller.send_message(1, AGENT) == 1
        registry.away = True
        follower.resync()
        await eventually(lambda: not registry.synced)
        call = asyncio.ensure_future(caller.send_message(10, AGENT))
        await settle_intake(worker)
        assert handled == {1: 1}
        learned.set()
        assert await call == 10
        assert not registry.away
    assert handled == {1: 1, 10: 1}
    await worker.stop()


async def settle_intake(worker: NatsAgentRuntime) -> None:
    """Wait until a message has come in that is not handled yet."""
    await eventually(lambda: worker.running.dispatch.running)
    await worker.running.connection.barrier()


async def test_the_record_of_a_keyed_agent_names_the_lost_copy_for_workers_that_know_of_no_promise(
    server: EmbeddedServer, proxy: Proxy, namespace: str
) -> None:
    first = await hosting(server.url, namespace, "keyed")
    async with NatsAgentRuntime(proxy.url, namespace=namespace) as caller:
        await caller.send_message(1, AGENT)
        proxy.freeze()
        assert await caller.send_message(10, AGENT) == 11
        await first.stop()
        second = await hosting(server.url, namespace, "keyed")  # nobody is there to tell it
        assert not second.running.incoming.call_log.withdrawn
        assert await caller.send_message(100, AGENT) == 111
        await second.stop()
        third = await hosting(server.url, namespace, "keyed")
        proxy.thaw()
        await settle(caller, third)
        assert await caller.send_message(1000, AGENT) == 1111
    assert handled == {1: 1, 10: 1, 100: 1, 1000: 1}
    await third.stop()


async def test_a_copy_that_names_a_call_that_runs_or_has_ended_gets_its_answer(
    server: EmbeddedServer, namespace: str
) -> None:
    """As a foreign caller may send it, without asking workers for a promise."""
    worker = await hosting(server.url, namespace, "plain")
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        connection, inbox = caller.running.connection, caller.running.network.inbox
        answers: dict[str, bytes] = {}
        subject = caller.running.network.subjects.agent(AGENT.type)
        body = b"10"
        ids = [inbox.new_subject() for _ in range(3)]
        for call_id in ids:
            inbox.receivers[call_id] = lambda message: answers.__setitem__(message.subject, message.data)
        await connection.publish(subject, body, reply=ids[0])
        await connection.publish(subject, body, reply=ids[1], headers={SUPERSEDES_HEADER: ids[0]})
        await eventually(lambda: len(answers) == 2)
        await connection.publish(subject, body, reply=ids[2], headers={SUPERSEDES_HEADER: f"{ids[0]} {ids[1]}"})
        await eventually(lambda: len(answers) == 3)
    assert handled == {10: 1}
    assert {answers[call_id] for call_id in ids} == {b"10"}
    await worker.stop()


async def test_a_copy_is_not_answered_where_no_call_may_be(server: EmbeddedServer, namespace: str) -> None:
    worker = await hosting(server.url, namespace, "plain")
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        connection, inbox, subjects = caller.running.connection, caller.running.network.inbox, worker.running.network
        subject, forbidden = subjects.subjects.agent(AGENT.type), subjects.subjects.topic("news", "s")
        former, answered = f"{forbidden.rpartition('.')[0]}.former", inbox.new_subject()
        answers: list[bytes] = []
        inbox.receivers[answered] = lambda message: answers.append(message.data)
        for reply, named in ((answered, ""), (forbidden, former)):
            await connection.publish(subject, b"10", reply=reply, headers={SUPERSEDES_HEADER: named})
        await eventually(lambda: worker.running.counters.refused_replies == 1)
        await eventually(lambda: answers == [b"10"])
    assert handled == {10: 1}
    await worker.stop()


@pytest.mark.parametrize("named", ["x" * 40_000, " ".join(f"_INBOX.{n:x}" for n in range(60_000)), "_INBOX.of.another"])
async def test_a_call_that_names_what_it_may_not_is_refused_and_leaves_nothing(
    named: str, server: EmbeddedServer, namespace: str
) -> None:
    worker = await hosting(server.url, namespace, "keyed")
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        client, subjects = caller.running.connection.client, caller.running.network.subjects
        headers = {SUPERSEDES_HEADER: named, "Natsrt-Key": AGENT.key}
        answer = await client.request(subjects.agent(AGENT.type), b"10", timeout=10, headers=headers)
        assert answer.headers and answer.headers["Nats-Service-Error-Code"] == "400"
        assert await caller.send_message(1, AGENT) == 1  # and its state is stored
        assert not worker.running.incoming.call_log.withdrawn
    assert handled == {1: 1}
    await worker.stop()


@pytest.mark.parametrize("kind", [envelope.FATE, envelope.ABANDONED, envelope.WAITS])
@pytest.mark.parametrize("calls", [["x"] * (MAX_IDS + 1), ["x" * 1025], ["ü" * 513]])
async def test_a_question_that_names_too_much_is_refused(
    kind: str, calls: list[str], server: EmbeddedServer, namespace: str
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        await natsrt.register(worker, Plain, AGENT.type, Plain)
        subject = worker.running.network.subjects.worker(str(worker.worker_id))
        data = orjson.dumps({"calls": calls, "withdraw": calls})
        body = envelope.encode(kind, '"id":"1","source":"/"', data)
        answer = await worker.running.connection.client.request(subject, body, timeout=10)
        assert answer.headers and answer.headers["Nats-Service-Error-Code"] == "400"
        assert not worker.running.incoming.call_log.withdrawn


async def test_headers_count_towards_what_may_wait(server: EmbeddedServer, namespace: str) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace, max_pending_bytes=100_000) as worker:
        await natsrt.register(worker, Plain, AGENT.type, Plain)
        client, subject = worker.running.connection.client, worker.running.network.subjects.agent(AGENT.type)
        assert (await client.request(subject, b"10", timeout=10, headers={"X": "x"})).data == b"10"
        answer = await client.request(subject, b"10", timeout=10, headers={"X": "x" * 100_000})
        assert answer.headers and answer.headers["Nats-Service-Error-Code"] == "429"


async def test_a_call_ends_where_no_worker_has_room_for_a_promise() -> None:
    judge = Judge(12.0, SimpleNamespace(allowance=0.0))  # type: ignore[arg-type]
    call = PendingCall("_INBOX.a.1", "agent.x", AGENT, asyncio.get_running_loop().create_future(), 0.0)
    verdicts = []
    for second in range(1, 30):
        call.unknown("w", 1e9, float(second), promised=False)
        given = judge.verdict(call, ["w"], float(second), all_stayed=True, up_since=0.0, settled=True)
        verdicts.append(given)
    assert set(verdicts[:13]) == {Verdict.WITHDRAW} and set(verdicts[13:]) == {Verdict.LOST}


@pytest.mark.slow
async def test_calls_over_a_server_that_stands_still_are_handled_once() -> None:
    figures = await thawed_server.measure([1.5, 3.5, 6.0])
    assert broken(figures) == []


# -- promises ----------------------------------------------------------------------------------------------------------


def test_former_copies_are_named_as_the_reply_subject_is() -> None:
    call, forwarded = "_INBOX.a.3", "_INBOX.w.7"
    assert former_copies("", call, forwarded=False) == ()
    assert former_copies("_INBOX.a.1 _INBOX.a.2 _INBOX.a.3", call, forwarded=False) == ("_INBOX.a.1", "_INBOX.a.2")
    assert former_copies("_INBOX.a.1", forwarded, forwarded=True) == ("_INBOX.a.1",)
    assert len(former_copies(" ".join(f"_INBOX.a.{n}x" for n in range(16)), call, forwarded=False)) == 16
    wrong = ["_INBOX.b.1", "_INBOX.a.b.1", "x", f"_INBOX.a.{'x' * 1020}", f"_INBOX.a.{'ü' * 510}", "_INBOX.a.\udc80"]
    for header in (*wrong, " ".join(f"_INBOX.a.{n}x" for n in range(17)), " " * 100_000):
        with pytest.raises(CannotDecode):
            former_copies(header, call, forwarded=False)


def test_promises_are_kept_for_a_quarter_of_an_hour() -> None:
    calls = WithdrawnCalls()
    for add in (calls.promise, calls.name):
        add([f"a {add.__name__}"], 100.0)
        add([f"b {add.__name__}"], 500.0)
    assert len(calls) == 4
    for add in (calls.promise, calls.name):
        add([f"c {add.__name__}"], 100.0 + REMEMBERED_FOR + 0.1)
        assert f"a {add.__name__}" not in calls and f"b {add.__name__}" in calls


def test_a_worker_learns_promises_with_their_ages() -> None:
    first, second = WithdrawnCalls(), WithdrawnCalls()
    first.promise(["a"], 100.0)
    first.name(["b"], 160.0)
    second.promise(["c"], 1000.0)
    second.learn(first.ages(200.0, 10, 1000), 1010.0)
    assert second.ages(1010.0, 10, 1000) == {"a": 100.0, "b": 40.0, "c": 10.0}
    assert list(second.ages(1010.0, 1, 1000)) == ["c"]
    assert list(second.ages(1010.0, 10, 80)) == ["b", "c"]
    second.promise(["d"], 910.0 + REMEMBERED_FOR + 0.1)
    assert "a" not in second and "b" in second


def test_no_promise_is_displaced_by_what_others_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsrt.hosting.withdrawn._AT_MOST", 2)
    monkeypatch.setattr("natsrt.hosting.withdrawn._NAMED_AT_MOST", 2)
    calls = WithdrawnCalls()
    calls.promise(["a", "b", "c"], 1.0)
    calls.name(["d", "e", "f"], 2.0)
    calls.learn({"g": 0.0}, 2.0)
    calls.promise(["a"], 3.0)
    assert [call_id for call_id in "abcdefg" if call_id in calls] == ["a", "b", "e", "f"]
    assert calls.has_promised("a") and not calls.has_promised("c")
    assert list(calls.ages(3.0, 3, 1000)) == ["f", "b", "a"]
    calls.promise(["c"], 3.0 + REMEMBERED_FOR)  # b has had its time
    assert calls.has_promised("c") and calls.has_promised("a") and not calls.has_promised("b")


async def test_a_slot_names_no_more_lost_copies_than_its_record() -> None:
    slot = AgentSlot(SimpleNamespace(keyed=KeyedOptions(), agent_type="counter"), "k")  # type: ignore[arg-type]
    for number in range(100):
        slot.handled([f"_INBOX.a.{number}"])
    assert slot.counted == tuple(f"_INBOX.a.{number}" for number in range(68, 100))
