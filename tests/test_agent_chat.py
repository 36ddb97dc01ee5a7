"""AgentChat's teams on a runtime of natsrt, in one process: each test compares them with AutoGen's own runtime.

A team that is given no runtime makes a `SingleThreadedAgentRuntime`; its results are the expectation.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import pytest

pytest.importorskip("autogen_agentchat", reason="autogen-agentchat is not installed: pip install 'natsrt[dev]'")
pytest.importorskip("autogen_ext", reason="autogen-ext is not installed: pip install 'natsrt[dev]'")

from autogen_agentchat.agents import (
    AssistantAgent,
    BaseChatAgent,
    MessageFilterAgent,
    MessageFilterConfig,
    PerSourceFilter,
    SocietyOfMindAgent,
    UserProxyAgent,
)
from autogen_agentchat.base import ChatAgent, Handoff, Response, TaskResult, Team
from autogen_agentchat.conditions import (
    ExternalTermination,
    HandoffTermination,
    MaxMessageTermination,
    TextMentionTermination,
)
from autogen_agentchat.messages import (
    BaseAgentEvent,
    BaseChatMessage,
    ModelClientStreamingChunkEvent,
    MultiModalMessage,
    StructuredMessage,
    TextMessage,
)
from autogen_agentchat.teams import (
    DiGraphBuilder,
    GraphFlow,
    MagenticOneGroupChat,
    RoundRobinGroupChat,
    SelectorGroupChat,
    Swarm,
)
from autogen_core import AgentRuntime, CancellationToken, FunctionCall, Image
from autogen_core.models import CreateResult, ModelFamily, ModelInfo, RequestUsage
from autogen_ext.models.replay import ReplayChatCompletionClient
from pydantic import BaseModel

from natsrt import NatsAgentRuntime
from natsrt.agentchat import team_runtime
from natsrt.embedded import EmbeddedServer
from tests.support.processes import eventually

MODEL = ModelInfo(
    vision=True, function_calling=True, json_output=True, structured_output=True, family=ModelFamily.UNKNOWN
)

MakeTeam = Callable[[AgentRuntime | None], Team]


@pytest.fixture
async def runtime(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(server.url, namespace=namespace) as started:
        yield started


def replay(*answers: str | CreateResult) -> ReplayChatCompletionClient:
    return ReplayChatCompletionClient(list(answers), model_info=MODEL)


def assistant(name: str, *answers: str | CreateResult, **settings: Any) -> AssistantAgent:
    return AssistantAgent(name, replay(*answers), description=f"is {name}", **settings)


def calls(name: str, **arguments: Any) -> CreateResult:
    """A model's request to call a tool."""
    call = FunctionCall(id="1", name=name, arguments=json.dumps(arguments))
    usage = RequestUsage(prompt_tokens=0, completion_tokens=0)
    return CreateResult(finish_reason="function_calls", content=[call], usage=usage, cached=False)


def outline(messages: Sequence[BaseAgentEvent | BaseChatMessage]) -> list[tuple[str, str, str]]:
    return [(type(message).__name__, message.source, message.to_text()) for message in messages]


async def outcome(team: Team, **task: Any) -> tuple[list[tuple[str, str, str]], str | None]:
    async with asyncio.timeout(20):
        result = await team.run(**task)
    return outline(result.messages), result.stop_reason


async def assert_as_in_one_process(
    make: MakeTeam, runtime: NatsAgentRuntime, **task: Any
) -> list[tuple[str, str, str]]:
    """Run the team on AutoGen's runtime and on natsrt's; return the messages, which must be the same."""
    expected = await outcome(make(None), **task)
    assert await outcome(make(runtime), **task) == expected
    return expected[0]


# -- each kind of team ---------------------------------------------------------------------------------------------


def round_robin(runtime: AgentRuntime | None) -> Team:
    return RoundRobinGroupChat(
        [assistant("writer", "a draft", "a better draft"), assistant("critic", "too short", "APPROVE")],
        termination_condition=TextMentionTermination("APPROVE"),
        runtime=runtime,
    )


def selector(runtime: AgentRuntime | None) -> Team:
    return SelectorGroupChat(
        [assistant("planner", "first sums", "done"), assistant("sums", "4")],
        replay("planner", "sums", "planner"),
        termination_condition=TextMentionTermination("done"),
        allow_repeated_speaker=True,
        emit_team_events=True,
        runtime=runtime,
    )


