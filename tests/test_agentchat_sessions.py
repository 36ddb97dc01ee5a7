"""What is stored of a session of AgentChat, and when: repeated turns, states that cannot be read, pauses, the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("autogen_agentchat", reason="autogen-agentchat is not installed: pip install 'natsrt[dev]'")

from autogen_agentchat.base import TaskResult, Team
from autogen_agentchat.messages import TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import AgentId, AgentInstantiationContext, CancellationToken

from natsrt import NatsAgentRuntime
from natsrt.agentchat import RemoteChatAgent, RemoteTeam, host
from natsrt.contrib.agentchat.requests import ChatTurn
from natsrt.contrib.agentchat.stored import EARLIER_ANSWERS, EARLIER_BYTES, Answer, Stored
from natsrt.embedded import EmbeddedServer
from natsrt.errors import NoLiveWorker
from tests.support.chat import CancelsItself, Counter, Made, said
from tests.support.processes import eventually

ADA = AgentId("counter", "ada")


@pytest.fixture
async def worker(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(server.url, namespace=namespace) as started:
        yield started


@pytest.fixture
async def runtime(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(server.url, namespace=namespace) as started:
        yield started


async def ada(worker: NatsAgentRuntime, runtime: NatsAgentRuntime, factory: Any = Counter) -> RemoteChatAgent:
    await host(worker, "counter", factory)
    return await RemoteChatAgent.connect("counter", runtime, timeout=10, session="ada")


def turn(text: str, name: str, *, keep: bool = True) -> ChatTurn:
    return ChatTurn(messages=[TextMessage(content=text, source="user")], name="counter", turn=name, keep=keep)


async def answer(runtime: NatsAgentRuntime, request: ChatTurn) -> str:
    return (await runtime.send_message(request, ADA)).chat_message.to_text()  # type: ignore[no-any-return]


# -- repeated turns --------------------------------------------------------------------------------------------------


async def test_a_turn_is_not_done_again_although_others_had_turns_meanwhile(
    server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    agent = await ada(worker, runtime)
    assert await answer(runtime, turn("a", "t1")) == "1"
    assert await answer(runtime, turn("b", "t2")) == "2"
    assert await said(agent, "c") == "3"  # a caller without retries
    async with NatsAgentRuntime(server.url, namespace=namespace) as other:
        await host(other, "counter", Counter)
        await worker.stop()
        assert [await answer(runtime, turn("?", name)) for name in ("t1", "t2", "t1")] == ["1", "2", "1"]
        assert await agent.save_state() == {"got": ["a", "b", "c"]}


@pytest.mark.parametrize("how", ["reset", "load"])
async def test_a_turn_that_does_not_count_any_more_is_done_again(
    how: str, worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    """What was said before a reset is gone with it, the stored answers included."""
    agent = await ada(worker, runtime)
    assert [await answer(runtime, turn(text, text)) for text in "ab"] == ["1", "2"]
    if how == "reset":
        await agent.on_reset(CancellationToken())
    else:
        await agent.load_state({"got": []})
    assert await answer(runtime, turn("b", "b")) == "1"
    assert await agent.save_state() == {"got": ["b"]}


def test_the_last_answers_are_kept() -> None:
    stored = Stored({})
    for number in range(EARLIER_ANSWERS + 3):
        stored = stored.after({"n": number}, Answer(str(number), {"x": number}))
        stored = stored.after({"n": number})  # a turn that nobody tries again
    assert [one.turn for one in stored.answers] == [str(number) for number in range(2, EARLIER_ANSWERS + 3)]
    assert stored.state == {"n": EARLIER_ANSWERS + 2}
    assert stored.result_of("2") == {"x": 2}
    assert stored.result_of("1") is None
    assert Stored.load(stored.dump()) == stored


def test_large_answers_are_kept_until_the_next_one() -> None:
    half, large = {"x": "y" * (EARLIER_BYTES // 2 - 100)}, {"x": "y" * EARLIER_BYTES}
    stored = Stored({}).after({}, Answer("small", {})).after({}, Answer("large", large))
    assert [one.turn for one in stored.answers] == ["small", "large"]
    for name in ("one", "two", "three"):
        stored = stored.after({}, Answer(name, half))
    assert [one.turn for one in stored.answers] == ["one", "two", "three"]
    assert [one.turn for one in stored.after({}, Answer("four", half)).answers] == ["two", "three", "four"]


def test_the_size_of_an_answer_is_that_of_its_json() -> None:
    """Of a text in another script, and of a number that is too large to be stored, which is refused later."""
    assert Answer("t", {"x": "\u6587" * 10}).size == len('{"x": ""}') + 30
    assert Answer("t", {"x": 10**30}).size == len('{"x": }') + 31


@pytest.mark.parametrize(
    "state",
    [{"other": 1}, {"state": 1}, {"state": {}, "answers": 5}, {"state": {}, "answers": [{"turn": "t1"}]}],
    ids=str,
)
def test_a_state_that_is_none_of_a_session_is_refused(state: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="state of a session"):
        Stored.load(state)


# -- states that cannot be loaded ------------------------------------------------------------------------------------


class Forgetful(Counter):
    """Cannot load a state twice."""

    loads = 0

    async def load_state(self, state: Mapping[str, Any]) -> None:
        Forgetful.loads += 1
        if Forgetful.loads == 1:
            raise ValueError("it cannot be loaded")
        await super().load_state(state)


async def test_an_agent_that_cannot_load_its_state_is_closed(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    made = Made(Forgetful)
    agent = await ada(worker, runtime, made)
    Forgetful.loads = 0
    assert await said(agent, "a") == "1"
    with pytest.raises(ValueError, match="it failed"):
        await said(agent, "fail")
    with pytest.raises(ValueError, match="it cannot be loaded"):
        await said(agent, "b")
    assert await said(agent, "b") == "2"
    await eventually(lambda: [one.events for one in made.all] == [["closed"], ["closed"], []])


# -- the end of a session --------------------------------------------------------------------------------------------


async def records(runtime: NatsAgentRuntime) -> list[str]:
    return [str(record.agent) async for record in runtime.running.records.records() if record.has_state]


@pytest.mark.parametrize("live", [True, False], ids=["live", "stored"])
async def test_a_session_that_is_forgotten_begins_anew(
    live: bool, server: EmbeddedServer, namespace: str, runtime: NatsAgentRuntime
) -> None:
    made = Made()
    async with NatsAgentRuntime(server.url, namespace=namespace) as first:
        agent = await ada(first, runtime, made)
        assert await answer(runtime, turn("a", "t1")) == "1"
        assert await records(runtime) == ["counter/ada"]
        if live:
            await agent.forget()
            assert [one.events for one in made.all] == [["closed"]]
            assert await records(runtime) == []
            assert await said(agent, "b") == "1"
    async with NatsAgentRuntime(server.url, namespace=namespace) as second:
        await host(second, "counter", made)
        await agent.forget()
        assert await records(runtime) == []
        assert await answer(runtime, turn("a", "t1")) == "1"  # its answer was forgotten, too
        assert await agent.save_state() == {"got": ["a"]}


async def test_a_team_is_forgotten_but_not_while_it_runs(worker: NatsAgentRuntime, runtime: NatsAgentRuntime) -> None:
    made = Made(lambda: RoundRobinGroupChat([Counter("one")], max_turns=1))
    await host(worker, "team", made)
    team = await RemoteTeam.connect("team", runtime, timeout=10)
    assert await said(team, "a") == "1"
    running = asyncio.create_task(said(team, "wait"))
    await eventually(lambda: made.all[0]._participants[0].events == ["waits"])
    with pytest.raises(RuntimeError, match="cannot be ended while the team is running"):
        await team.forget()
    made.all[0]._participants[0].may_go_on.set()
    assert await running == "2"
    await team.forget()
    assert await records(runtime) == []
    await team.close()  # there is nothing to close, and no worker is asked to make something for that
    assert len(made.all) == 1
    assert await said(team, "b") == "1"


async def test_a_session_is_forgotten_after_the_turns_before_that(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    made = Made()
    agent = await ada(worker, runtime, made)
    running = asyncio.create_task(said(agent, "wait"))
    await eventually(lambda: made.all and made.all[0].events == ["waits"])
    forgetting = asyncio.create_task(agent.forget())
    await asyncio.wait({forgetting}, timeout=0.2)
    later = asyncio.create_task(said(agent, "b"))
    await asyncio.wait({later}, timeout=0.2)
    made.all[0].may_go_on.set()
    async with asyncio.timeout(10):
        assert await running == "1"
        await forgetting
        assert await later == "1"


async def test_nobody_forgets_without_a_worker(
    server: EmbeddedServer, namespace: str, runtime: NatsAgentRuntime
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as first:
        agent = await ada(first, runtime)
        assert await said(agent, "a") == "1"
    with pytest.raises(NoLiveWorker):
        await agent.forget()
    assert await records(runtime) == ["counter/ada"]


# -- pauses ----------------------------------------------------------------------------------------------------------


class Paused(RoundRobinGroupChat):
    """Its pause waits for a run that never comes, as that of AutoGen's teams does if it comes just after the end."""

    async def pause(self) -> None:
        counter: Any = self._participants[0]
        counter.events.append("is paused")
        await asyncio.Event().wait()

    resume = pause


