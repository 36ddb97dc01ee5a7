"""Model clients in other processes: requests and results arrive equal, and generations stop when nobody wants them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from autogen_core import AgentId, CancellationToken, ComponentLoader, FunctionCall, Image
from autogen_core.models import (
    AssistantMessage,
    ChatCompletionClient,
    ChatCompletionTokenLogprob,
    CreateResult,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    LLMMessage,
    RequestUsage,
    SystemMessage,
    TopLogprob,
    UserMessage,
)
from autogen_core.tools import FunctionTool, Tool
from PIL import Image as Picture
from pydantic import BaseModel

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.contrib.models import ModelBusy, ModelRequest, RemoteChatCompletionClient, host_model
from natsrt.contrib.models.client import _Pauses
from natsrt.embedded import EmbeddedServer
from tests.programs import model_worker
from tests.programs.model_worker import INFO, OutOfTokens, Scripted
from tests.support.processes import Process, Processes, eventually

PROGRAM = Path(model_worker.__file__)
Make = Callable[..., Any]


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    """Starts runtimes."""
    async with AsyncExitStack() as stack:

        async def runtime(url: str = server.url, **settings: Any) -> NatsAgentRuntime:
            return await stack.enter_async_context(NatsAgentRuntime(url, namespace=namespace, **settings))

        yield runtime


@pytest.fixture
def start(server: EmbeddedServer, namespace: str, processes: Processes) -> Callable[..., Any]:
    """Starts worker processes."""

    async def started(name: str = "w", max_running: str = "-", max_waiting: str = "-") -> Process:
        process = processes.python(PROGRAM, server.url, namespace, name, max_running, max_waiting, name=name)
        await process.wait_for_line("ready")
        return process

    return started


def said(text: str) -> list[LLMMessage]:
    return [UserMessage(content=text, source="user")]


async def tokens_of(client: ChatCompletionClient, text: str, **arguments: Any) -> list[str | CreateResult]:
    return [item async for item in client.create_stream(said(text), **arguments)]


def nothing_is_open(*runtimes: NatsAgentRuntime) -> bool:
    return not any(
        runtime.running.outgoing.streams._open or runtime.running.incoming.streams._streams for runtime in runtimes
    )


# -- requests and results ----------------------------------------------------------------------------------------------


class Line(BaseModel):
    text: str


class Answer(BaseModel):
    """What the model is to answer."""

    lines: list[Line]
    sure: bool = False


async def weather(city: str, days: int = 1) -> str:
    return "rain"


async def test_all_arguments_arrive_equal(make: Make) -> None:
    model, tool = Scripted(), FunctionTool(weather, "tells the weather", strict=False)
    await host_model(await make(), "gpt", lambda: model)
    client = await RemoteChatCompletionClient.connect("gpt", await make())
    messages: list[LLMMessage] = [
        SystemMessage(content="be brief"),
        UserMessage(content=["what is this?", Image(Picture.new("RGB", (3, 2), "red"))], source="user"),
        AssistantMessage(content="a square", source="gpt"),
        AssistantMessage(content=[FunctionCall("1", '{"city": "Köln"}', "weather")], thought="hm", source="gpt"),
        FunctionExecutionResultMessage(
            content=[FunctionExecutionResult(content="rain", name="weather", call_id="1", is_error=False)]
        ),
        *said("count 2"),
    ]
    extra = {"temperature": 0.5, "stop": ["\n"], "seed": None, "metadata": {"a": 2**60}}
    result = await client.create(
        messages, tools=[tool, tool.schema], tool_choice=tool, json_output=Answer, extra_create_args=extra
    )
    assert result == CreateResult(
        finish_reason="stop", content="here", usage=RequestUsage(10, 2), cached=False, thought="t"
    )
    [call] = model.calls
    assert [type(message) for message in call["messages"]] == [type(message) for message in messages]
    assert [message.model_dump() for message in call["messages"]] == [message.model_dump() for message in messages]
    assert call["messages"][1].content[1].image.getpixel((2, 1)) == (255, 0, 0)
    assert call["tools"] == [tool.schema, tool.schema]
    assert isinstance(call["tool_choice"], Tool)
    assert (call["tool_choice"].name, call["tool_choice"].schema) == ("weather", tool.schema)
    output = call["json_output"]
    assert issubclass(output, BaseModel) and output.__name__ == "Answer"
    assert output.model_json_schema() == Answer.model_json_schema()
    assert output.model_validate_json('{"lines": []}').model_dump() == {"lines": []}
    assert call["extra_create_args"] == extra


@pytest.mark.parametrize("json_output", [None, True, False])
@pytest.mark.parametrize("tool_choice", ["auto", "required", "none"])
async def test_plain_options_arrive_as_they_are(make: Make, json_output: bool | None, tool_choice: Any) -> None:
    model, runtime = Scripted(), await make()
    await host_model(runtime, "gpt", lambda: model)
    client = RemoteChatCompletionClient("gpt", runtime)
    await client.create(said("count 0"), json_output=json_output, tool_choice=tool_choice)
    assert model.calls[0]["json_output"] is json_output
    assert (model.calls[0]["tool_choice"], model.calls[0]["tools"]) == (tool_choice, [])


async def test_all_of_a_result_arrives_equal(make: Make) -> None:
    replay = pytest.importorskip("autogen_ext.models.replay")
    logprobs = [ChatCompletionTokenLogprob(token="a", logprob=-0.5, top_logprobs=[TopLogprob(-1.5, [97])], bytes=[97])]
    results = [
        CreateResult(
            finish_reason="function_calls",
            content=[FunctionCall("1", "{}", "weather"), FunctionCall("2", "{}", "time")],
            usage=RequestUsage(7, 3),
            cached=True,
            logprobs=logprobs,
            thought="which?",
        ),
        CreateResult(finish_reason="length", content="", usage=RequestUsage(1, 0), cached=False),
    ]
    await host_model(await make(), "gpt", lambda: replay.ReplayChatCompletionClient([*results, results[0], "to be"]))
    client = await RemoteChatCompletionClient.connect("gpt", await make())
    assert [await client.create(said("hi")) for _ in results] == results
    assert await tokens_of(client, "hi") == results[:1]
    *words, last = await tokens_of(client, "hi there")
    assert words == ["to ", "be"]
    assert isinstance(last, CreateResult) and (last.content, last.usage) == ("to be", RequestUsage(2, 2))
    assert client.actual_usage() == RequestUsage(2, 2)
    assert client.total_usage() == RequestUsage(17, 8)
    assert not client.model_info["vision"]
    with pytest.raises(ValueError, match="No more mock responses available"):
        await client.create(said("hi"))


async def test_tokens_come_in_order_and_one_by_one(make: Make, start: Make) -> None:
    await start()
    client = await RemoteChatCompletionClient.connect("gpt", await make())
    assert (await tokens_of(client, "count 1000"))[:-1] == [f"{token} " for token in range(1000)]
    async with aclosing(client.create_stream(said("hang 3"))) as items:  # they come before the generation ends
        assert [await anext(items) for _ in range(3)] == ["0 ", "1 ", "2 "]


CALLER = """
import asyncio, sys
from autogen_core.models import UserMessage
from natsrt.contrib.models import RemoteChatCompletionClient