def swarm(runtime: AgentRuntime | None) -> Team:
    return Swarm(
        [
            assistant("desk", calls("transfer_to_refunds"), handoffs=["refunds"]),
            assistant("refunds", calls("transfer_to_user"), handoffs=[Handoff(target="user", message="Which order?")]),
        ],
        termination_condition=HandoffTermination("user"),
        runtime=runtime,
    )


def graph(runtime: AgentRuntime | None) -> Team:
    writer, first, second, last = (assistant(name, f"{name} speaks") for name in ("writer", "first", "second", "last"))
    builder = DiGraphBuilder()
    for agent in (writer, first, second, last):
        builder.add_node(agent)
    builder.add_edge(writer, first).add_edge(writer, second).add_edge(first, last).add_edge(second, last)
    return GraphFlow([writer, first, second, last], graph=builder.build(), runtime=runtime)


def ledger(satisfied: bool, speaker: str) -> str:
    answers = {
        "is_request_satisfied": satisfied,
        "is_progress_being_made": True,
        "is_in_loop": False,
        "instruction_or_question": "Look it up.",
        "next_speaker": speaker,
    }
    return json.dumps({key: {"reason": "so it is", "answer": answer} for key, answer in answers.items()})


def magentic_one(runtime: AgentRuntime | None) -> Team:
    orchestrator = replay("the facts", "the plan", ledger(False, "surfer"), ledger(True, "surfer"), "The answer is 42.")
    return MagenticOneGroupChat([assistant("surfer", "42"), assistant("coder", "…")], orchestrator, runtime=runtime)


@pytest.mark.parametrize("make", [round_robin, selector, swarm, magentic_one], ids=lambda make: make.__name__)
async def test_a_team_says_what_it_says_in_autogens_own_runtime(make: MakeTeam, runtime: NatsAgentRuntime) -> None:
    assert await assert_as_in_one_process(make, runtime, task="Begin.")


async def test_branches_of_a_graph_run_and_meet_again(runtime: NatsAgentRuntime) -> None:
    expected, reason = await outcome(graph(None), task="Begin.")
    messages, found = await outcome(graph(runtime), task="Begin.")
    assert found == reason
    assert sorted(messages) == sorted(expected)  # the two branches run at the same time
    assert [source for _, source, _ in messages][-2:] == [source for _, source, _ in expected][-2:]


async def test_a_selector_function_and_candidates(runtime: NatsAgentRuntime) -> None:
    def make(runtime: AgentRuntime | None) -> Team:
        def choose(messages: Sequence[BaseAgentEvent | BaseChatMessage]) -> str | None:
            return "one" if messages[-1].source == "user" else "two"

        agents: list[ChatAgent | Team] = [assistant("one", "1"), assistant("two", "2")]
        return SelectorGroupChat(agents, replay(), selector_func=choose, max_turns=2, runtime=runtime)

    assert len(await assert_as_in_one_process(make, runtime, task="Begin.")) == 3


# -- kinds of participants and messages ------------------------------------------------------------------------------


class Plan(BaseModel):
    steps: list[str]
    urgent: bool = False


async def test_structured_messages_tools_and_images_arrive_as_they_are(runtime: NatsAgentRuntime) -> None:
    async def weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    def make(runtime: AgentRuntime | None) -> Team:
        planner = assistant("planner", '{"steps": ["look", "tell"]}', output_content_type=Plan)
        teller = assistant("teller", calls("weather", city="Rome"), "It is sunny.", tools=[weather])
        reflective = assistant(
            "reflective", calls("weather", city="Oslo"), "Sunny too.", tools=[weather], reflect_on_tool_use=True
        )
        types: list[Any] = [StructuredMessage[Plan]]
        agents: list[ChatAgent | Team] = [planner, teller, reflective]
        return RoundRobinGroupChat(agents, max_turns=3, runtime=runtime, custom_message_types=types)

    pixel = Image.from_base64(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
    )
    task = MultiModalMessage(content=["What is this?", pixel], source="user", metadata={"shown": "yes"})
    expected = await make(None).run(task=task)
    found = await make(runtime).run(task=task)
    assert outline(found.messages) == outline(expected.messages)
    (plan,) = [message for message in found.messages if isinstance(message, StructuredMessage)]
    assert plan.content == Plan(steps=["look", "tell"])


class Bill(BaseChatMessage):
    """A message class of the application's own."""

    total: float

    def to_text(self) -> str:
        return f"total {self.total}"

    def to_model_text(self) -> str:
        return self.to_text()

    def to_model_message(self) -> Any:
        raise NotImplementedError


