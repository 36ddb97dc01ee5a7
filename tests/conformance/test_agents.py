"""AutoGen's kinds of agents, as their documentation uses them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest
from autogen_core import (
    AgentId,
    AgentProxy,
    ClosureAgent,
    ClosureContext,
    DefaultSubscription,
    DefaultTopicId,
    FunctionCall,
    MessageContext,
    MessageHandlerContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    default_subscription,
    event,
    message_handler,
    rpc,
    try_get_known_serializers_for_type,
    type_subscription,
)
from autogen_core.exceptions import CantHandleException
from autogen_core.models import (
    AssistantMessage,
    CreateResult,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    RequestUsage,
    UserMessage,
)
from autogen_core.tool_agent import ToolAgent, tool_agent_caller_loop
from autogen_core.tools import FunctionTool
from autogen_ext.models.replay import ReplayChatCompletionClient

from natsrt.agents import hosted_type
from tests.conformance.conftest import World, natsrt_only, two_runtimes
from tests.conformance.samples import Number, Recorder, Seen, Text

# -- RoutedAgent -----------------------------------------------------------------------------------------------------


@type_subscription("news")
class Router(RoutedAgent):
    """Tells calls from events, and messages by their content."""

    def __init__(self, handled: list[str]) -> None:
        super().__init__("routes")
        self.handled = handled

    @rpc
    async def on_call(self, message: Text, ctx: MessageContext) -> Text:
        self.handled.append(f"rpc {message.content}")
        return Text("rpc")

    @event
    async def on_event(self, message: Text, ctx: MessageContext) -> None:
        self.handled.append(f"event {message.content}")

    @message_handler(match=lambda message, ctx: message.value < 0)
    async def on_a_negative(self, message: Number, ctx: MessageContext) -> Text:
        return Text("negative")

    @message_handler(match=lambda message, ctx: ctx.sender is not None)
    async def on_b_sent(self, message: Number, ctx: MessageContext) -> Text:
        return Text("sent")

    @message_handler
    async def on_c_other(self, message: Number, ctx: MessageContext) -> Text:
        return Text("other")


async def test_calls_and_events_go_to_their_own_handlers(world: World) -> None:
    handled: list[str] = []
    await Router.register(world.host, "router", lambda: Router(handled))
    assert await world.caller.send_message(Text("a"), AgentId("router", "k")) == Text("rpc")
    await world.caller.publish_message(Text("b"), TopicId("news", "k"))
    await world.idle()
    assert handled == ["rpc a", "event b"]


async def test_the_first_handler_that_matches_gets_the_message(world: World) -> None:
    router = AgentId("router", "k")
    await Router.register(world.host, "router", lambda: Router([]))
    assert await world.caller.send_message(Number(-1), router) == Text("negative")
    assert await world.caller.send_message(Number(1), router, sender=router) == Text("sent")
    assert await world.caller.send_message(Number(1), router) == Text("other")


class Strict(RoutedAgent):
    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        return Number(1)  # type: ignore[return-value]


class Lenient(RoutedAgent):
    @message_handler(strict=False)
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        return Number(1)  # type: ignore[return-value]


async def test_a_strict_handler_that_returns_another_type_is_an_error_at_the_caller(world: World) -> None:
    await Strict.register(world.host, "strict", lambda: Strict("strict"))
    with pytest.raises(ValueError, match="not in return types"):
        await world.caller.send_message(Text("a"), AgentId("strict", "k"))


async def test_a_handler_that_is_not_strict_may_return_another_type(world: World) -> None:
    await Lenient.register(world.host, "lenient", lambda: Lenient("lenient"))
    assert await world.caller.send_message(Text("a"), AgentId("lenient", "k")) == Number(1)


async def test_a_handler_knows_whose_handler_it_is(world: World) -> None:
    known: list[AgentId] = []

    class Knower(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            known.append(MessageHandlerContext.agent_id())
            if message.content == "outer":
                await self.send_message(Text("inner"), AgentId("knower", "inner"))
            await asyncio.sleep(0)
            known.append(MessageHandlerContext.agent_id())
            return message

    await Knower.register(world.host, "knower", lambda: Knower("knows"))
    await world.caller.send_message(Text("outer"), AgentId("knower", "outer"))
    assert [agent.key for agent in known] == ["outer", "inner", "inner", "outer"]
    with pytest.raises(RuntimeError):
        MessageHandlerContext.agent_id()


# -- ClosureAgent ----------------------------------------------------------------------------------------------------


async def test_a_closure_agent_gets_calls_and_events(world: World) -> None:
    queue: asyncio.Queue[tuple[str, MessageContext]] = asyncio.Queue()

    async def output(agent: ClosureContext, message: Text, ctx: MessageContext) -> Text:
        await queue.put((f"{agent.id} {message.content}", ctx))
        return Text("taken")

    await ClosureAgent.register_closure(world.host, "output", output, subscriptions=lambda: [DefaultSubscription()])
    await world.caller.publish_message(Text("event"), DefaultTopicId())
    await world.idle()
    assert await world.caller.send_message(Text("call"), AgentId("output", "k")) == Text("taken")
    got = [queue.get_nowait() for _ in range(2)]
    assert [text for text, _ in got] == ["output/default event", "output/k call"]
    assert [ctx.is_rpc for _, ctx in got] == [False, True]


async def test_a_closure_agent_may_send_and_publish(world: World) -> None:
    seen: list[Seen] = []

    @default_subscription
    class Default(Recorder):
        pass

    async def forward(agent: ClosureContext, message: Text, ctx: MessageContext) -> Text:
        await agent.publish_message(Text(f"published {message.content}"), DefaultTopicId("default", "k"))
        return await agent.send_message(message, AgentId("recorder", "k"))

    await Default.register(world.host, "recorder", lambda: Default(seen))
    await ClosureAgent.register_closure(world.host, "closure", forward)
    assert await world.caller.send_message(Text("a"), AgentId("closure", "k")) == Text("k got a")
    await world.idle()
    assert {(one.message.content, str(one.context.sender)) for one in seen} == {
        ("published a", "closure/k"),
        ("a", "closure/k"),
    }


async def test_a_closure_agents_policy_for_other_types_decides(world: World) -> None:
    async def take(agent: ClosureContext, message: Text, ctx: MessageContext) -> None:
        raise AssertionError("it takes texts only")

    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    await Router.register(world.host, "router", lambda: Router([]))
    await ClosureAgent.register_closure(world.host, "strict", take, unknown_type_policy="error")
    with pytest.raises(CantHandleException, match="not in target types"):
        await world.caller.send_message(Number(1), AgentId("strict", "k"))
    await ClosureAgent.register_closure(world.host, "warns", take, unknown_type_policy="warn")
    with pytest.warns(UserWarning, match="not in target types"):
        assert await world.caller.send_message(Number(1), AgentId("warns", "k")) is None


@dataclass(frozen=True)
class OnlyHere:
    """Handled by closures only, so that nothing but ``register_closure`` registers its serializer."""

    n: int


@two_runtimes
@pytest.mark.parametrize("attempt", range(10))
async def test_messages_that_arrive_while_a_closure_is_being_registered_are_not_unknown(
    world: World, attempt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosted_type, "_SETTLES_WITHIN", 30.0)  # a busy machine takes longer than people do
    got: list[Any] = []
    sent: list[int] = []
    registered = asyncio.Event()

    async def output(agent: ClosureContext, message: OnlyHere, ctx: MessageContext) -> Text:
        got.append(message)
        return Text("taken")

    async def publish() -> None:
        while not registered.is_set():
            sent.append(len(sent))
            await world.caller.publish_message(OnlyHere(sent[-1]), DefaultTopicId())
            await world.caller.publish_message(OnlyHere(sent[-1]), TopicId("output:", "k"))
            await asyncio.sleep(0)

    async def call() -> None:
        while not world.host.running.counters.taken_in:  # the worker listens from then on
            await asyncio.sleep(0)
        while not registered.is_set():
            assert await world.caller.send_message(OnlyHere(-3), AgentId("output", "k")) == Text("taken")
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(publish())
        group.create_task(call())
        await ClosureAgent.register_closure(
            world.host, "output", output, unknown_type_policy="error", subscriptions=lambda: [DefaultSubscription()]
        )
        registered.set()
    await world.caller.publish_message(OnlyHere(-2), DefaultTopicId())
    await world.idle()
    assert {OnlyHere(-3), OnlyHere(-2)} <= set(got)
    assert [message.n for message in got if message.n >= 0].count(sent[-1]) == 2
    counters = world.host.running.counters
    assert counters.unknown_payloads == 0
    assert counters.undecodable == 0
    assert {type(message) for message in got} == {OnlyHere}


# -- ToolAgent -------------------------------------------------------------------------------------------------------


def _pass(text: str) -> str:
    return f"passed {text}"


def _turn(content: Any) -> CreateResult:
    return CreateResult(
        finish_reason="stop" if isinstance(content, str) else "function_calls",
        content=content,
        usage=RequestUsage(prompt_tokens=1, completion_tokens=1),
        cached=False,
    )


async def test_a_tool_agent_serves_the_caller_loop_of_a_model(world: World) -> None:
    tools = [FunctionTool(_pass, name="pass", description="passes")]
    await ToolAgent.register(world.host, "tools", lambda: ToolAgent("tools", tools))
    # The caller has neither the ToolAgent nor a class of that name beside FunctionCall.
    world.caller.add_message_serializer(try_get_known_serializers_for_type(FunctionExecutionResult))
    model = ReplayChatCompletionClient(
        [
            _turn([FunctionCall(id="1", name="pass", arguments=json.dumps({"text": "a"}))]),
            _turn(
                [
                    FunctionCall(id="2", name="pass", arguments=json.dumps({"text": "b"})),
                    FunctionCall(id="3", name="fail", arguments="{}"),
                ]
            ),
            _turn("done"),
        ],
        model_info={
            "vision": False,
            "function_calling": True,
            "json_output": False,
            "family": "unknown",
            "structured_output": False,
        },
    )
    messages = await tool_agent_caller_loop(
        world.caller, AgentId("tools", "k"), model, [UserMessage(content="go", source="user")], tools
    )
    assert [type(message) for message in messages] == [
        AssistantMessage,
        FunctionExecutionResultMessage,
        AssistantMessage,
        FunctionExecutionResultMessage,
        AssistantMessage,
    ]
    results = [
        result
        for message in messages
        if isinstance(message, FunctionExecutionResultMessage)
        for result in message.content
    ]
    assert [(result.call_id, result.is_error) for result in results] == [("1", False), ("2", False), ("3", True)]
    assert results[0].content == "passed a"
    assert messages[-1].content == "done"


# -- coordinator and workers, as AutoGen's documentation has them ----------------------------------------------------


@dataclass
class WorkerTask:
    task: str
    previous_results: list[str]


@dataclass
class WorkerTaskResult:
    result: str


@dataclass
class UserTask:
    task: str


@dataclass
class FinalResult:
    result: str


class Worker(RoutedAgent):
    @message_handler
    async def handle_task(self, message: WorkerTask, ctx: MessageContext) -> WorkerTaskResult:
        return WorkerTaskResult(result=f"{self.id.key}({message.task}|{'+'.join(message.previous_results)})")


class Coordinator(RoutedAgent):
    """A mixture of agents: each layer of workers sees the results of the one before."""

    @message_handler
    async def handle_task(self, message: UserTask, ctx: MessageContext) -> FinalResult:
        task = WorkerTask(task=message.task, previous_results=[])
        for layer in range(2):
            workers = [AgentId("worker", f"l{layer}w{n}") for n in range(3)]
            results = await asyncio.gather(*[self.send_message(task, worker) for worker in workers])
            assert {type(result) for result in results} == {WorkerTaskResult}
            task = WorkerTask(task=message.task, previous_results=[result.result for result in results])
        return FinalResult("+".join(task.previous_results))


async def test_a_coordinator_gets_the_results_of_workers_elsewhere_without_any_serializer_added(world: World) -> None:
    await Worker.register(world.host, "worker", lambda: Worker("works"))
    await Coordinator.register(world.caller, "coordinator", lambda: Coordinator("coordinates"))
    result = await world.caller.send_message(UserTask("t"), AgentId("coordinator", "k"))
    first = "+".join(f"l0w{n}(t|)" for n in range(3))
    assert result == FinalResult("+".join(f"l1w{n}(t|{first})" for n in range(3)))


@dataclass
class Job:
    n: int


@dataclass
class JobDone:
    n: int
    by: str


@type_subscription("jobs")
class Processor(RoutedAgent):
    @message_handler
    async def on_job(self, message: Job, ctx: MessageContext) -> None:
        await self.publish_message(JobDone(message.n, self.id.type), TopicId("results", "default"))


async def test_concurrent_agents_process_one_message_and_a_collector_elsewhere_gets_their_results(
    world: World,
) -> None:
    collected: list[JobDone] = []

    async def collect(agent: ClosureContext, message: JobDone, ctx: MessageContext) -> None:
        collected.append(message)

    for name in ("first", "second"):
        await Processor.register(world.host, name, lambda: Processor("processes"))
    await ClosureAgent.register_closure(
        world.caller, "collector", collect, subscriptions=lambda: [TypeSubscription("results", "collector")]
    )
    await world.caller.publish_message(Job(1), TopicId("jobs", "default"))
    await world.idle()
    assert sorted((done.n, done.by) for done in collected) == [(1, "first"), (1, "second")]


@natsrt_only
async def test_an_agent_proxy_reaches_a_remote_agent(world: World) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    proxy = AgentProxy(AgentId("recorder", "k"), world.caller)
    assert await proxy.send_message(Text("a"), sender=AgentId("x", "y")) == Text("k got a")
    assert (await proxy.metadata)["type"] == "recorder"
