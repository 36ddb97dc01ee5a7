"""Agents and teams of AgentChat on a worker, used from another runtime: turns, sessions, errors, types, components."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import nats
import pytest

pytest.importorskip("autogen_agentchat", reason="autogen-agentchat is not installed: pip install 'natsrt[dev]'")
pytest.importorskip("autogen_ext", reason="autogen-ext is not installed: pip install 'natsrt[dev]'")

from autogen_agentchat.agents import AssistantAgent, UserProxyAgent
from autogen_agentchat.base import ChatAgent, Response, TaskResult, Team
from autogen_agentchat.messages import (
    BaseAgentEvent,
    BaseChatMessage,
    HandoffMessage,
    ModelClientStreamingChunkEvent,
    MultiModalMessage,
    StructuredMessage,
    TextMessage,
    ThoughtEvent,
    ToolCallExecutionEvent,
)
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_agentchat.ui import Console
from autogen_core import AgentId, AgentInstantiationContext, CancellationToken, ComponentModel, Image, RoutedAgent
from autogen_core.models import AssistantMessage, UserMessage
from autogen_ext.models.replay import ReplayChatCompletionClient

import natsrt
from natsrt import KeyedOptions, NatsAgentRuntime, Options
from natsrt.agentchat import RemoteChatAgent, RemoteTeam, host
from natsrt.contrib.agentchat import closing
from natsrt.contrib.agentchat.message_types import MessageTypes
from natsrt.contrib.agentchat.repeats import Repeats
from natsrt.contrib.agentchat.requests import ChatTurn, TeamRun
from natsrt.contrib.agentchat.sources import renamed
from natsrt.embedded import EmbeddedServer
from natsrt.errors import AgentNotServed, CannotSerialize, NoLiveWorker, StateNotSaved
from tests.programs.chat_teams import MODEL, Plan, assistant, calls
from tests.support.chat import CancelsItself, Counter, Made, Odd, said
from tests.support.processes import REPOSITORY, Processes, eventually

PIXEL = Image.from_base64(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


@pytest.fixture
async def worker(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(server.url, namespace=namespace) as started:
        yield started


@pytest.fixture
async def runtime(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(server.url, namespace=namespace) as started:
        yield started


class Other(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("is no agent of AgentChat")


async def counter(worker: NatsAgentRuntime, runtime: NatsAgentRuntime, **settings: Any) -> tuple[RemoteChatAgent, Made]:
    made = Made()
    await host(worker, "counter", made)
    return await RemoteChatAgent.connect("counter", runtime, timeout=10, **settings), made


# -- who it is -------------------------------------------------------------------------------------------------------


async def test_name_description_and_types_are_those_of_the_worker(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    await host(worker, "my-writer", assistant("writer", "text"))
    agent = await RemoteChatAgent.connect("my-writer", runtime, timeout=10)
    local = assistant("writer", "text")()
    assert (agent.name, agent.description) == ("writer", "is writer")
    assert list(agent.produced_message_types) == list(local.produced_message_types)
    renamed_agent = RemoteChatAgent("my-writer", runtime, name="author", description="writes books")
    assert (renamed_agent.name, renamed_agent.description) == ("author", "writes books")
    assert agent.session != renamed_agent.session


async def test_an_agent_waits_for_its_worker(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    with pytest.raises(LookupError, match=r"no live worker that hosts 'counter'.*await connect"):
        RemoteChatAgent("counter", runtime)
    with pytest.raises(AgentNotServed):
        await RemoteChatAgent.connect("counter", runtime, timeout=0.2)
    connecting = asyncio.create_task(RemoteChatAgent.connect("counter", runtime))
    early = RemoteChatAgent("counter", runtime, name="early", description="needs no worker yet")
    await host(worker, "counter", Counter)
    assert await said(await connecting, "one") == await said(early, "one") == "1"


@pytest.mark.parametrize(
    ("error", "text", "settings"),
    [
        (ValueError, "retries must be a whole number", {"retries": -1}),
        (ValueError, "retries must be a whole number", {"retries": True}),
        (TypeError, r"must be subclasses of.*StructuredMessage\[Plan\], not <class 'int'>", {"message_types": [int]}),
        (ValueError, "session must be a text that is not empty", {"session": ""}),
        (ValueError, "must be a valid Python identifier", {"name": "not a name"}),
    ],
)  # fmt: skip
async def test_wrong_arguments_are_refused(
    error: type[Exception], text: str, settings: dict[str, Any], worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    with pytest.raises(error, match=text):
        await counter(worker, runtime, **settings)


async def test_what_is_hosted_otherwise_is_refused(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    await host(worker, "agent", Counter)
    await host(worker, "team", lambda: RoundRobinGroupChat([Counter()], max_turns=1))
    await worker.register_factory("other", Other)
    await runtime.wait_for("other")
    with pytest.raises(ValueError, match="'agent' is an agent: use RemoteChatAgent"):
        RemoteTeam("agent", runtime)
    with pytest.raises(ValueError, match="'team' is a team: use RemoteTeam"):
        RemoteChatAgent("team", runtime)
    with pytest.raises(ValueError, match=r"'other' is not hosted by natsrt\.agentchat\.host"):
        RemoteTeam("other", runtime)
    with pytest.raises(TypeError, match="runtime must be a NatsAgentRuntime"):
        RemoteTeam("team", None)  # type: ignore[arg-type]


async def test_what_cannot_be_hosted_is_refused(worker: NatsAgentRuntime) -> None:
    with pytest.raises(TypeError, match="factory must be a function that makes a ChatAgent or a Team"):
        await host(worker, "counter", Counter())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the factory of 'counter' must make a ChatAgent or a Team, not 5"):
        await host(worker, "counter", lambda: 5)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="concurrency='serial'"):
        await host(worker, "counter", Counter, keyed=KeyedOptions(concurrency="concurrent"))
    with pytest.raises(ValueError, match="details have .* bytes as JSON, and may have 16,384"):
        await host(worker, "long", lambda: AssistantAgent("a", None, description="x" * 20_000))  # type: ignore[arg-type]


# -- turns -----------------------------------------------------------------------------------------------------------


async def test_a_factory_that_needs_a_started_runtime_says_so(server: EmbeddedServer, namespace: str) -> None:
    not_started = NatsAgentRuntime(server.url, namespace=namespace)

    async def pair() -> Team:
        return RoundRobinGroupChat([await RemoteChatAgent.connect("writer", not_started)])

    async def other_pair() -> Team:
        return RoundRobinGroupChat([RemoteChatAgent("writer", not_started)])

    async def named_pair() -> Team:
        return RoundRobinGroupChat([RemoteChatAgent("writer", not_started, name="writer", description="writes")])

    for factory in (pair, other_pair):
        with pytest.raises(RuntimeError, match="start it first .before `host`.*name=... and description=..."):
            await host(not_started, "pair", factory)
    await host(not_started, "pair", named_pair)


async def test_each_session_has_an_agent_of_its_own(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    first, made = await counter(worker, runtime)
    second = RemoteChatAgent("counter", runtime)
    assert [await said(first, "a"), await said(second, "b"), await said(first, "c")] == ["1", "1", "2"]
    assert [one.got for one in made.all] == [["a", "c"], ["b"]]


async def test_agents_with_one_session_share_a_conversation_which_survives_its_worker(
    server: EmbeddedServer, namespace: str, runtime: NatsAgentRuntime
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        first, _ = await counter(worker, runtime, session="ada")
        assert await said(first, "a") == "1"
        assert await said(RemoteChatAgent("counter", runtime, session="ada"), "b") == "2"
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        await host(worker, "counter", Counter)
        assert await said(first, "c") == "3"
        assert await first.save_state() == {"got": ["a", "b", "c"]}


@pytest.mark.parametrize("end", ["stopped", "forgotten"])
async def test_a_turn_with_retries_waits_for_a_worker(
    end: str, server: EmbeddedServer, namespace: str, runtime: NatsAgentRuntime
) -> None:
    """The only worker has stopped; or this runtime does not know the type."""
    agent = RemoteChatAgent("counter", runtime, name="counter", description="", session="ada", retries=1)
    if end == "stopped":
        async with NatsAgentRuntime(server.url, namespace=namespace) as first:
            await host(first, "counter", Counter)
            await runtime.wait_for("counter", timeout=10)
            assert await said(agent, "a") == "1"
        with pytest.raises(NoLiveWorker):
            await said(RemoteChatAgent("counter", runtime, name="counter", description="", session="ada"), "b")
    running = asyncio.create_task(said(agent, "b"))
    async with NatsAgentRuntime(server.url, namespace=namespace) as second:
        await asyncio.wait({running}, timeout=0.5)
        assert not running.done()
        await host(second, "counter", Counter)
        assert await running == ("2" if end == "stopped" else "1")


async def test_turns_of_one_session_come_one_after_the_other(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    first, made = await counter(worker, runtime, session="ada")
    others = [RemoteChatAgent("counter", runtime, session="ada") for _ in range(3)]
    running = asyncio.create_task(said(first, "wait"))
    await eventually(lambda: made.all and made.all[0].events == ["waits"])
    waiting = [asyncio.create_task(said(other, f"{n}")) for n, other in enumerate(others)]
    assert not (await asyncio.wait(waiting, timeout=0.3))[0]
    made.all[0].may_go_on.set()
    assert [await running, *await asyncio.gather(*waiting)] == ["1", "2", "3", "4"]


async def test_the_factory_knows_the_session(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    async def make() -> Counter:
        await asyncio.sleep(0)
        return Counter(f"of_{AgentInstantiationContext.current_agent_id().key}")

    await host(worker, "counter", make)
    agent = await RemoteChatAgent.connect("counter", runtime, session="ada", name="me")
    assert (await agent.run(task="x")).messages[-1].source == "me"
    assert await runtime.send_message("y", AgentId("counter", "bob")) is not None


async def test_a_turn_that_fails_does_not_count(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    agent, made = await counter(worker, runtime)
    assert await said(agent, "a") == "1"
    seen = []
    with pytest.raises(ValueError, match="it failed") as raised:
        async for item in agent.run_stream(task="fail"):
            seen.append(type(item))
    assert "on_messages_stream" in raised.value.natsrt_remote.traceback  # type: ignore[attr-defined]
    assert seen == [TextMessage, ThoughtEvent]
    assert await agent.save_state() == {"got": ["a"]}
    assert await said(agent, "b") == "2"
    assert [one.got for one in made.all] == [["a", "fail"], ["a", "b"]]
    assert made.all[0].events == ["closed"]


class Numbers(Counter):
    """Has numbers in its state, and some of them cannot be stored."""

    async def save_state(self) -> Mapping[str, Any]:
        return {"got": list(self.got), "numbers": [float(text) for text in self.got]}


@pytest.mark.parametrize("save", ["message", "interval", "manual"])
async def test_a_turn_whose_state_cannot_be_stored_does_not_count(
    save: Any, worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    await host(worker, "numbers", Numbers, keyed=KeyedOptions(save=save))
    agent = await RemoteChatAgent.connect("numbers", runtime, timeout=10)
    assert await said(agent, "1") == "1"
    with pytest.raises(CannotSerialize, match="state holds"):
        await said(agent, "nan")
    assert await said(agent, "2") == "2"
    with pytest.raises(CannotSerialize, match="state holds"):
        await agent.load_state({"got": ["inf"]})
    assert await agent.save_state() == {"got": ["1", "2"], "numbers": [1, 2]}


async def test_a_turn_that_finds_no_room_to_be_stored_does_not_count(
    server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    agent, made = await counter(worker, runtime)
    assert await said(agent, "a") == "1"
    nc = await nats.connect(server.url)
    try:
        jetstream = nc.jetstream()
        (bucket,) = [
            one for one in await jetstream.streams_info() if one.config.name == f"KV_{namespace}_natsrt_agents"
        ]
        await jetstream.update_stream(bucket.config.evolve(max_msg_size=2_000))
        with pytest.raises(StateNotSaved):
            await said(agent, "b" * 5_000)
        assert await said(agent, "c") == "2"
    finally:
        await nc.close()
    assert await agent.save_state() == {"got": ["a", "c"]}
    assert made.all[-1].got == ["a", "c"]


async def test_a_turn_that_is_cancelled_does_not_count(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    agent, made = await counter(worker, runtime)
    assert await said(agent, "a") == "1"
    token = CancellationToken()
    running = asyncio.create_task(agent.run(task="wait", cancellation_token=token))
    await eventually(lambda: made.all[0].events == ["waits"])
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await eventually(lambda: made.all[0].events == ["waits", "cancelled", "closed"])
    assert await said(agent, "b") == "2"
    assert made.all[1].got == ["a", "b"]


async def test_an_agent_that_cancels_itself_fails(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    await host(worker, "odd", CancelsItself)
    with pytest.raises(RuntimeError, match="was cancelled, but not by its caller"):
        await said(await RemoteChatAgent.connect("odd", runtime, timeout=10), "a")


class NeverCloses(Counter):
    async def close(self) -> None:
        self.events.append("closes")
        await asyncio.Event().wait()


async def test_an_agent_that_does_not_close_holds_nothing_up(
    server: EmbeddedServer,
    namespace: str,
    runtime: NatsAgentRuntime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(closing, "CLOSE_WITHIN", 0.3)
    made = Made(NeverCloses)
    async with asyncio.timeout(20):
        async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
            await host(worker, "counter", made)
            agent = await RemoteChatAgent.connect("counter", runtime, timeout=10)
            assert await said(agent, "a") == "1"
            await agent.close()
            assert await said(agent, "b") == "2"
    assert [one.events for one in made.all] == [["closes"], ["closes"]]
    assert "did not close within" in caplog.text


async def test_what_is_made_to_be_announced_is_closed(worker: NatsAgentRuntime) -> None:
    made = Made()
    await host(worker, "counter", made)
    assert [one.events for one in made._made] == [["closed"]]


async def test_a_turn_that_is_completed_although_it_was_cancelled_does_not_count(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    agent, made = await counter(worker, runtime, session="ada")
    token = CancellationToken()
    task: list[BaseChatMessage] = [TextMessage(content=text, source="user") for text in ("deaf", "wait")]
    turn = ChatTurn(messages=task, name="me", turn="t1")
    running = asyncio.create_task(
        runtime.send_message(
            turn, AgentId("counter", "ada"), cancellation_token=token
        )  # streams are stopped in any case
    )
    await eventually(lambda: made.all and made.all[0].events == ["waits"])
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await said(agent, "a") == "1"


async def test_a_turn_whose_answer_nobody_takes_does_not_count(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    made = Made()
    await host(worker, "counter", made)
    agent = await RemoteChatAgent.connect("counter", runtime, session="ada")
    turn = ChatTurn(messages=[TextMessage(content="a", source="user")], name="me", turn="t1")
    async with runtime.stream_message(turn, AgentId("counter", "ada"), window=1):
        await eventually(lambda: made.all and made.all[0].saves == 2)  # before the turn, and at its end
    assert await said(agent, "b") == "1"


async def test_a_turn_that_is_left_does_not_count(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    agent, made = await counter(worker, runtime)
    assert await said(agent, "a") == "1"
    async with aclosing(
        agent.on_messages_stream([TextMessage(content="wait", source="user")], CancellationToken())
    ) as items:
        async for _ in items:
            break
    await eventually(lambda: "closed" in made.all[0].events)
    assert await said(agent, "b") == "2"
    assert made.all[1].got == ["a", "b"]


class Silent(Counter):
    """Says nothing before its answer."""

    async def on_messages_stream(
        self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | Response, None]:
        async for item in super().on_messages_stream(messages, cancellation_token):
            if isinstance(item, Response):
                yield item


CALLER = """
import asyncio, sys
from natsrt import NatsAgentRuntime
from natsrt.agentchat import RemoteChatAgent