class Till(BaseChatAgent):
    """Answers with `Bill`, and remembers what it has received."""

    def __init__(self, name: str = "till") -> None:
        super().__init__(name, "adds up")
        self.received: list[BaseChatMessage] = []

    @property
    def produced_message_types(self) -> Sequence[type[BaseChatMessage]]:
        return (Bill,)

    async def on_messages(self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken) -> Response:
        self.received += messages
        return Response(chat_message=Bill(total=len(self.received) + 0.5, source=self.name))

    async def on_reset(self, cancellation_token: CancellationToken) -> None:
        self.received.clear()


async def test_message_classes_of_the_application(runtime: NatsAgentRuntime) -> None:
    tills = [Till("left"), Till("right")]

    def make(runtime: AgentRuntime | None) -> Team:
        return RoundRobinGroupChat([*tills], max_turns=2, runtime=runtime, custom_message_types=[Bill])

    await make(None).run(task="Buy.")
    seen = tills[1].received[-1]
    for till in tills:
        till.received.clear()
    await make(runtime).run(task=Bill(total=2, source="user"))
    assert type(seen) is type(tills[1].received[-1]) is Bill
    assert [message.to_text() for message in tills[1].received] == ["total 2.0", "total 1.5"]


async def test_other_agents_of_agentchat(runtime: NatsAgentRuntime) -> None:
    def make(runtime: AgentRuntime | None) -> Team:
        inner = RoundRobinGroupChat([assistant("mind", "thought")], max_turns=1, runtime=runtime)
        society = SocietyOfMindAgent("society", inner, replay("agreed"))
        filtered = MessageFilterAgent(
            "filtered", assistant("quiet", "heard"), MessageFilterConfig(per_source=[PerSourceFilter(source="user")])
        )
        proxy = UserProxyAgent("human", input_func=lambda prompt: "I agree")
        return RoundRobinGroupChat([society, filtered, proxy], max_turns=3, runtime=runtime)

    messages = await assert_as_in_one_process(make, runtime, task="Begin.")
    assert {"society", "quiet", "human"} <= {source for _, source, _ in messages}


# -- nested teams, several teams -------------------------------------------------------------------------------------


def nested(runtime: AgentRuntime | None) -> Team:
    inner = RoundRobinGroupChat(
        [assistant("deep", "one", "three"), assistant("deeper", "two", "four")],
        name="inner",
        max_turns=2,
        runtime=runtime,
    )
    return RoundRobinGroupChat([inner, assistant("top", "so it is", "again")], max_turns=4, runtime=runtime)


async def test_a_team_in_a_team(runtime: NatsAgentRuntime) -> None:
    messages = await assert_as_in_one_process(nested, runtime, task="Begin.")
    assert [source for _, source, _ in messages] == [
        "user", "deep", "deeper", "top", "deep", "deeper", "top",
    ]  # fmt: skip


async def test_several_teams_share_a_runtime_at_the_same_time(runtime: NatsAgentRuntime) -> None:
    expected = await outcome(round_robin(None), task="Begin.")
    found = await asyncio.gather(*(outcome(round_robin(runtime), task="Begin.") for _ in range(8)))
    assert found == [expected] * 8


async def test_results_of_nested_teams_may_be_larger_than_a_megabyte(runtime: NatsAgentRuntime) -> None:
    """The servers of natsrt's own configurations accept messages of 8 MB."""

    def make(runtime: AgentRuntime | None) -> Team:
        inner = RoundRobinGroupChat([assistant("prolix", *["x" * 400_000] * 5)], max_turns=5, runtime=runtime)
        return RoundRobinGroupChat([inner, assistant("top", "enough")], max_turns=2, runtime=runtime)

    messages = await assert_as_in_one_process(make, runtime, task="Begin.")
    assert sum(len(text) for _, _, text in messages) > 2_000_000


# -- the life of a team ----------------------------------------------------------------------------------------------


async def test_a_team_runs_again_and_is_reset(runtime: NatsAgentRuntime) -> None:
    def make(runtime: AgentRuntime | None) -> Team:
        agents: list[ChatAgent | Team] = [assistant("one", *"13579bd"), assistant("two", *"2468ace")]
        return RoundRobinGroupChat(agents, termination_condition=MaxMessageTermination(3), runtime=runtime)

    ours, theirs = make(runtime), make(None)
    for task in ({"task": "Begin."}, {}, {"task": "Go on."}):
        assert await outcome(ours, **task) == await outcome(theirs, **task)
    await ours.reset()
    await theirs.reset()
    assert await outcome(ours, task="Once more.") == await outcome(theirs, task="Once more.")