@pytest.mark.parametrize("action", ["pause", "resume"])
@pytest.mark.parametrize("reader", ["waits", "takes all"])
async def test_a_pause_that_the_end_of_the_run_overtakes_fails_and_the_team_is_not_used_again(
    action: str, reader: str, worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    made = Made(lambda: Paused([Counter("one")], max_turns=1))
    await host(worker, "team", made)
    team = await RemoteTeam.connect("team", runtime, timeout=10)
    pausing: asyncio.Task[None]
    async with asyncio.timeout(20), aclosing(team.run_stream(task="wait")) as items:
        first = await anext(items)
        rest = asyncio.create_task(_all(items)) if reader == "takes all" else None
        await eventually(lambda: made.all and made.all[0]._participants[0].events == ["waits"])
        pausing = asyncio.create_task(getattr(team, action)())
        await eventually(lambda: made.all[0]._participants[0].events == ["waits", "is paused"])
        made.all[0]._participants[0].may_go_on.set()
        with pytest.raises(RuntimeError, match="not running"):
            await pausing
        said_last = [first, *(await (rest or _all(items)))][-1]
        assert isinstance(said_last, TaskResult)
        assert said_last.messages[-1].to_text() == "1"
        await team.reset()
        assert await said(team, "b") == "1"
    assert len(made.all) == 2


async def _all(items: Any) -> list[Any]:
    return [item async for item in items]


# -- participants that cancel themselves -----------------------------------------------------------------------------


async def test_a_remote_participant_that_cancels_itself_fails_its_team(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    """Both for a team of this process, and for one that is hosted."""
    await host(worker, "odd", CancelsItself)

    async def team() -> Team:
        return RoundRobinGroupChat([await RemoteChatAgent.connect("odd", runtime, name="odd", timeout=10)], max_turns=1)

    await host(worker, "team", team)
    for one in (await team(), await RemoteTeam.connect("team", runtime, timeout=10)):
        with pytest.raises(RuntimeError, match="was cancelled, but not by its caller"):
            await said(one, "a")


async def test_a_run_whose_participant_cancels_itself_ends_when_its_caller_cancels_it(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    """AgentChat's run waits for ever then, without natsrt too. The session goes on."""
    classes = [Counter, CancelsItself, Counter]  # the first one is announced
    await host(worker, "team", lambda: RoundRobinGroupChat([classes.pop(0)("odd")], max_turns=1))
    team = await RemoteTeam.connect("team", runtime, timeout=10)
    token = CancellationToken()
    running = asyncio.create_task(team.run(task="a", cancellation_token=token))
    assert not (await asyncio.wait({running}, timeout=1))[0]
    token.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await said(team, "b") == "1"


# -- factories with an end of their own ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["agent", "team"])
async def test_a_context_manager_of_a_factory_is_left_where_it_was_entered(
    kind: str, server: EmbeddedServer, namespace: str, runtime: NatsAgentRuntime
) -> None:
    entered: list[tuple[str, asyncio.Task[Any] | None]] = []
    left: list[asyncio.Task[Any] | None] = []
    made: list[Counter] = []

    @asynccontextmanager
    async def factory() -> AsyncIterator[Any]:
        entered.append((AgentInstantiationContext.current_agent_id().key, asyncio.current_task()))
        made.append(Counter())
        async with asyncio.timeout(None):  # which can only be left in the same task
            yield made[-1] if kind == "agent" else RoundRobinGroupChat([made[-1]], max_turns=1)
        left.append(asyncio.current_task())

    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        await host(worker, "counter", factory)
        assert len(left) == 1  # of what was made to be announced
        connect: Any = RemoteChatAgent.connect if kind == "agent" else RemoteTeam.connect
        one = await connect("counter", runtime, timeout=10, session="ada")
        assert await said(one, "a") == "1"
        assert len(left) == 1
        await one.close()
        assert len(left) == 2
        assert await said(one, "b") == "2"
    assert [key for key, _ in entered] == ["default", "ada", "ada"]
    assert left == [task for _, task in entered]
    assert [one.events for one in made] == [[], [], []]  # the block itself closes what is to be closed


async def test_a_context_manager_that_fails_fails_the_turn_and_one_that_hangs_is_cancelled(
    worker: NatsAgentRuntime, runtime: NatsAgentRuntime
) -> None:
    ends: list[str] = []
    how = ["announced", "first", "fails", "hangs", "last"]

    @asynccontextmanager
    async def factory() -> AsyncIterator[Counter]:
        now = how.pop(0)
        try:
            if now == "fails":
                raise ValueError("no agent today")
            if now == "hangs":
                await asyncio.Event().wait()
            yield Counter()
        finally:
            ends.append(now)

    agent = await ada(worker, runtime, factory)
    token = CancellationToken()
    for text, match in (("fail", "it failed"), ("a", "no agent today")):
        with pytest.raises(ValueError, match=match):
            await said(agent, text)
    running = asyncio.create_task(agent.run(task="a", cancellation_token=token))
    await eventually(lambda: how == ["last"])
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await said(agent, "a") == "1"
    await eventually(lambda: ends == ["announced", "first", "fails", "hangs"])


async def test_a_context_manager_of_something_else_is_refused_and_left(worker: NatsAgentRuntime) -> None:
    left: list[bool] = []

    @asynccontextmanager
    async def factory() -> AsyncIterator[int]:
        yield 5
        left.append(True)

    with pytest.raises(TypeError, match="must make a ChatAgent or a Team, not 5"):
        await host(worker, "counter", factory)  # type: ignore[arg-type]
    assert left == [True]