async def main():
    async with NatsAgentRuntime(sys.argv[1], namespace=sys.argv[2]) as runtime:
        agent = await RemoteChatAgent.connect("silent", runtime, session="ada")
        await agent.run(task="wait")

asyncio.run(main())
"""


async def test_a_caller_that_is_killed_is_noticed_although_the_agent_says_nothing(
    server: EmbeddedServer, namespace: str, processes: Processes, tmp_path: Path
) -> None:
    options = Options.load(servers=server.url, namespace=namespace).replace(stream_idle_timeout=2)
    async with NatsAgentRuntime(options=options) as worker:
        made = Made(Silent)
        await host(worker, "silent", made)
        program = tmp_path / "caller.py"
        program.write_text(CALLER)
        caller = processes.python(program, server.url, namespace, name="caller")
        await eventually(lambda: made.all and made.all[0].events == ["waits"], 20)
        caller.kill()
        await eventually(lambda: made.all[0].events == ["waits", "cancelled", "closed"], 20)
        assert await said(await RemoteChatAgent.connect("silent", worker, session="ada"), "a") == "1"


async def test_a_turn_whose_task_is_cancelled_does_not_count(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    agent, made = await counter(worker, runtime)
    running = asyncio.create_task(agent.run(task="wait"))
    await eventually(lambda: made.all and made.all[0].events == ["waits"])
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await said(agent, "b") == "1"


async def test_a_turn_is_paused_and_resumed_while_it_runs(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    agent, made = await counter(worker, runtime)
    running = asyncio.create_task(said(agent, "wait"))
    await eventually(lambda: made.all and made.all[0].events == ["waits"])
    async with asyncio.timeout(5):
        await agent.on_pause(CancellationToken())
        await agent.on_resume(CancellationToken())
        assert await agent.save_state() == {"got": []}
    made.all[0].may_go_on.set()
    assert await running == "1"
    assert made.all[0].events == ["waits", "paused", "resumed"]


async def test_an_agent_is_reset_saved_and_loaded(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    agent, made = await counter(worker, runtime)
    assert await agent.save_state() == {"got": []}
    await said(agent, "a")
    saved = await agent.save_state()
    await agent.on_reset(CancellationToken())
    assert (await agent.save_state(), await said(agent, "b")) == ({"got": []}, "1")
    await agent.load_state(json.loads(json.dumps(saved)))
    assert await said(agent, "c") == "2"
    with pytest.raises(KeyError):
        await agent.load_state({"nothing": 1})
    assert await said(agent, "d") == "3"
    local = Counter()
    await local.load_state(await agent.save_state())
    assert local.got == ["a", "c", "d"]


async def test_a_state_that_is_no_mapping_is_refused(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    agent, _ = await counter(worker, runtime)
    await host(worker, "team", counting_team)
    for remote in (agent, await RemoteTeam.connect("team", runtime, timeout=10)):
        for state in ("state", [("a", 1)], None):
            with pytest.raises(TypeError, match="a state must be a mapping"):
                await remote.load_state(state)  # type: ignore[arg-type]


async def test_an_agent_is_closed_although_the_server_is_gone(own_server: EmbeddedServer, namespace: str) -> None:
    options = Options.load(servers=own_server.url, namespace=namespace).replace(offline_timeout=1)
    async with NatsAgentRuntime(options=options) as both:
        agent, _ = await counter(both, both)
        caller = NatsAgentRuntime(options=options)
        await caller.start()
        remote = await RemoteChatAgent.connect("counter", caller, timeout=10)
        assert await said(remote, "a") == "1"
        await own_server.stop()
        async with asyncio.timeout(20):
            await remote.close()
        await own_server.start()
        await caller.close()


async def test_closing_releases_the_agent_and_keeps_the_session(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    agent, made = await counter(worker, runtime)
    await agent.close()  # it was not used, so there is nothing to close
    assert not made.all
    await said(agent, "a")
    await agent.close()
    assert made.all[0].events == ["closed"]
    assert await said(agent, "b") == "2"
    await worker.stop()
    await agent.close()  # nobody is there who could close something


async def test_an_idle_session_is_closed_and_loaded_again(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    made = Made()
    await host(worker, "counter", made, keyed=KeyedOptions(idle_timeout=1))
    agent = await RemoteChatAgent.connect("counter", runtime)
    await said(agent, "a")
    await eventually(lambda: made.all[0].events == ["closed"], 10)
    assert await said(agent, "b") == "2"


async def test_a_turn_that_is_sent_again_is_answered_from_what_is_stored(
    server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    """As after a worker that was lost when it had stored the state, and before its caller had the answer."""
    await host(worker, "counter", Counter)
    session = AgentId("counter", "ada")
    turn = ChatTurn(messages=[TextMessage(content="a", source="user")], name="me", turn="t1", keep=True)
    await runtime.wait_for("counter")

    async def items() -> list[Any]:
        async with runtime.stream_message(turn, session) as stream:
            return [item async for item in stream]

    first = await items()
    async with NatsAgentRuntime(server.url, namespace=namespace) as other:
        await host(other, "counter", Counter)
        await worker.stop()
        assert await items() == first
        agent = await RemoteChatAgent.connect("counter", runtime, session="ada")
        assert await agent.save_state() == {"got": ["a"]}
        turn.turn = "t2"
        assert (await items())[-1].chat_message.to_text() == "2"


async def test_an_agent_that_comes_back_to_itself_is_refused(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    async def again(text: str) -> str:
        """Asks the same session."""
        return await said(RemoteChatAgent("self", worker, session="ada", name="x", description="x"), text)

    await host(worker, "self", assistant("own", calls("again", text="?"), "no", tools=[again]))
    agent = await RemoteChatAgent.connect("self", runtime, session="ada")
    async with asyncio.timeout(10):
        result = await agent.run(task="Begin.")
    (execution,) = [one for one in result.messages if isinstance(one, ToolCallExecutionEvent)]
    assert "self/ada -> self/ada" in str(execution.content[0].content)


async def test_agents_that_call_one_another_in_a_circle_are_refused(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    def calling(other: str) -> Any:
        async def call(text: str) -> str:
            """Asks the other one."""
            return await said(RemoteChatAgent(other, worker, session="ada", name="x", description="x"), text)

        return call

    for own, other in (("one", "two"), ("two", "one")):
        await host(worker, own, assistant(own, calls("call", text="?"), "no", tools=[calling(other)]))
    agent = await RemoteChatAgent.connect("one", runtime, session="ada")
    async with asyncio.timeout(10):
        result = await agent.run(task="Begin.")
    (execution,) = [one for one in result.messages if isinstance(one, ToolCallExecutionEvent)]
    assert "one/ada -> two/ada -> one/ada" in str(execution.content[0].content)


# -- teams -----------------------------------------------------------------------------------------------------------


def counting_team() -> RoundRobinGroupChat:
    return RoundRobinGroupChat([Counter("one"), Counter("two")], max_turns=2)


async def test_a_team_runs_goes_on_and_is_reset(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    await host(worker, "team", counting_team)
    ours, theirs = await RemoteTeam.connect("team", runtime), counting_team()

    async def outcome(team: Team, **task: Any) -> Any:
        result = await team.run(**task)
        return result.stop_reason, [(type(one), one.source, one.to_text()) for one in result.messages]

    tasks: list[dict[str, Any]] = [
        {"task": "Begin."},
        {},
        {"task": [TextMessage(content=text, source="user") for text in "ab"], "output_task_messages": False},
        {"task": TextMessage(content="c", source="user")},
    ]
    for task in tasks:
        assert await outcome(ours, **task) == await outcome(theirs, **task)
    await ours.reset()
    await theirs.reset()
    assert await outcome(ours, task="Again.") == await outcome(theirs, task="Again.")
    wrong: dict[str, Any] = {"cannot be empty": [], "valid BaseChatMessage types": ["text"], "must be a string": 5}
    for text, task in wrong.items():
        with pytest.raises(ValueError, match=text):
            await ours.run(task=task)


async def test_a_team_that_runs_is_busy(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    made = Made(lambda: RoundRobinGroupChat([Counter("one")], max_turns=1))
    await host(worker, "team", made)
    team = await RemoteTeam.connect("team", runtime)
    with pytest.raises(RuntimeError, match="not running"):
        await team.pause()
    running = asyncio.create_task(team.run(task="wait"))

    def participant() -> Counter:
        found = made.all[-1]._participants[0]
        assert isinstance(found, Counter)
        return found

    await eventually(lambda: made.all and participant().events == ["waits"])
    with pytest.raises(ValueError, match="already running"):
        await team.run(task="x")
    with pytest.raises(RuntimeError, match="must be stopped before it can be reset"):
        await team.reset()
    with pytest.raises(RuntimeError, match="cannot be loaded while it is running"):
        await team.load_state({})
    async with asyncio.timeout(5):
        await team.pause()
        await team.resume()
    participant().may_go_on.set()
    assert (await running).messages[-1].to_text() == "1"
    assert participant().events == ["waits", "paused", "resumed"]


class Talker(Counter):
    """Says more than its reader takes."""

    async def on_messages_stream(
        self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | Response, None]:
        for n in range(2_000):
            yield ThoughtEvent(content=str(n), source=self.name)
        self.events.append("said all")
        yield Response(chat_message=TextMessage(content="ok", source=self.name))


async def test_a_team_that_has_ended_is_not_paused_although_its_reader_is_slow(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    made = Made(lambda: RoundRobinGroupChat([Talker("one")], max_turns=1))
    await host(worker, "team", made)
    team = await RemoteTeam.connect("team", runtime, timeout=10)
    async with asyncio.timeout(20), aclosing(team.run_stream(task="a")) as items:
        await anext(items)
        await eventually(lambda: made.all and made.all[0]._participants[0].events == ["said all"])
        with pytest.raises(RuntimeError, match="not running"):
            await team.pause()
        with pytest.raises(RuntimeError, match="not running"):
            await team.resume()
        assert [item async for item in items][-1].stop_reason is not None  # type: ignore[union-attr]
        assert await said(team, "b") == "ok"
    assert "paused" not in made.all[-1]._participants[0].events  # the team may have been paused at its very end


async def test_the_error_of_a_team_has_no_traceback_in_its_text(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    await host(worker, "team", lambda: RoundRobinGroupChat([Counter("one")], max_turns=1))
    team = await RemoteTeam.connect("team", runtime, timeout=10)
    with pytest.raises(RuntimeError) as raised:
        await team.run(task="fail")
    assert str(raised.value) == "ValueError: it failed"


async def test_a_run_that_is_left_or_fails_does_not_count(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    made = Made(lambda: RoundRobinGroupChat([Counter("one")], max_turns=1))
    await host(worker, "team", made)
    team = await RemoteTeam.connect("team", runtime)
    assert await said(team, "a") == "1"
    async with aclosing(team.run_stream(task="wait")) as items:
        async for item in items:
            if isinstance(item, ThoughtEvent):
                break
    left = made.all[0]._participants[0]
    await eventually(lambda: left.events == ["waits", "cancelled"])
    with pytest.raises(RuntimeError, match="ValueError: it failed"):
        await team.run(task="fail")
    token = CancellationToken()
    running = asyncio.create_task(team.run(task="wait", cancellation_token=token))
    await eventually(lambda: made.all[-1]._participants[0].events == ["waits"])
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await said(team, "b") == "2"


async def test_a_run_ends_whose_messages_cannot_be_sent(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    """The team is told, and does not go on waiting."""
    made = Made(lambda: RoundRobinGroupChat([Counter("one")], max_turns=1, custom_message_types=[Odd]))
    await host(worker, "team", made)
    team = await RemoteTeam.connect("team", runtime)
    async with asyncio.timeout(10):
        with pytest.raises(CannotSerialize, match="nan"):
            await team.run(task=[TextMessage(content=text, source="user") for text in ("odd", "wait")])
        assert made.all[0]._participants[0].events == ["waits", "cancelled"]
        assert await said(team, "a") == "1"


async def test_a_run_that_is_sent_again_is_answered_from_what_is_stored(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    await host(worker, "team", counting_team)
    run = TeamRun(task=[TextMessage(content="a", source="user")], output_task_messages=True, turn="t1", keep=True)
    await runtime.wait_for("team")

    async def items() -> list[Any]:
        async with runtime.stream_message(run, AgentId("team", "ada")) as stream:
            return [item async for item in stream]

    first = await items()
    assert await items() == first
    assert isinstance(first[-1], TaskResult)


# -- messages --------------------------------------------------------------------------------------------------------


class Receipt(BaseChatMessage):
    """A message class of the application's own."""

    total: float

    def to_text(self) -> str:
        return f"total {self.total}"

    def to_model_text(self) -> str:
        return self.to_text()

    def to_model_message(self) -> UserMessage:
        return UserMessage(content=self.to_text(), source=self.source)