async def test_states_move_between_teams_and_between_runtimes(runtime: NatsAgentRuntime) -> None:
    ours, theirs = nested(runtime), nested(None)
    await outcome(ours, task="Begin.")
    await outcome(theirs, task="Begin.")
    saved = await ours.save_state()

    def contents(state: Any) -> Any:  # without the ids and times of messages
        if isinstance(state, dict):
            return {key: contents(value) for key, value in state.items() if key not in {"id", "created_at"}}
        return [contents(value) for value in state] if isinstance(state, list) else state

    assert contents(saved) == contents(await theirs.save_state())
    again = nested(runtime)
    await again.load_state(json.loads(json.dumps(saved)))
    assert contents(await again.save_state()) == contents(saved)
    await nested(None).load_state(saved)


async def test_a_stream_brings_each_message_and_each_piece(runtime: NatsAgentRuntime) -> None:
    def make(runtime: AgentRuntime | None) -> Team:
        words = assistant("words", "one two three", model_client_stream=True)
        return RoundRobinGroupChat([words], max_turns=1, runtime=runtime)

    async def streamed(team: Team) -> list[tuple[str, str]]:
        found = []
        async for item in team.run_stream(task="Begin."):
            text = item.stop_reason or "" if isinstance(item, TaskResult) else item.to_text()
            found.append((type(item).__name__, text))
        return found

    found = await streamed(make(runtime))
    assert found == await streamed(make(None))
    assert sum(kind == ModelClientStreamingChunkEvent.__name__ for kind, _ in found) > 2


class Patient(BaseChatAgent):
    """Works until it is told to stop; says what it was told meanwhile."""

    def __init__(self) -> None:
        super().__init__("patient", "waits")
        self.events: list[str] = []
        self.may_end = asyncio.Event()

    @property
    def produced_message_types(self) -> Sequence[type[BaseChatMessage]]:
        return (TextMessage,)

    async def on_messages(self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken) -> Response:
        self.events.append("works")
        work = asyncio.ensure_future(self.may_end.wait())
        cancellation_token.link_future(work)
        try:
            await work
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise
        return Response(chat_message=TextMessage(content="done", source=self.name))

    async def on_reset(self, cancellation_token: CancellationToken) -> None:
        self.events.append("reset")

    async def on_pause(self, cancellation_token: CancellationToken) -> None:
        self.events.append("paused")

    async def on_resume(self, cancellation_token: CancellationToken) -> None:
        self.events.append("resumed")


async def test_a_cancelled_run_ends_and_the_agent_is_told(runtime: NatsAgentRuntime) -> None:
    patient = Patient()
    team = RoundRobinGroupChat([patient], runtime=runtime)
    token = CancellationToken()
    run = asyncio.create_task(team.run(task="Begin.", cancellation_token=token))
    await eventually(lambda: "works" in patient.events)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(10):
            await run
    await eventually(lambda: "cancelled" in patient.events)


async def test_a_team_is_paused_and_resumed_while_it_runs(runtime: NatsAgentRuntime) -> None:
    patient = Patient()
    team = RoundRobinGroupChat([patient], max_turns=1, runtime=runtime)
    run = asyncio.create_task(team.run(task="Begin."))
    await eventually(lambda: "works" in patient.events)
    await team.pause()
    await team.resume()
    assert patient.events == ["works", "paused", "resumed"]
    patient.may_end.set()
    async with asyncio.timeout(10):
        assert (await run).messages[-1].to_text() == "done"


async def test_a_team_is_stopped_from_outside(runtime: NatsAgentRuntime) -> None:
    patient, stop = Patient(), ExternalTermination()
    team = RoundRobinGroupChat([patient], termination_condition=stop, runtime=runtime)
    run = asyncio.create_task(team.run(task="Begin."))
    await eventually(lambda: "works" in patient.events)
    stop.set()
    patient.may_end.set()
    async with asyncio.timeout(10):
        assert (await run).stop_reason == "External termination requested"


# -- errors ----------------------------------------------------------------------------------------------------------


class Broken(BaseChatAgent):
    def __init__(self, error: Exception) -> None:
        super().__init__("broken", "fails")
        self.error = error

    @property
    def produced_message_types(self) -> Sequence[type[BaseChatMessage]]:
        return (TextMessage,)

    async def on_messages(self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken) -> Response:
        raise self.error

    async def on_messages_stream(
        self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | Response, None]:
        yield TextMessage(content="about to fail", source=self.name)
        raise self.error

    async def on_reset(self, cancellation_token: CancellationToken) -> None: ...


