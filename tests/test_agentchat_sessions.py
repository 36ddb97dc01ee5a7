"""What is stored of a session of AgentChat, and when: repeated turns, states that cannot be read, pauses, the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

pytest.importorskip("autogen_agentchat", reason="autogen-agentchat is not installed: pip install 'natsrt[dev]'")

from autogen_agentchat.messages import TextMessage
from autogen_core import AgentId, CancellationToken

from natsrt import NatsAgentRuntime
from natsrt.agentchat import RemoteChatAgent, host
from natsrt.contrib.agentchat.requests import ChatTurn
from natsrt.contrib.agentchat.stored import EARLIER_ANSWERS, EARLIER_BYTES, Answer, Stored
from natsrt.embedded import EmbeddedServer
from tests.support.chat import Counter, Made, said
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
