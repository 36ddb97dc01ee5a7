"""A worker and a caller that know nothing but docs/PROTOCOL.md take part beside natsrt's own runtimes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from autogen_core import (
    AgentId,
    CancellationToken,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    message_handler,
)

from natsrt import NatsAgentRuntime, NoLiveWorker, UndeliveredCall, UnknownAgentType
from natsrt.embedded import EmbeddedServer
from tests.support.processes import REPOSITORY, Process, Processes, eventually

FOREIGN = REPOSITORY / "examples" / "without_natsrt.py"


@dataclass
class Text:
    text: str
    pause: float = 0.0


@dataclass
class Count:
    words: int


class Echo(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("echoes")

    @message_handler
    async def echo(self, message: Text, ctx: MessageContext) -> Text:
        if message.text == "fail":
            raise LookupError("asked to fail")
        await asyncio.sleep(message.pause)
        return message


@pytest.fixture
async def runtime(own_server: EmbeddedServer) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(own_server.url) as started:
        yield started


@pytest.fixture
async def foreign_worker(own_server: EmbeddedServer, processes: Processes) -> Process:
    worker = processes.python(FOREIGN, "work", own_server.url, name="foreign")
    await worker.wait_for_line("ready")
    return worker


def test_the_foreign_program_imports_nothing_of_natsrt() -> None:
    assert not re.search(r"^\s*(from|import) (natsrt|autogen)", FOREIGN.read_text(), re.MULTILINE)


COUNTER = AgentId("counter", "default")


async def test_a_natsrt_caller_gets_the_answer_of_a_foreign_worker(
    runtime: NatsAgentRuntime, foreign_worker: Process
) -> None:
    assert await runtime.send_message(Text("one two three"), COUNTER, reply_type=Count) == Count(3)


async def test_a_slow_foreign_handler_is_accepted_and_not_cut_off(
    runtime: NatsAgentRuntime, foreign_worker: Process
) -> None:
    assert await runtime.send_message(Text("two words", pause=2.5), COUNTER) == Count(2)


async def test_a_foreign_error_arrives_as_its_own_class(runtime: NatsAgentRuntime, foreign_worker: Process) -> None:
    with pytest.raises(ValueError, match="a counter takes Text, not int") as raised:
        await runtime.send_message(7, COUNTER)
    assert raised.value.natsrt_remote.agent == "counter/default"  # type: ignore[attr-defined]


async def test_a_cancellation_reaches_a_foreign_handler(runtime: NatsAgentRuntime, foreign_worker: Process) -> None:
    token = CancellationToken()
    call = asyncio.ensure_future(runtime.send_message(Text("a", pause=60), COUNTER, cancellation_token=token))
    await eventually(lambda: runtime.running.calls.pending)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


@pytest.mark.slow
async def test_a_killed_foreign_worker_is_lost_within_five_seconds(
    runtime: NatsAgentRuntime, foreign_worker: Process
) -> None:
    call = asyncio.ensure_future(runtime.send_message(Text("a", pause=60), COUNTER))
    await eventually(lambda: any(c.accepted_by for c in runtime.running.network.calls._watch.pending.values()))
    foreign_worker.kill()
    async with asyncio.timeout(5):
        with pytest.raises(UndeliveredCall):
            await call


@pytest.mark.slow
async def test_a_foreign_worker_is_in_the_registry_and_leaves_it_when_it_dies(
    runtime: NatsAgentRuntime, foreign_worker: Process
) -> None:
    view = runtime.running.registry.view
    (worker_id,) = view.workers_hosting("counter")
    assert worker_id == f"python-{foreign_worker.pid}"
    assert [rule.pattern for rule in view.rules("counter")] == ["text"]
    # A natsrt worker beside it looks after it: heartbeats expire, and it does not answer.
    await Echo.register(runtime, "echo", Echo)
    foreign_worker.kill()
    await eventually(lambda: not view.workers_hosting("counter"), timeout=20)
    with pytest.raises(NoLiveWorker):
        await runtime.send_message(Text("a"), COUNTER)
    with pytest.raises(UnknownAgentType, match="counter"):
        await runtime.send_message(Text("a"), AgentId("nobody", "default"))


async def test_an_event_reaches_a_foreign_worker(runtime: NatsAgentRuntime, foreign_worker: Process) -> None:
    await runtime.publish_message(Text("four words in all"), TopicId("text", "here"))
    await foreign_worker.wait_for_line("event on topic.text.here: 4 words")


async def test_a_foreign_worker_confirms_a_subscription(runtime: NatsAgentRuntime, foreign_worker: Process) -> None:
    await runtime.add_subscription(TypeSubscription("text", "counter"))


async def called(processes: Processes, url: str, *arguments: str) -> list[str]:
    caller = processes.python(FOREIGN, "call", url, *arguments, name="caller")
    assert await caller.wait(20) == 0, caller.describe()
    return caller.stdout.splitlines()


async def test_a_foreign_caller_gets_the_answer_of_a_natsrt_agent(
    runtime: NatsAgentRuntime, own_server: EmbeddedServer, processes: Processes
) -> None:
    await Echo.register(runtime, "echo", Echo)
    reply = json.loads((await called(processes, own_server.url, "echo", "k", "Text", '{"text": "hi"}'))[-1])
    assert reply == {
        "specversion": "1.0",
        "type": "natsrt.reply",
        "id": "1-r",
        "source": "echo/k",
        "workerid": runtime.worker_id,
        "messagetype": "Text",
        "messageclass": "tests.test_without_natsrt.Text",
        "data": {"text": "hi", "pause": 0.0},
    }


async def test_a_foreign_caller_is_told_that_a_slow_call_was_accepted(
    runtime: NatsAgentRuntime, own_server: EmbeddedServer, processes: Processes
) -> None:
    await Echo.register(runtime, "echo", Echo)
    printed = await called(processes, own_server.url, "echo", "k", "Text", '{"text": "hi", "pause": 1.5}')
    assert printed[0] == f"accepted by {runtime.worker_id}"
    assert json.loads(printed[1])["data"] == {"text": "hi", "pause": 1.5}


async def test_a_foreign_caller_gets_a_natsrt_agents_exception(
    runtime: NatsAgentRuntime, own_server: EmbeddedServer, processes: Processes
) -> None:
    await Echo.register(runtime, "echo", Echo)
    error = json.loads((await called(processes, own_server.url, "echo", "a", "Text", '{"text": "fail"}'))[-1])
    assert error["type"] == "natsrt.error"
    assert error["source"] == "echo/a"
    assert error["data"]["type"] == "builtins.LookupError"
    assert error["data"]["message"] == "asked to fail"
    assert error["data"]["args"] == ["asked to fail"]
    assert "asked to fail" in error["data"]["traceback"]


async def test_a_foreign_caller_learns_that_nobody_hosts_a_type(
    runtime: NatsAgentRuntime, own_server: EmbeddedServer, processes: Processes
) -> None:
    printed = await called(processes, own_server.url, "nobody", "k", "Text", '{"text": "hi"}')
    assert printed == ["lost: no worker hosts nobody"]