@pytest.mark.parametrize("depth", [0, 1], ids=["in-the-team", "in-a-nested-team"])
async def test_an_error_of_an_agent_is_raised_by_the_run(runtime: NatsAgentRuntime, depth: int) -> None:
    inner = RoundRobinGroupChat([Broken(ValueError("no such order"))], runtime=runtime)
    team = RoundRobinGroupChat([inner, assistant("top", "?")], runtime=runtime) if depth else inner
    with pytest.raises(RuntimeError, match="ValueError: no such order"):
        async with asyncio.timeout(10):
            await team.run(task="Begin.")
    assert runtime.ready


async def test_an_error_of_the_manager_is_raised_by_the_run(runtime: NatsAgentRuntime) -> None:
    def choose(messages: Sequence[BaseAgentEvent | BaseChatMessage]) -> str | None:
        if messages[-1].source == "user":
            return "one"
        raise LookupError("nobody is left")

    agents: list[ChatAgent | Team] = [assistant("one", "1"), assistant("two", "2")]
    team = SelectorGroupChat(agents, replay(), selector_func=choose, runtime=runtime)
    with pytest.raises(RuntimeError, match="LookupError: nobody is left"):
        async with asyncio.timeout(10):
            await team.run(task="Begin.")


async def test_an_error_before_the_first_speaker_is_raised_by_the_run(runtime: NatsAgentRuntime) -> None:
    def choose(messages: Sequence[BaseAgentEvent | BaseChatMessage]) -> str | None:
        raise LookupError("nobody is left")

    agents: list[ChatAgent | Team] = [assistant("one", "1"), assistant("two", "2")]
    team = SelectorGroupChat(agents, replay(), selector_func=choose, runtime=runtime)
    with pytest.raises(LookupError, match="nobody is left"):
        async with asyncio.timeout(10):
            await team.run(task="Begin.")


async def test_a_message_that_is_too_large_is_an_error_of_the_run(server: EmbeddedServer, namespace: str) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace, blob_threshold=1000, max_blob_size=100_000) as runtime:
        team = RoundRobinGroupChat([assistant("prolix", "x" * 100_000)], max_turns=1, runtime=runtime)
        with pytest.raises(RuntimeError, match="MessageTooLarge: the message has .* max_blob_size"):
            async with asyncio.timeout(20):
                await team.run(task="Begin.")


# -- the end ---------------------------------------------------------------------------------------------------------


async def test_the_types_of_a_team_leave_the_registry_with_it(runtime: NatsAgentRuntime) -> None:
    view = runtime.running.registry.view
    async with team_runtime(runtime) as own:
        assert await outcome(nested(own), task="Begin.") == await outcome(nested(None), task="Begin.")
        assert len(view.hosts) == 6
    assert not view.hosts and not view.declared
    with pytest.raises(ZeroDivisionError):
        async with team_runtime(runtime) as own:
            await outcome(round_robin(own), task="Begin.")
            raise ZeroDivisionError
    assert not view.hosts and not view.declared


async def test_all_types_of_a_team_leave_although_one_cannot(
    runtime: NatsAgentRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, unregister = runtime.running.registry.view, runtime.unregister
    refused: list[Any] = []

    async def refuse_one(agent_type: Any) -> None:
        if not refused:
            refused.append(agent_type)
            raise LookupError("not this one")
        await unregister(agent_type)

    monkeypatch.setattr(runtime, "unregister", refuse_one)
    with pytest.raises(LookupError, match="not this one"):
        async with team_runtime(runtime) as own:
            await outcome(round_robin(own), task="Begin.")
    assert list(view.hosts) == [refused[0].type]


async def test_the_runtime_stops_when_its_teams_are_idle(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    runtime.start()
    expected = await outcome(round_robin(None), task="Begin.")
    assert await outcome(round_robin(runtime), task="Begin.") == expected
    async with asyncio.timeout(10):
        await runtime.stop_when_idle()


async def test_a_stop_cancels_the_agents_of_a_run(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace, drain_timeout=0.2)
    await runtime.start()
    patient = Patient()
    run = asyncio.create_task(RoundRobinGroupChat([patient], runtime=runtime).run(task="Begin."))
    await eventually(lambda: "works" in patient.events)
    await runtime.stop()
    assert patient.events == ["works", "cancelled"]
    assert not run.done()  # it waits for AgentChat's own queue, so the program must cancel it
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