async def main(url, namespace, text):
    client = await RemoteChatCompletionClient.connect("gpt", servers=url, namespace=namespace)
    messages = [UserMessage(content=text, source="user")]
    print("connected", flush=True)
    print([item async for item in client.create_stream(messages)])
    print(await client.create(messages))
    await client.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_process_that_only_calls_gets_all(
    make: Make, server: EmbeddedServer, namespace: str, processes: Processes, tmp_path: Path
) -> None:
    await host_model(await make(), "gpt", Scripted)
    program = tmp_path / "caller.py"
    program.write_text(CALLER)
    caller = processes.python(program, server.url, namespace, "count 2")
    assert await caller.wait() == 0, caller.describe()
    result = (
        "finish_reason='stop' content='here' usage=RequestUsage(prompt_tokens=10, completion_tokens=2) cached=False"
    )
    _, streamed, created = caller.stdout.splitlines()
    assert streamed.startswith("['0 ', '1 ', CreateResult(finish_reason='stop', content='here'")
    assert created.startswith(result)
    assert caller.stderr == ""


async def test_what_a_model_can_do_is_read_once_and_counted_here(make: Make) -> None:
    await host_model(await make(), "gpt", Scripted)
    runtime = await make()
    client = await RemoteChatCompletionClient.connect("gpt", runtime)
    assert client.model_info == INFO
    with pytest.deprecated_call():
        assert client.capabilities["vision"] is True  # type: ignore[typeddict-item]
    tool = FunctionTool(weather, "tells the weather")
    empty = client.count_tokens([])
    assert empty == 0
    counts = [
        client.count_tokens(said("x" * 300)),
        client.count_tokens(said("ü" * 300)),
        client.count_tokens([UserMessage(content=[Image(Picture.new("RGB", (9, 9)))], source="user")]),
        client.count_tokens([AssistantMessage(content=[FunctionCall("1", "{}" * 90, "a")], source="a")]),
        client.count_tokens([], tools=[tool]),
    ]
    assert counts[:3] == [104, 204, 1109] and counts[3] > 60 and counts[4] > 20
    assert client.remaining_tokens(said("x" * 300)) == 8000 - 104
    exact = RemoteChatCompletionClient(
        "gpt", runtime, model_info=INFO, max_tokens=10, token_counter=lambda messages, tools: len(messages) + len(tools)
    )
    assert exact.remaining_tokens(said("a b c"), tools=[tool]) == 8
    unknown = RemoteChatCompletionClient("gpt", runtime)
    for ask in (lambda: unknown.model_info, lambda: unknown.remaining_tokens([])):
        with pytest.raises(RuntimeError, match=r"connect\(\.\.\.\)`, or give (model_info|max_tokens)="):
            ask()