class Till(Counter):
    """Answers with `Receipt`."""

    @property
    def produced_message_types(self) -> Sequence[type[BaseChatMessage]]:
        return (Receipt,)

    async def on_messages_stream(
        self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | Response, None]:
        assert isinstance(messages[-1], Receipt | MultiModalMessage | StructuredMessage)
        yield Response(chat_message=Receipt(total=1.5, source=self.name, metadata={"of": messages[-1].to_text()}))


async def test_messages_of_all_kinds_arrive_as_they_were_sent(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    made = Made(Till)
    await host(worker, "till", made, message_types=[StructuredMessage[Plan]])
    agent = await RemoteChatAgent.connect("till", runtime, message_types=[Receipt, StructuredMessage[Plan]])
    assert list(agent.produced_message_types) == [Receipt, StructuredMessage[Plan]]
    for message in (
        Receipt(total=2, source="user"),
        MultiModalMessage(content=["What is this?", PIXEL], source="user"),
        StructuredMessage[Plan](content=Plan(steps=["look"]), source="user"),
    ):
        result = await agent.run(task=message)
        assert result.messages[0] is message
        assert type(result.messages[-1]) is Receipt
        assert result.messages[-1].metadata == {"of": message.to_text()}


async def test_structured_answers_of_a_model(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    await host(worker, "planner", assistant("planner", '{"steps": ["a"]}', output_content_type=Plan))
    agent = await RemoteChatAgent.connect("planner", runtime, message_types=[StructuredMessage[Plan]], retries=1)
    (_, answer) = (await agent.run(task="Plan.")).messages
    assert isinstance(answer, StructuredMessage) and answer.content == Plan(steps=["a"])


async def test_a_message_class_that_is_not_known_here_is_named(
    server: EmbeddedServer, namespace: str, processes: Processes, runtime: NatsAgentRuntime
) -> None:
    source = """
import asyncio, sys
from autogen_agentchat.messages import TextMessage
from natsrt import NatsAgentRuntime
from natsrt.agentchat import host
from tests.test_agentchat_remote import Counter

class Unheard(TextMessage): ...

class Odd(Counter):
    produced_message_types = (TextMessage, Unheard)

async def main():
    async with NatsAgentRuntime(sys.argv[1], namespace=sys.argv[2]) as runtime:
        await host(runtime, "odd", Odd)
        await runtime.stop_when_signal()

asyncio.run(main())
"""
    processes.python(source, server.url, namespace)
    with pytest.raises(ValueError, match=r"'odd' sends messages of a type.*message_types=\[Unheard\]"):
        await RemoteChatAgent.connect("odd", runtime, timeout=20)


async def test_a_message_class_that_is_not_known_at_the_worker_is_named(
    server: EmbeddedServer, namespace: str, processes: Processes, runtime: NatsAgentRuntime
) -> None:
    class Unknown(TextMessage):
        pass

    worker = REPOSITORY / "tests" / "programs" / "chat_teams.py"
    processes.python(worker, server.url, namespace, "worker", "0")
    agent = await RemoteChatAgent.connect("selector.0", runtime, timeout=20, message_types=[Unknown], retries=2)
    async with asyncio.timeout(10):
        with pytest.raises(ValueError, match="Unknown"):
            await agent.run(task=Unknown(content="x", source="user"))


async def test_structured_types_of_a_configuration_are_made_anew_for_each_session(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    """Their classes have one full name, and are different ones."""
    dumped = AssistantAgent(
        "planner",
        ReplayChatCompletionClient(['{"steps": ["a"]}', '{"steps": ["b"]}'], model_info=MODEL),
        output_content_type=Plan,
        output_content_type_format="plan",
    ).dump_component()
    await host(worker, "planner", lambda: AssistantAgent.load_component(dumped))
    agents = [
        await RemoteChatAgent.connect("planner", runtime, message_types=[StructuredMessage[Plan]]) for _ in range(3)
    ]
    for step in "ab":
        for agent in agents:
            answer = (await agent.run(task="Plan.")).messages[-1]
            assert isinstance(answer, StructuredMessage)
            assert answer.content.model_dump() == {"steps": [step]}


async def test_the_source_is_the_name_here(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    await host(worker, "writer", assistant("writer", "one two", model_client_stream=True))
    agent = await RemoteChatAgent.connect("writer", runtime, name="author")
    sources = [item.source async for item in agent.run_stream(task="x") if not isinstance(item, TaskResult)]
    assert set(sources[1:]) == {"author"} and len(sources) > 3


def test_all_that_an_agent_says_is_renamed() -> None:
    context = [AssistantMessage(content="x", source="far"), UserMessage(content="y", source="far")]
    handoff = HandoffMessage(content="go", target="far", source="far", context=context)
    others = TextMessage(content="z", source="user")
    response = renamed(Response(chat_message=handoff, inner_messages=[others, handoff]), "far", "near")
    assert response.inner_messages is not None
    for message in (response.chat_message, response.inner_messages[1]):
        assert isinstance(message, HandoffMessage)
        assert (message.source, message.target, message.id) == ("near", "far", handoff.id)
        assert [one.source for one in message.context if isinstance(one, AssistantMessage)] == ["near"]
    assert response.inner_messages[0] is others
    assert renamed(handoff, "far", "far") is handoff
    assert handoff.source == "far"


def test_what_an_attempt_repeats_is_left_out_up_to_the_first_difference() -> None:
    def text(content: str) -> TextMessage:
        return TextMessage(content=content, source="a")

    def chunk(content: str) -> ModelClientStreamingChunkEvent:
        return ModelClientStreamingChunkEvent(content=content, source="a")

    repeats = Repeats()
    assert [repeats.is_new(one) for one in (text("1"), chunk("x"), chunk("y"), text("2"))] == [True] * 4
    repeats.again()
    assert [repeats.is_new(one) for one in (text("1"), text("2"), chunk("x"))] == [False] * 3
    repeats.again()
    assert [repeats.is_new(one) for one in (text("1"), text("3"), text("2"), chunk("y"), chunk("x"))] == [
        False, True, True, True, True,
    ]  # fmt: skip


def test_message_types_are_found_by_name_if_only_one_class_has_it() -> None:
    types = MessageTypes([])
    assert types.find("Receipt") is Receipt
    assert types.find("TextMessage") is TextMessage
    assert types.find("Nowhere") is None
    assert list(types) == [Receipt]
    with pytest.raises(ValueError, match="the message type Nowhere is not known here"):
        types.load({"type": "Nowhere", "message": {}})


def test_two_message_types_of_one_name_are_refused() -> None:
    other = type("Receipt", (Receipt,), {"__module__": "elsewhere"})
    assert list(MessageTypes([Receipt, Receipt])) == [Receipt]
    with pytest.raises(ValueError, match="two classes with the name Receipt"):
        MessageTypes([Receipt, other])


# -- with the rest of AgentChat --------------------------------------------------------------------------------------


async def test_the_console_shows_a_remote_agent(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    await host(worker, "writer", assistant("writer", "one two", model_client_stream=True))
    result = await Console((await RemoteChatAgent.connect("writer", runtime)).run_stream(task="Write."))
    assert result.messages[-1].to_text() == "one two"
    assert "---------- ModelClientStreamingChunkEvent (writer) ----------\none two\n" in capsys.readouterr().out


async def test_remote_agents_and_teams_are_tools(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    await host(worker, "writer", assistant("writer", "a poem"))
    await host(worker, "team", lambda: RoundRobinGroupChat([assistant("deep", "a thought")()], max_turns=1))
    writer = await RemoteChatAgent.connect("writer", runtime)
    team = await RemoteTeam.connect("team", runtime)
    tools: list[Any] = [
        AgentTool(writer, return_value_as_last_message=True),
        TeamTool(team, "think", "thinks", return_value_as_last_message=True),  # type: ignore[arg-type]
    ]
    answers = (calls("writer", task="Write."), "done", calls("think", task="Think."), "done")
    local = assistant("boss", *answers, tools=tools)()
    results = [await local.run(task=task) for task in ("first", "second")]
    texts = [message.to_text() for result in results for message in result.messages]
    assert any("a poem" in text for text in texts)


async def ask_the_user(prompt: str, cancellation_token: CancellationToken | None = None) -> str:
    return str(await natsrt.ask(prompt, reply_type=str))


async def test_a_human_answers_from_the_callers_process(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    await host(worker, "human", lambda: UserProxyAgent("human", input_func=ask_the_user))
    asked: list[str] = []

    async def on_question(question: str) -> str:
        asked.append(question)
        return "APPROVE"

    agent = await RemoteChatAgent.connect("human", runtime, on_question=on_question)
    assert await said(agent, "May I?") == "APPROVE"
    assert len(asked) == 1
    with pytest.raises(RuntimeError, match="NobodyToAsk|asks"):
        await said(RemoteChatAgent("human", runtime), "May I?")


async def test_a_question_passes_on_through_a_team(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    """From an agent, through the team that has it as a remote agent, to whoever runs the team."""
    await host(worker, "human", lambda: UserProxyAgent("human", input_func=ask_the_user))

    async def team() -> RoundRobinGroupChat:
        human = await RemoteChatAgent.connect("human", worker, on_question=natsrt.ask)
        return RoundRobinGroupChat([human, assistant("clerk", "noted")()], max_turns=2)

    await host(worker, "team", team)
    remote = await RemoteTeam.connect("team", runtime, on_question=lambda question: "yes, do")
    async with asyncio.timeout(10):
        result = await remote.run(task="Begin.")
    assert [message.to_text() for message in result.messages if message.source == "human"][-1] == "yes, do"


async def test_any_nats_client_sends_a_task_as_a_text(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    await host(worker, "counter", Counter)
    await host(worker, "team", counting_team)
    await runtime.wait_for("team")
    for agent_type, texts in (("counter", ["a", "1 so far", "1"]), ("team", ["a", "1 so far", "1", "2 so far", "2"])):
        result = await runtime.send_message("a", AgentId(agent_type, "ada"))
        assert isinstance(result, TaskResult)
        assert [message.to_text() for message in result.messages] == texts
    agent = RemoteChatAgent("counter", runtime, session="ada")
    assert await agent.save_state() == {"got": ["a"]}


# -- components ------------------------------------------------------------------------------------------------------


async def test_a_team_of_remote_agents_is_dumped_and_loaded(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    await host(worker, "counter", Counter)
    agents = [await RemoteChatAgent.connect("counter", runtime, name=name, session=name) for name in ("one", "two")]
    dumped = RoundRobinGroupChat([*agents], max_turns=2).dump_component().model_dump_json()
    loaded = RoundRobinGroupChat.load_component(ComponentModel.model_validate_json(dumped))
    result = await loaded.run(task="Begin.")
    assert [message.source for message in result.messages] == ["user", "one", "one", "two", "two"]
    assert await said(agents[0], "x") == "2"  # the sessions that were named are the same ones


async def test_a_configuration_has_no_credentials_and_no_session_of_its_own(
    server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime
) -> None:
    await host(worker, "counter", Counter)
    host_and_port = server.url.removeprefix("nats://")
    async with NatsAgentRuntime(f"nats://user:secret@{host_and_port}", namespace=namespace) as runtime:
        agent = await RemoteChatAgent.connect("counter", runtime, retries=2)
        dumped = agent.dump_component()
    assert "secret" not in dumped.model_dump_json()
    assert dumped.provider == "natsrt.agentchat.RemoteChatAgent"
    assert dumped.config == {
        "type": "counter",
        "servers": [server.url],
        "namespace": namespace,
        "name": "counter",
        "description": "counts messages",
        "produces": ["TextMessage"],
        "message_types": [],
        "retries": 2,
    }
    loaded = [ChatAgent.load_component(dumped) for _ in range(2)]
    assert [await said(one, "a") for one in loaded] == ["1", "1"]
    for one in loaded:
        await one.close()


async def test_structured_types_are_part_of_a_configuration_and_others_are_refused(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    await host(worker, "planner", assistant("planner", '{"steps": ["a"]}', output_content_type=Plan))
    agent = await RemoteChatAgent.connect("planner", runtime, message_types=[StructuredMessage[Plan]])
    loaded = ChatAgent.load_component(agent.dump_component())
    (_, answer) = (await loaded.run(task="Plan.")).messages
    assert isinstance(answer, StructuredMessage) and answer.content.model_dump() == {"steps": ["a"]}
    with pytest.raises(ValueError, match="the message type Receipt cannot be part of a configuration"):
        RemoteChatAgent("planner", runtime, message_types=[Receipt]).dump_component()


async def test_a_remote_team_is_dumped_and_loaded(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    await host(worker, "team", counting_team)
    team = await RemoteTeam.connect("team", runtime, session="ada")
    loaded = Team.load_component(team.dump_component())
    assert isinstance(loaded, RemoteTeam) and loaded.session == "ada"
    assert await said(team, "a") == "2"
    assert await loaded.save_state() == await team.save_state()
