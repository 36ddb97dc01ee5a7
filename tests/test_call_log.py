"""What a worker keeps of the calls that it received, asked by a caller that speaks the protocol itself."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import nats
import orjson
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.hosting import call_log
from natsrt.wire import envelope
from natsrt.wire.subjects import Subjects
from tests.programs.labor import Work
from tests.support.calls import known, running
from tests.support.processes import eventually


class Caller:
    """A caller with an inbox of its own, which keeps everything that it gets."""

    def __init__(self, client: Client, runtime: NatsAgentRuntime) -> None:
        self._client = client
        self._subjects = Subjects(runtime.options.namespace)
        self._worker = self._subjects.worker(runtime.worker_id or "")
        self.inbox = client.new_inbox()
        self.replies: dict[str, list[envelope.Envelope]] = {}
        self.accepted: list[str] = []

    async def take(self, message: Msg) -> None:
        body = envelope.decode(message.data)
        assert body is not None
        if body.type == envelope.ACCEPTED:
            self.accepted += body.json()["calls"]
        else:
            self.replies.setdefault(message.subject, []).append(body)

    async def call(self, name: str, work: Work) -> str:
        """Call the laborer. Returns the call's reply subject."""
        attributes = f'"id":"{name}","source":"/","messagetype":"Work","subject":"k","acceptto":"{self.inbox}.accept"'
        payload = orjson.dumps(work)
        reply = f"{self.inbox}.{name}"
        body = envelope.encode(envelope.CALL, attributes, payload)
        await self._client.publish(self._subjects.agent("laborer"), body, reply=reply)
        return reply

    async def done(self, name: str, work: Work) -> str:
        """Call the laborer, and wait for the reply. Returns the call's reply subject."""
        call = await self.call(name, work)
        await eventually(lambda: call in self.replies)
        return call

    async def ask(self, call: str) -> dict[str, Any]:
        """What the worker says about a call."""
        question = envelope.encode(envelope.FATE, '"id":"fate","source":"/"', orjson.dumps({"calls": [call]}))
        body = envelope.decode((await self._client.request(self._worker, question, 5)).data)
        assert body is not None
        answer: dict[str, Any] = body.json()
        return answer


@asynccontextmanager
async def worker_and_caller(url: str, namespace: str, **settings: Any) -> AsyncIterator[Caller]:
    async with running(url, namespace, "laborer", **settings) as runtime:
        await known(runtime, "laborer")
        client = await nats.connect(url)
        try:
            caller = Caller(client, runtime)
            await client.subscribe(f"{caller.inbox}.*", cb=caller.take)
            yield caller
        finally:
            await client.close()


async def handled_slowly(caller: Caller) -> str:
    """A call that was accepted and then answered: its reply subject."""
    call = await caller.call(f"slow{len(caller.replies)}", Work("sleep", "kept", 0.3))
    await eventually(lambda: call in caller.accepted)
    await eventually(lambda: call in caller.replies)
    return call


async def evict_the_last(caller: Caller) -> None:
    """Let so many calls be answered that the reply of no earlier one is among the last few."""
    for number in range(5):
        await caller.done(f"quick{number}", Work("echo", "quick"))


@pytest.fixture(autouse=True)
def few_last_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_log, "_LAST_AT_MOST", 2)


async def test_the_reply_of_an_accepted_call_is_kept_for_a_caller_that_asks_later(
    server: EmbeddedServer, namespace: str
) -> None:
    async with worker_and_caller(server.url, namespace, accept_after=0.1, keep_replies=30) as caller:
        call = await handled_slowly(caller)
        await evict_the_last(caller)
        answer = await caller.ask(call)
        assert (answer["finished"], answer["unknown"], answer["running"]) == ([call], [], [])
        await eventually(lambda: len(caller.replies[call]) == 2)
        first, again = caller.replies[call]
        assert again.body == first.body and again.json()["note"] == "kept"


async def test_the_reply_of_an_accepted_call_is_evicted_after_keep_replies(
    server: EmbeddedServer, namespace: str
) -> None:
    async with worker_and_caller(server.url, namespace, accept_after=0.1, keep_replies=0.2) as caller:
        call = await handled_slowly(caller)
        began = time.monotonic()
        while time.monotonic() - began < 0.3:  # an old reply is evicted when a new one is kept
            await handled_slowly(caller)
        answer = await caller.ask(call)
        assert answer["unknown"] == [call]
        assert answer["remembers"] < time.monotonic() - began + 1.0  # so its caller cannot conclude that it never came


async def test_a_call_that_ends_before_accept_after_is_never_accepted(server: EmbeddedServer, namespace: str) -> None:
    async with worker_and_caller(server.url, namespace, accept_after=30, keep_replies=30) as caller:
        await caller.done("slow", Work("sleep", "several sweeps", 10 * call_log._SWEEP))
        assert caller.accepted == []


async def test_a_call_that_runs_is_said_to_run_and_is_accepted_by_the_answer(
    server: EmbeddedServer, namespace: str
) -> None:
    async with worker_and_caller(server.url, namespace, accept_after=30, keep_replies=30) as caller:
        call = await caller.call("slow", Work("sleep", "asked for", 0.5))
        await eventually(lambda: is_running(caller, call))
        await eventually(lambda: call in caller.replies)
        await evict_the_last(caller)
        assert (await caller.ask(call))["finished"] == [call]


async def is_running(caller: Caller, call: str) -> bool:
    return call in (await caller.ask(call))["running"]


async def test_the_reply_of_a_quick_call_is_among_the_last_few_only(server: EmbeddedServer, namespace: str) -> None:
    async with worker_and_caller(server.url, namespace, accept_after=30, keep_replies=30) as caller:
        call = await caller.done("first", Work("echo", "first"))
        assert (await caller.ask(call))["finished"] == [call]
        await evict_the_last(caller)
        answer = await caller.ask(call)
        assert answer["unknown"] == [call] and answer["remembers"] < 10