async def test_a_model_that_does_not_know_its_limit_is_described_nevertheless(make: Make) -> None:
    class Unlimited(Scripted):
        def remaining_tokens(self, *args: Any, **kwargs: Any) -> int:
            raise KeyError("gpt-unknown")

    runtime = await make()
    await host_model(runtime, "gpt", Unlimited)
    client = await RemoteChatCompletionClient.connect("gpt", runtime)
    with pytest.raises(RuntimeError, match="max_tokens="):
        client.remaining_tokens([])


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"tools": [weather]}, TypeError, "must be an autogen_core.tools.Tool or a ToolSchema with a name"),
        ({"tools": [{"description": "no name"}]}, TypeError, "with a name"),
        ({"tools": [{"name": "a", "parameters": object()}]}, TypeError, "the schema of the tool 'a' is not JSON"),
        ({"tool_choice": "weather"}, ValueError, "'auto', 'required', 'none' or a tool"),
        ({"json_output": dict}, ValueError, "a subclass of pydantic.BaseModel"),
        ({"json_output": "yes"}, ValueError, "None, a bool"),
        ({"extra_create_args": {"stop": ("a", "b")}}, natsrt.CannotSerialize, "extra_create_args.stop"),
        ({"extra_create_args": {"temperature": float("nan")}}, natsrt.CannotSerialize, "NaN"),
    ],
)
async def test_arguments_that_cannot_travel_are_refused(
    make: Make, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    model, runtime = Scripted(), await make()
    await host_model(runtime, "gpt", lambda: model)
    client = RemoteChatCompletionClient("gpt", runtime)
    with pytest.raises(error, match=text):
        await client.create(said("count 1"), **arguments)
    with pytest.raises(error, match=text):
        await tokens_of(client, "count 1", **arguments)
    assert model.calls == []


async def test_hosting_what_is_no_model_is_refused(make: Make) -> None:
    runtime = await make()

    async def no_client() -> Any:
        return "gpt"

    def broken() -> Any:
        raise MemoryError("the weights do not fit")

    with pytest.raises(TypeError, match=r"must return an autogen_core\.models\.ChatCompletionClient, not 'gpt'"):
        await host_model(runtime, "gpt", no_client)
    with pytest.raises(MemoryError, match="weights"):
        await host_model(runtime, "gpt", broken)
    for limits in ({"max_running": 0}, {"max_running": True}, {"max_running": 1, "max_waiting": -1}):
        with pytest.raises(ValueError, match="must be a whole number of at least"):
            await host_model(runtime, "gpt", Scripted, **limits)
    with pytest.raises(ValueError, match="max_waiting needs max_running"):
        await host_model(runtime, "gpt", Scripted, max_waiting=1)
    unused = Scripted()
    await host_model(runtime, "gpt", Scripted)
    with pytest.raises(ValueError, match="already exists"):
        await host_model(runtime, "gpt", lambda: unused)
    assert unused.closed == 1


async def test_bad_arguments_of_the_client_are_refused(make: Make) -> None:
    runtime = await make()
    with pytest.raises(ValueError, match="either a runtime or these"):
        RemoteChatCompletionClient("gpt", runtime, servers="nats://127.0.0.1:4222")
    with pytest.raises(ValueError, match="retries"):
        RemoteChatCompletionClient("gpt", runtime, retries=-1)
    with pytest.raises(ValueError, match="max_tokens must be a whole number"):
        RemoteChatCompletionClient("gpt", runtime, max_tokens="8000")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token_counter must be a function"):
        RemoteChatCompletionClient("gpt", runtime, token_counter=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="structured_output|Missing required field"):
        RemoteChatCompletionClient("gpt", runtime, model_info={"vision": True})  # type: ignore[typeddict-item]
    with pytest.raises(natsrt.AgentNotServed, match="gpt"):
        await RemoteChatCompletionClient.connect("gpt", runtime, timeout=0.3)


# -- errors ------------------------------------------------------------------------------------------------------------


async def test_errors_keep_their_class_and_come_after_the_tokens(make: Make, start: Make) -> None:
    await start()
    runtime = await make()
    client = await RemoteChatCompletionClient.connect("gpt", runtime, retries=3)
    with pytest.raises(ValueError, match="no such model") as raised:
        await client.create(said("refuse 0"))
    assert raised.value.natsrt_remote.worker_id.startswith("w-")  # type: ignore[attr-defined]
    received = []
    with pytest.raises(natsrt.RemoteAgentError, match="OutOfTokens: no tokens are left"):
        async for item in client.create_stream(said("fail 3")):
            received.append(item)
    assert received == ["0 ", "1 ", "2 "]
    runtime.add_error_type(OutOfTokens, "OutOfTokens")
    with pytest.raises(natsrt.UnknownAgentType, match="nobody"):
        await RemoteChatCompletionClient("nobody", runtime).create(said("count 1"))


async def test_an_agent_that_is_no_model_is_named(make: Make) -> None:
    class Deaf(natsrt.contrib.models.ModelAgent):  # type: ignore[name-defined,misc]
        async def on_message_impl(self, message: Any, ctx: Any) -> Any:
            return "what?"

    runtime = await make()
    await natsrt.register(runtime, Deaf, "deaf", lambda: Deaf(Scripted()))
    with pytest.raises(natsrt.CannotDecode, match="the answer of deaf/default"):
        await RemoteChatCompletionClient("deaf", runtime).create(said("count 1"))


# -- stopping ----------------------------------------------------------------------------------------------------------


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@pytest.mark.parametrize("way", ["token", "close", "task"])
@pytest.mark.parametrize("verb", ["endless", "hang"])
async def test_a_generation_that_nobody_wants_is_stopped(make: Make, start: Make, way: str, verb: str) -> None:
    worker = await start()
    runtime = await make()
    client = await RemoteChatCompletionClient.connect("gpt", runtime)
    token, items = CancellationToken(), []
    generation = client.create_stream(said(f"{verb} 2"), cancellation_token=token)

    async def read() -> None:
        async for item in generation:
            items.append(item)

    reading = asyncio.create_task(read())
    await eventually(lambda: len(items) >= 2)
    with within(5.0):
        if way == "token":
            token.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        else:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await generation.aclose()
        await worker.wait_for_line(f"ended {verb}")
    await eventually(lambda: nothing_is_open(runtime))


@pytest.mark.parametrize("way", ["token", "timeout"])
async def test_a_response_that_nobody_waits_for_is_stopped(make: Make, start: Make, way: str) -> None:
    worker = await start()
    runtime = await make()
    client, token = await RemoteChatCompletionClient.connect("gpt", runtime), CancellationToken()
    creating = asyncio.create_task(client.create(said("hang 1"), cancellation_token=token))
    await eventually(lambda: runtime.running.outgoing.streams._open)
    await asyncio.wait({creating}, timeout=0.3)
    with within(5.0):
        if way == "token":
            token.cancel()
        else:
            creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        await worker.wait_for_line("ended hang")


async def test_the_generation_of_a_killed_caller_is_stopped(
    make: Make, server: EmbeddedServer, namespace: str, processes: Processes, tmp_path: Path
) -> None:
    notes: list[str] = []
    await host_model(await make(stream_idle_timeout=1.0), "gpt", lambda: Scripted(notes=notes), max_running=1)
    program = tmp_path / "caller.py"
    program.write_text(CALLER)
    caller = processes.python(program, server.url, namespace, "hang 0")
    await caller.wait_for_line("connected")
    other = RemoteChatCompletionClient("gpt", await make())
    waiting = asyncio.create_task(other.create(said("count 1")))
    await asyncio.wait({waiting}, timeout=0.5)
    assert not waiting.done()
    caller.kill()
    assert (await asyncio.wait_for(waiting, 20)).content == "here"
    assert notes == ["ended hang: CancelledError", "done count"]


# -- workers -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_ten_workers_share_a_models_load(make: Make, start: Make) -> None:
    await asyncio.gather(*(start(f"w{number}", "1", "0") for number in range(10)))
    client = await RemoteChatCompletionClient.connect("gpt", await make(busy_retry=30.0))
    results = await asyncio.gather(*(client.create(said("slow 10")) for _ in range(60)))
    served = [result.content for result in results]
    assert set(served) == {f"w{number}" for number in range(10)}
    assert max(served.count(name) for name in set(served)) <= 20


async def test_requests_that_were_refused_together_come_again_at_different_times() -> None:
    busy = ModelBusy("gpt", 1, 0)
    each = [_Pauses(60.0, 0) for _ in range(20)]
    for number in range(8):
        pauses = [one.after(busy) or 0.0 for one in each]
        middle = min(0.05 * 2**number, 2.0)
        assert all(middle * 0.5 <= pause <= middle * 1.5 for pause in pauses)
        assert max(pauses) - min(pauses) > middle * 0.2


async def test_a_model_runs_as_many_generations_as_it_may(make: Make) -> None:
    model, runtime = Scripted(), await make(busy_retry=0.2)
    await host_model(runtime, "gpt", lambda: model, max_running=2, max_waiting=1)
    caller = await make(busy_retry=0.2)
    client = await RemoteChatCompletionClient.connect("gpt", caller)
    streams = [client.create_stream(said("hang 1")) for _ in range(2)]
    assert [await anext(stream) for stream in streams] == ["0 ", "0 "]
    third = asyncio.create_task(client.create(said("count 1")))
    await eventually(lambda: len(caller.running.outgoing.streams._open) == 3)
    with pytest.raises(ModelBusy, match="'gpt' is busy: 2 generations run on this worker, and 1 wait") as raised:
        await client.create(said("count 1"))
    assert (raised.value.model, raised.value.running, raised.value.waiting) == ("gpt", 2, 1)
    with within(2.0):  # what a model can do is told while it is busy
        await RemoteChatCompletionClient.connect("gpt", caller)
    await streams[0].aclose()
    assert (await third).content == "here"
    await streams[1].aclose()
    await eventually(lambda: model.running == 0)
    assert model.most == 2
    assert (await client.create(said("count 1"))).content == "here"


async def test_a_worker_that_dies_in_mid_stream_is_a_typed_error(make: Make, start: Make) -> None:
    worker = await start()
    client = await RemoteChatCompletionClient.connect("gpt", await make(), retries=2)
    received = []
    with within(10.0), pytest.raises(natsrt.WorkerLost):
        async for item in client.create_stream(said("hang 2")):
            received.append(item)
            if len(received) == 2:
                worker.kill()
    assert received == ["0 ", "1 "]


@pytest.mark.parametrize("way", ["create", "stream"])
async def test_a_request_of_which_nothing_was_given_out_is_sent_again(make: Make, start: Make, way: str) -> None:
    first, caller = await start("first"), await make()
    client = await RemoteChatCompletionClient.connect("gpt", caller, retries=1)
    working = asyncio.create_task(tokens_of(client, "first 0") if way == "stream" else client.create(said("first 2")))
    await eventually(lambda: any(stream.parts.consumed for stream in caller.running.outgoing.streams._open))
    await start("second")
    first.kill()
    result = await asyncio.wait_for(working, 20)
    last = result[-1] if isinstance(result, list) else result
    assert isinstance(last, CreateResult) and last.content == "second"


async def test_a_model_whose_worker_starts_again_is_found_by_retries(make: Make, start: Make) -> None:
    first, caller = await start("first"), await make()
    client = await RemoteChatCompletionClient.connect("gpt", caller, retries=9)
    first.kill()
    creating = asyncio.create_task(client.create(said("count 1")))
    await asyncio.wait({creating}, timeout=0.5)
    await start("second")
    assert (await asyncio.wait_for(creating, 20)).content == "second"


@pytest.mark.parametrize("known", [True, False])
async def test_a_request_with_retries_waits_for_a_worker(make: Make, start: Make, known: bool) -> None:
    caller = await make()
    client = RemoteChatCompletionClient("gpt", caller, retries=1)
    if known:  # a deployment: the old worker stops in order, and the new one comes later than any retries
        old = await start("old")
        await caller.wait_for("gpt", timeout=10)
        old.terminate()
        await old.wait()
    creating = asyncio.create_task(client.create(said("count 1")))
    await asyncio.wait({creating}, timeout=2.0)
    assert not creating.done()
    await start("new")
    assert (await asyncio.wait_for(creating, 20)).content == "new"


@pytest.mark.parametrize("retries", [0, 3])
async def test_a_request_does_not_wait_longer_for_a_worker(
    make: Make, monkeypatch: pytest.MonkeyPatch, retries: int
) -> None:
    monkeypatch.setattr("natsrt.contrib.models.client._WORKER_WITHIN", 0.5)
    client, began = RemoteChatCompletionClient("gpt", await make(), retries=retries), time.monotonic()
    with within(10.0), pytest.raises(natsrt.UnknownAgentType):
        await client.create(said("count 1"))
    assert retries == 0 or time.monotonic() - began > 0.5


async def test_without_retries_a_lost_worker_is_an_error(make: Make, start: Make) -> None:
    worker = await start()
    client = await RemoteChatCompletionClient.connect("gpt", await make())
    creating = asyncio.create_task(client.create(said("hang 0")))
    await asyncio.wait({creating}, timeout=0.5)
    worker.kill()
    with pytest.raises(natsrt.WorkerLost):
        await asyncio.wait_for(creating, 20)


async def test_a_worker_that_stops_finishes_its_generations(make: Make, start: Make) -> None:
    worker = await start()
    client = await RemoteChatCompletionClient.connect("gpt", await make())
    stream = client.create_stream(said("slow 50"))
    received = [await anext(stream)]
    worker.terminate()
    received += [item async for item in stream]
    assert len(received) == 51
    assert await worker.wait() == 0


# -- the client itself -------------------------------------------------------------------------------------------------


async def test_a_runtime_that_closes_closes_its_model_and_a_client_only_its_own_runtime(
    server: EmbeddedServer, namespace: str
) -> None:
    model = Scripted()
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        await host_model(runtime, "gpt", lambda: model)
        shared = await RemoteChatCompletionClient.connect("gpt", runtime)
        own = await RemoteChatCompletionClient.connect("gpt", servers=server.url, namespace=namespace)
        assert (await own.create(said("count 1"))).content == "here"
        assert own._runtime.worker_id is not None
        await asyncio.gather(own.close(), own.close())
        assert own._runtime.worker_id is None
        with pytest.raises(RuntimeError, match="this model client is closed: make another one"):
            await own.create(said("count 1"))
        assert own._runtime.worker_id is None
        await shared.close()
        assert (await shared.create(said("count 1"))).content == "here"
        assert model.closed == 0
    assert model.closed == 1


async def test_a_client_with_its_own_runtime_names_another_event_loop(
    make: Make, server: EmbeddedServer, namespace: str
) -> None:
    await host_model(await make(), "gpt", Scripted)
    client = RemoteChatCompletionClient("gpt", servers=server.url, namespace=namespace)

    async def use() -> None:
        await client.create(said("count 1"))
        await client._runtime.close()  # else its socket is left to the garbage collector

    await asyncio.to_thread(asyncio.run, use())
    with pytest.raises(RuntimeError, match="this model client runs in another event loop"):
        await client.create(said("count 1"))
    await client.close()


@pytest.mark.parametrize("started", [True, False])
async def test_a_model_without_requests_is_closed_with_its_runtime(
    server: EmbeddedServer, namespace: str, started: bool
) -> None:
    models: list[Scripted] = []

    def model() -> Scripted:
        models.append(Scripted())
        return models[-1]

    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    if not started:
        await host_model(runtime, "gpt", model)
    async with runtime:
        if started:
            await host_model(runtime, "gpt", model)
        assert [made.closed for made in models] == [0]
    assert [made.closed for made in models] == [1]


async def test_all_requests_share_one_client_and_its_limits_and_other_keys_are_refused(make: Make) -> None:
    models: list[Scripted] = []

    def model() -> Scripted:
        models.append(Scripted())
        return models[-1]

    await host_model(await make(), "gpt", model, max_running=1)
    caller = await make()
    client = await RemoteChatCompletionClient.connect("gpt", caller)
    request = ModelRequest(messages=said("slow 3"))
    for key in ("k1", "k2"):
        with pytest.raises(
            Exception, match=f"the model 'gpt' is one agent, gpt/default: the key '{key}' is not hosted"
        ):
            async with caller.stream_message(request, AgentId("gpt", key)) as stream:
                async for _ in stream:
                    pass
    await asyncio.gather(*(client.create(said("slow 3")) for _ in range(4)))
    assert len(models) == 1 and models[0].most == 1


async def test_a_client_is_a_component_without_credentials(make: Make, server: EmbeddedServer, namespace: str) -> None:
    runtime = await make()
    await host_model(runtime, "gpt", Scripted)
    secret = server.url.replace("nats://", "nats://ada:hunter2@")
    given = RemoteChatCompletionClient("gpt", servers=secret, namespace=namespace)
    assert "hunter2" not in given.dump_component().model_dump_json()
    client = await RemoteChatCompletionClient.connect("gpt", runtime, retries=2)
    dumped = client.dump_component()
    assert dumped.provider == "natsrt.contrib.models.RemoteChatCompletionClient"
    assert dumped.component_type == "model"
    assert dumped.config == {
        "type": "gpt",
        "servers": [server.url],
        "namespace": namespace,
        "model_info": INFO,
        "max_tokens": 8000,
        "retries": 2,
    }
    loaded = ComponentLoader.load_component(dumped, ChatCompletionClient)
    assert loaded.model_info == INFO
    assert (await asyncio.gather(*(loaded.create(said("count 1")) for _ in range(3))))[2].content == "here"
    await loaded.close()


async def test_an_assistant_uses_it(make: Make) -> None:
    agents, replay = (pytest.importorskip(name) for name in ("autogen_agentchat.agents", "autogen_ext.models.replay"))
    messages = pytest.importorskip("autogen_agentchat.messages")
    info = INFO
    calls = CreateResult(
        finish_reason="function_calls",
        content=[FunctionCall("1", '{"city": "Rome"}', "weather")],
        usage=RequestUsage(1, 1),
        cached=False,
    )
    await host_model(
        await make(), "gpt", lambda: replay.ReplayChatCompletionClient([calls, "It will rain."], model_info=info)
    )
    client = await RemoteChatCompletionClient.connect("gpt", await make())
    assistant = agents.AssistantAgent(
        "assistant", client, tools=[weather], model_client_stream=True, reflect_on_tool_use=True
    )
    streamed = [item async for item in assistant.run_stream(task="Will it rain in Rome?")]
    chunks = [item.content for item in streamed if isinstance(item, messages.ModelClientStreamingChunkEvent)]
    assert chunks == ["It ", "will ", "rain."]
    assert streamed[-1].messages[-1].content == "It will rain."


async def test_a_cache_works_over_it(make: Make) -> None:
    cache = pytest.importorskip("autogen_ext.models.cache")
    model = Scripted()
    await host_model(await make(), "gpt", lambda: model)
    cached = cache.ChatCompletionCache(await RemoteChatCompletionClient.connect("gpt", await make()))
    for expected in (False, True):  # it changes the result that it has kept
        assert (await cached.create(said("count 1"), json_output=Answer)).cached is expected
    streams = [await tokens_of(cached, "count 3") for _ in range(2)]
    assert streams[0][:-1] == streams[1][:-1] == ["0 ", "1 ", "2 "]
    assert len(model.calls) == 2
