"""Streamed calls: items in order, each once, with flow control, over everything that can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import (
    AgentId,
    CancellationToken,
    DefaultInterventionHandler,
    MessageContext,
    RoutedAgent,
    SingleThreadedAgentRuntime,
    rpc,
)
from nats.aio.msg import Msg
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import natsrt
from benchmarks.chaos.proxy import Proxy
from natsrt import MessageStream, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.sending.call_sender import Call
from natsrt.sending.replies import Replies
from natsrt.wire.part_flow import PartsReceived
from tests.programs import stream_worker
from tests.programs.stream_worker import Count, Item, Streams, Sum
from tests.support.cuts import cut_again_and_again
from tests.support.processes import Processes, eventually

PROGRAM = Path(stream_worker.__file__)
AGENT = AgentId("streams", "k")
LONG = 20.0
Make = Callable[..., Any]
KEYED = pytest.mark.parametrize("keyed", [None, True], ids=["plain", "keyed"])


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    """Starts runtimes. ``ended``: workers of the type ``streams``, which note there how their handlers ended."""
    async with AsyncExitStack() as stack:

        async def runtime(
            ended: list[str] | None = None,
            *,
            url: str = server.url,
            keyed: bool | None = None,
            agents: list[Streams] | None = None,
            **settings: Any,
        ) -> NatsAgentRuntime:
            made = NatsAgentRuntime(url, namespace=namespace, **settings)

            def agent() -> Streams:
                new = Streams(ended)
                if agents is not None:
                    agents.append(new)
                return new

            if ended is not None:
                await made.register_factory("streams", agent, expected_class=Streams, keyed=keyed)
            return await stack.enter_async_context(made)

        yield runtime


def items(to: int, size: int = 0) -> list[Any]:
    return [Item(number, "x" * size) for number in range(1, to + 1)]


async def all_of(stream: MessageStream) -> list[Any]:
    return [item async for item in stream]


def nothing_is_open(*runtimes: NatsAgentRuntime) -> bool:
    return not any(
        runtime.running.outgoing.streams._open or runtime.running.incoming.streams._streams for runtime in runtimes
    )


# -- items -----------------------------------------------------------------------------------------------------------


@KEYED
async def test_items_come_in_order_and_then_the_stream_ends(make: Make, keyed: bool | None) -> None:
    ended: list[str] = []
    worker, caller = await make(ended, keyed=keyed), await make()
    stream = caller.stream_message(Count(1000, 10), AGENT)
    assert await all_of(stream) == [*items(1000, 10), Sum(1)]
    assert await all_of(stream) == []  # it has ended
    assert ended == [""]
    await eventually(lambda: nothing_is_open(worker, caller))


async def test_what_an_ordinary_handler_returns_is_the_last_item(make: Make) -> None:
    ended: list[str] = []
    await make(ended)
    caller = await make()
    assert await all_of(caller.stream_message("a", AGENT)) == [Item(1, "a"), Item(2, "a"), Item(3, "a"), "last"]
    assert await caller.send_message("a", AGENT) == "last"
    assert ended == ["True"] * 3 + ["False"] * 3


async def test_a_plain_call_gets_the_last_item_of_a_streaming_handler(make: Make) -> None:
    await make([])
    caller = await make()
    assert await caller.send_message(Count(3), AGENT) == Sum(1)
    assert await caller.send_message(Count(3, what="nothing"), AGENT) == Item(3)
    assert await caller.send_message(Count(0, what="nothing"), AGENT) is None
    assert await all_of(caller.stream_message(Count(0, what="nothing"), AGENT)) == []


def is_short(message: Count, ctx: MessageContext) -> bool:
    return message.to < 10


def is_long(message: Count, ctx: MessageContext) -> bool:
    return not is_short(message, ctx)


class Chooses(RoutedAgent):
    @natsrt.streaming(match=is_short)
    async def one_by_one(self, message: Count, ctx: MessageContext) -> AsyncGenerator[Item | Sum, None]:
        for number in range(1, message.to + 1):
            yield Item(number)

    @natsrt.streaming(match=is_long)
    async def in_one(self, message: Count, ctx: MessageContext) -> AsyncGenerator[Item | Sum, None]:
        yield Sum(message.to)


async def test_match_chooses_between_streaming_handlers_of_one_type(make: Make) -> None:
    worker, caller = await make(), await make()
    await worker.register_factory("chooses", lambda: Chooses("chooses"), expected_class=Chooses)
    agent = AgentId("chooses", "k")
    assert await all_of(caller.stream_message(Count(3), agent)) == items(3)
    assert await all_of(caller.stream_message(Count(30), agent)) == [Sum(30)]
    assert await caller.send_message(Count(3), agent) == Item(3)
    assert await caller.send_message(Count(30), agent) == Sum(30)


async def test_a_streaming_handler_works_in_the_runtime_of_autogen() -> None:
    class Counts(RoutedAgent):
        @natsrt.streaming
        async def count(self, message: Count, ctx: MessageContext) -> AsyncGenerator[Item | Sum, None]:
            yield Item(1)
            yield Sum(1)

    runtime = SingleThreadedAgentRuntime()
    await Counts.register(runtime, "streams", lambda: Counts("counts"))
    runtime.start()
    assert await runtime.send_message(Count(3), AGENT) == Sum(1)
    assert not await natsrt.emit(Item(1))
    await runtime.stop_when_idle()


@KEYED
async def test_an_error_comes_after_the_items_before_it(make: Make, keyed: bool | None) -> None:
    await make([], keyed=keyed)
    caller = await make()
    received = []
    with pytest.raises(natsrt.RemoteAgentError, match="Odd: after the items"):
        async for item in caller.stream_message(Count(500, what="fail"), AGENT):
            received.append(item)
    assert received == items(500)


async def test_errors_of_calls_are_those_of_streams(make: Make) -> None:
    await make([])
    caller = await make(no_responders_retry=0.2)
    with pytest.raises(natsrt.UnknownAgentType):
        await all_of(caller.stream_message(Count(1), AgentId("nobody", "k")))
    with pytest.raises(natsrt.CannotSerialize):
        await all_of(caller.stream_message(object(), AGENT))
    with pytest.raises(natsrt.UnhandledMessage):
        await all_of(caller.stream_message(Sum(1), AGENT))


@pytest.mark.parametrize("size", [400_000, 3_000_000])
async def test_items_of_any_size_arrive_in_order(make: Make, size: int) -> None:
    await make([])
    caller = await make()
    assert await all_of(caller.stream_message(Count(5, size), AGENT)) == [*items(5, size), Sum(1)]


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": 1.5}, {"window_bytes": True}, {"window": 65_537}])
async def test_wrong_windows_are_refused(make: Make, wrong: dict[str, Any]) -> None:
    caller = await make()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        caller.stream_message(Count(1), AGENT, **wrong)
    with pytest.raises(ValueError, match="recipient"):
        caller.stream_message(Count(1), "streams/k")


def test_only_generators_can_stream() -> None:
    with pytest.raises(TypeError, match="asynchronous generator"):

        class Wrong(RoutedAgent):
            @natsrt.streaming
            async def on_text(self, message: str, ctx: MessageContext) -> AsyncIterator[str]:
                return all_of  # type: ignore[return-value]

    with pytest.raises(TypeError, match="AsyncGenerator"):

        class Unannotated(RoutedAgent):
            @natsrt.streaming
            async def on_text(self, message: str, ctx: MessageContext) -> str:  # type: ignore[misc]
                yield ""


async def test_a_thousand_streams_at_once(make: Make) -> None:
    worker, caller = await make([]), await make()
    streams = [caller.stream_message(Count(20), AgentId("streams", str(n % 50)), window=4) for n in range(1000)]
    for received in await asyncio.gather(*map(all_of, streams)):
        assert received[:-1] == items(20)
    await eventually(lambda: nothing_is_open(worker, caller))


# -- flow control ----------------------------------------------------------------------------------------------------


@KEYED
async def test_a_handler_is_at_most_a_window_ahead(make: Make, keyed: bool | None) -> None:
    agents: list[Streams] = []
    await make([], keyed=keyed, agents=agents)
    caller = await make()
    for window, size, ahead in (({"window": 10}, 0, 10), ({"window_bytes": 1000}, 400, 3)):
        async with caller.stream_message(Count(200, size), AGENT, **window) as stream:
            for taken in range(1, 101):
                await anext(stream)
                assert agents[0].sent <= taken + ahead + 1  # one is produced, and waits
            await eventually(lambda: agents[0].sent >= 100)
            assert agents[0].sent <= 101 + ahead


async def test_a_slow_consumer_loses_nothing(make: Make) -> None:
    await make([])
    caller = await make()
    received = []
    async for item in caller.stream_message(Count(40, 1000), AGENT, window=4):
        await asyncio.sleep(0.03)
        received.append(item)
    assert received[:-1] == items(40, 1000)


async def test_a_steady_stream_is_no_silent_caller(make: Make) -> None:
    """Half of its window takes longer than the time after which a caller is taken for dead."""
    await make([], stream_idle_timeout=1.0)
    caller = await make()
    assert await all_of(caller.stream_message(Count(50, pause=0.05), AGENT)) == [*items(50), Sum(1)]


async def test_a_consumer_that_is_cancelled_while_it_waits_loses_no_item(make: Make) -> None:
    class Slow(DefaultInterventionHandler):
        async def on_response(self, message: Any, *, sender: AgentId, recipient: AgentId | None) -> Any:
            await asyncio.sleep(0.02)
            return message

    await make([])
    caller = await make(intervention_handlers=[Slow()])
    received: list[Any] = []
    stream = caller.stream_message(Count(30), AGENT)
    with pytest.raises(StopAsyncIteration):
        while True:
            try:
                received.append(await asyncio.wait_for(anext(stream), 0.01))
            except TimeoutError:
                continue
    assert received == [*items(30), Sum(1)]


async def test_one_task_at_a_time_may_iterate(make: Make) -> None:
    await make([])
    caller = await make()
    async with caller.stream_message(Count(5, what="hang"), AGENT) as stream:
        for _ in range(5):
            await anext(stream)
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one task"):
            await anext(stream)
        closing = asyncio.ensure_future(stream.aclose())
        with pytest.raises(StopAsyncIteration):
            await first
        await closing


async def test_parts_that_never_come_end_the_stream(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    await make([], keep_replies=2.0)
    caller = await make(lost_after=0.3)
    receive = PartsReceived.receive

    def loses_the_second(self: PartsReceived[Any], number: int, item: Any, size: int) -> bool:
        return number != 2 and receive(self, number, item, size)

    monkeypatch.setattr(PartsReceived, "receive", loses_the_second)
    received = []
    with pytest.raises(natsrt.WorkerLost, match="parts of its reply are lost"):
        async for item in caller.stream_message(Count(5), AGENT):
            received.append(item)
    assert received == items(1)


async def test_a_stream_may_be_closed_while_it_waits_for_parts_after_its_reply(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make([])
    caller = await make()
    receive = PartsReceived.receive

    def loses_the_second(self: PartsReceived[Any], number: int, item: Any, size: int) -> bool:
        return number != 2 and receive(self, number, item, size)

    monkeypatch.setattr(PartsReceived, "receive", loses_the_second)
    stream = caller.stream_message(Count(5), AGENT)
    assert await anext(stream) == Item(1)
    second = asyncio.ensure_future(anext(stream))
    receiving = stream._receiving
    assert receiving is not None
    await eventually(receiving.call.done)
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await second


async def test_a_stream_may_be_closed_while_a_large_item_is_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    await make([])
    caller = await make()
    stream = caller.stream_message(Count(2, size=9_000_000), AGENT)
    assert await anext(stream) == Item(1, "x" * 9_000_000)
    loads = asyncio.Event()

    async def loads_for_ever(self: Replies, *_: Any) -> None:
        loads.set()
        await asyncio.sleep(LONG)

    monkeypatch.setattr(Replies, "load", loads_for_ever)
    second = asyncio.ensure_future(anext(stream))
    await loads.wait()
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):  # it was not cancelled itself
        await second


class Leaves(RoutedAgent):
    """Ends while a task that it has started sends a large item."""

    def __init__(self, sending: list[asyncio.Task[bool]]) -> None:
        super().__init__("leaves")
        self._sending = sending

    @rpc
    async def leave(self, message: str, ctx: MessageContext) -> str:
        self._sending.append(asyncio.ensure_future(natsrt.emit(Item(1, "x" * 9_000_000))))
        await asyncio.sleep(0)  # it begins to store the item
        return "last"


@KEYED
async def test_an_item_that_is_stored_when_its_handler_ends_is_not_sent(make: Make, keyed: bool | None) -> None:
    sending: list[asyncio.Task[bool]] = []
    worker, caller = await make(), await make()
    await worker.register_factory("leaves", lambda: Leaves(sending), expected_class=Leaves, keyed=keyed)
    assert await all_of(caller.stream_message("x", AgentId("leaves", "k"))) == ["last"]
    with pytest.raises(natsrt.StreamAbandoned, match="its handler has ended"):
        await sending[0]
    await eventually(lambda: nothing_is_open(worker, caller))


async def test_what_is_sent_after_a_block_begins_is_sent_after_its_call(make: Make) -> None:
    agents: list[Streams] = []
    await make([], keyed=True, agents=agents)
    caller = await make()
    await caller.send_message(Count(0), AGENT)
    async with caller.stream_message(Count(1), AGENT) as stream:
        later = asyncio.ensure_future(caller.send_message(Count(0), AGENT))
        assert await all_of(stream) == [Item(1), Sum(2)]
    assert await later == Sum(3)


# -- the end of the consumer -----------------------------------------------------------------------------------------


async def leave_block(stream: MessageStream) -> None:
    async with stream:
        async for item in stream:
            if item.number == 5:
                break


async def leave_loop(stream: MessageStream) -> None:
    async for item in stream:
        if item.number == 5:
            break


async def close(stream: MessageStream) -> None:
    await anext(stream)
    await stream.aclose()
    await stream.aclose()


async def raise_in_block(stream: MessageStream) -> None:
    with pytest.raises(ZeroDivisionError):
        async with stream:
            async for _ in stream:
                raise ZeroDivisionError


async def close_unstarted(stream: MessageStream) -> None:
    async with stream:
        pass


async def cancelled_consumer(stream: MessageStream) -> None:
    async def consume() -> None:
        async with stream:
            async for _ in stream:
                pass

    task = asyncio.ensure_future(consume())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@KEYED
@pytest.mark.parametrize("leave", [leave_block, leave_loop, close, raise_in_block, close_unstarted, cancelled_consumer])
@pytest.mark.parametrize("count", [Count(1_000_000), Count(5, what="hang")], ids=["busy", "hanging"])
async def test_the_handler_is_stopped_when_its_items_are_not_wanted(
    make: Make, keyed: bool | None, leave: Callable[[MessageStream], Any], count: Count
) -> None:
    ended: list[str] = []
    worker, caller = await make(ended, keyed=keyed), await make()
    stream = caller.stream_message(count, AGENT)
    await leave(stream)
    del stream
    gc.collect()
    if leave is close_unstarted and not ended:  # perhaps it never began
        await asyncio.sleep(0.5)
    await eventually(lambda: worker.running.dispatch.running == 0, timeout=3.0)
    assert ended in ([], ["GeneratorExit"], ["CancelledError"])
    await eventually(lambda: nothing_is_open(worker, caller))
    assert (await caller.send_message(Count(1), AGENT)).total > 0  # the agent is free


async def test_a_stream_whose_block_is_cancelled_while_it_begins_is_closed(make: Make) -> None:
    ended: list[str] = []
    worker, caller = await make(ended, keyed=True), await make()
    stream = caller.stream_message(Count(1_000_000), AGENT)

    async def consume() -> None:
        async with stream:
            pytest.fail("it was cancelled before")

    task = asyncio.ensure_future(consume())
    asyncio.get_running_loop().call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: worker.running.dispatch.running == 0 and nothing_is_open(worker, caller))
    assert await caller.send_message(Count(1), AGENT) == Sum(1)  # the agent is free
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@KEYED
async def test_a_token_ends_the_stream_and_its_handler(make: Make, keyed: bool | None) -> None:
    ended: list[str] = []
    worker, caller = await make(ended, keyed=keyed), await make()
    token = CancellationToken()
    received = []
    with pytest.raises(asyncio.CancelledError):
        async for item in caller.stream_message(Count(1_000_000), AGENT, cancellation_token=token):
            received.append(item)
            if item.number == 300:
                token.cancel()
    assert received == items(len(received)) and 300 <= len(received) < 1000
    await eventually(lambda: worker.running.dispatch.running == 0 and nothing_is_open(worker, caller))
    assert ended == ["GeneratorExit"]


async def test_leaving_a_stream_cancels_no_token_of_the_caller(make: Make) -> None:
    ended: list[str] = []
    worker, caller = await make(ended), await make()
    token = CancellationToken()
    async with caller.stream_message(Count(5, what="hang"), AGENT, cancellation_token=token) as stream:
        await anext(stream)
    await eventually(lambda: worker.running.dispatch.running == 0)
    assert ended == ["CancelledError"] and not token.is_cancelled()
    assert await caller.send_message(Count(0), AGENT, cancellation_token=token) == Sum(2)


async def test_a_token_that_is_cancelled_after_the_reply_ends_the_stream_too(make: Make) -> None:
    await make([])
    caller = await make()
    token = CancellationToken()
    stream = caller.stream_message(Count(3), AGENT, cancellation_token=token)
    await anext(stream)
    await asyncio.sleep(0.2)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await anext(stream)
    assert await all_of(stream) == []


class Odd(RoutedAgent):
    """Does at the end of its streams what makes them hard to stop."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__("odd")
        self.notes = notes
        self.tasks: list[asyncio.Task[Any]] = []

    @natsrt.streaming
    async def on_text(self, message: str, ctx: MessageContext) -> AsyncGenerator[Item, None]:
        if message == "callback":
            ctx.cancellation_token.add_callback(lambda: 1 / 0)
        elif message == "task":
            self.tasks.append(asyncio.ensure_future(self.emits_later()))
        yield Item(1)
        if message != "task":
            await asyncio.sleep(3600)

    async def emits_later(self) -> None:
        try:
            while True:
                await natsrt.emit(Item(2))
        except natsrt.StreamAbandoned:
            self.notes.append("told")

    async def save_state(self) -> dict[str, Any]:
        self.notes.append("saving")
        await asyncio.sleep(0.6)
        self.notes.append("saved")
        return {}

    async def load_state(self, state: Any) -> None:
        pass


@KEYED
@pytest.mark.parametrize("what", ["callback", "task", "nothing"])
async def test_odd_handlers_are_stopped_and_their_states_are_stored(make: Make, keyed: bool | None, what: str) -> None:
    notes: list[str] = []
    worker, caller = await make(), await make()
    await worker.register_factory("odd", lambda: Odd(notes), expected_class=Odd, keyed=keyed)
    async with caller.stream_message(what, AgentId("odd", "k"), window=1) as stream:
        await anext(stream)
    await eventually(lambda: worker.running.dispatch.running == 0, timeout=5.0)
    await eventually(lambda: nothing_is_open(worker, caller))
    if what == "task":
        await eventually(lambda: "told" in notes)
    if keyed:
        assert notes.count("saving") == notes.count("saved")


@pytest.mark.slow  # a caller is killed, and the worker must notice its silence
@pytest.mark.parametrize("count", [Count(1_000_000), Count(5, what="hang")], ids=["busy", "hanging"])
async def test_a_caller_that_vanishes_ends_the_handler(
    server: EmbeddedServer, namespace: str, make: Make, processes: Processes, count: Count
) -> None:
    ended: list[str] = []
    worker = await make(ended, stream_idle_timeout=3.0)
    caller = processes.python(
        f"""
import asyncio
from natsrt import NatsAgentRuntime
from autogen_core import AgentId
from tests.programs.stream_worker import Count
async def main():
    async with NatsAgentRuntime({server.url!r}, namespace={namespace!r}) as runtime:
        async for item in runtime.stream_message({count!r}, AgentId("streams", "k")):
            print(item, flush=True)
            await asyncio.sleep(0.01)
asyncio.run(main())
""",
        name="caller",
    )
    await caller.wait_for_line("number=5", LONG)
    await asyncio.sleep(4.0)
    assert worker.running.dispatch.running == 1  # it is slow, and lives
    caller.kill()
    await eventually(lambda: worker.running.dispatch.running == 0, timeout=LONG)
    assert ended in (["GeneratorExit"], ["CancelledError"])


# -- the end of the worker -------------------------------------------------------------------------------------------


@pytest.mark.slow  # a worker is killed
@pytest.mark.parametrize("keyed", ["", "keyed"])
async def test_what_had_arrived_comes_before_the_loss_of_the_worker(
    server: EmbeddedServer, namespace: str, make: Make, processes: Processes, keyed: str
) -> None:
    worker = processes.python(PROGRAM, server.url, namespace, "w", keyed)
    await worker.wait_for_line("ready", LONG)
    caller = await make()
    received = []
    with pytest.raises(natsrt.WorkerLost):
        async for item in caller.stream_message(Count(1_000_000), AGENT):
            received.append(item)
            if item.number == 1000:
                worker.kill()
    assert received == items(len(received)) and len(received) >= 1000


@pytest.mark.slow  # a worker is frozen for longer than a caller may be silent
@pytest.mark.parametrize("keyed", ["", "keyed"])
async def test_a_worker_that_was_frozen_does_not_take_its_callers_for_silent(
    server: EmbeddedServer, namespace: str, make: Make, processes: Processes, keyed: str
) -> None:
    settings = {"NATSRT_STREAM_IDLE_TIMEOUT": "1.5"}
    worker = processes.python(PROGRAM, server.url, namespace, "w", keyed, env=settings)
    await worker.wait_for_line("ready", LONG)
    caller = await make()
    received = []
    async for item in caller.stream_message(Count(200, pause=0.01), AGENT):
        received.append(item)
        if item == Item(50):
            worker.pause()
            await asyncio.sleep(3.0)
            worker.resume()
    assert received == [*items(200), Sum(1)]


@pytest.mark.slow  # a worker stops in mid-stream
@pytest.mark.parametrize("keyed", ["", "keyed"])
async def test_a_worker_that_is_asked_to_stop_finishes_its_streams(
    server: EmbeddedServer, namespace: str, make: Make, processes: Processes, keyed: str
) -> None:
    worker = processes.python(PROGRAM, server.url, namespace, "w", keyed)
    await worker.wait_for_line("ready", LONG)
    caller = await make()
    received = []
    async for item in caller.stream_message(Count(100, 100, 0.02), AGENT):
        received.append(item)
        if item == Item(10, "x" * 100):
            worker.terminate()
    assert received == [*items(100, 100), Sum(1)]
    assert await worker.wait() == 0


@KEYED
async def test_a_caller_that_stops_ends_its_streams(make: Make, keyed: bool | None) -> None:
    ended: list[str] = []
    worker, caller = await make(ended, keyed=keyed), await make()
    stream = caller.stream_message(Count(1_000_000), AGENT)
    await anext(stream)
    await caller.close()
    with pytest.raises(natsrt.WorkerLost, match="this runtime was stopped"):
        await all_of(stream)
    await eventually(lambda: worker.running.dispatch.running == 0)


# -- connections that are lost ---------------------------------------------------------------------------------------


@pytest.mark.slow  # connections are cut again and again
@pytest.mark.parametrize("seed", range(6))
async def test_over_links_that_are_cut_every_stream_is_complete_and_in_order(
    server: EmbeddedServer, make: Make, seed: int
) -> None:
    choose = random.Random(seed)
    settings = {"reconnect_wait": 0.05}
    async with Proxy(server.url) as near, Proxy(server.url) as far:
        worker = await make([], url=far.url, keyed=seed % 2 == 1 or None, **settings)
        caller = await make(url=near.url, **settings)
        await caller.send_message(Count(0), AGENT)
        async with cut_again_and_again(choose, near, far):
            for number in range(5):
                window = choose.choice([2, 10, 256])
                agent = AgentId("streams", f"k{number}")
                count = Count(300 if window == 2 else 2000, choose.choice([0, 2000]), choose.choice([0.0, 0.001]))
                async with asyncio.timeout(60):
                    received = await all_of(caller.stream_message(count, agent, window=window))
                assert received == [*items(count.to, count.size), Sum(1)], f"stream {number}"
        for runtime in (caller, worker):  # before their links end
            await runtime.close()


@pytest.mark.slow  # a server restarts
async def test_a_stream_goes_on_after_a_restart_of_the_server(own_server: EmbeddedServer, make: Make) -> None:
    await make([], url=own_server.url)
    caller = await make(url=own_server.url)
    received = []
    async for item in caller.stream_message(Count(300, 100, 0.005), AGENT):
        received.append(item)
        if item == Item(100, "x" * 100):
            await own_server.restart(kill=True)
    assert received == [*items(300, 100), Sum(1)]


class Stubborn(RoutedAgent):
    """Sends three items when it is ``free``, and ignores that it is cancelled until it is ``released``."""

    free = asyncio.Event()
    released = asyncio.Event()

    def __init__(self) -> None:
        super().__init__("stubborn")

    @rpc
    async def send(self, message: str, ctx: MessageContext) -> str:
        await self.free.wait()
        for number in range(1, 4):
            await natsrt.emit(Item(number))
        while not self.released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.released.wait()
        return "last"


@pytest.fixture
def stubborn() -> Iterator[type[Stubborn]]:
    """An agent whose handlers are released at the end of the test."""
    Stubborn.free, Stubborn.released = asyncio.Event(), asyncio.Event()
    yield Stubborn
    Stubborn.released.set()


async def test_after_a_reconnect_nothing_is_sent_again_to_a_caller_that_is_gone(
    server: EmbeddedServer, make: Make, stubborn: type[Stubborn]
) -> None:
    heard: list[bytes] = []

    async def hear(message: Msg) -> None:
        heard.append(message.data)

    async with Proxy(server.url) as near, Proxy(server.url) as far:
        worker = await make([], url=far.url, stream_idle_timeout=1.0, reconnect_wait=0.05, drain_timeout=0.5)
        caller = await make(url=near.url)
        await worker.register_factory("stubborn", stubborn, expected_class=stubborn)
        tap = await nats.connect(server.url)
        stream = caller.stream_message("x", AgentId("stubborn", "k"))
        async with stream:
            receiving = stream._receiving
            assert receiving is not None
            await tap.subscribe(receiving.parts_to, cb=hear)
            await tap.flush()
            await eventually(lambda: worker.running.dispatch.running == 1)
            near.cut()
            stubborn.free.set()  # its items reach nobody
            (sent,) = worker.running.incoming.streams._streams.values()
            await eventually(lambda: sent.stopping.is_abandoned)
            await tap.flush()
            assert len(heard) >= 3 and sent.stopping.ended_at is None
            before, reconnects = len(heard), worker.running.network.connection.reconnects
            far.cut()
            await far.restore()
            await eventually(lambda: worker.running.network.connection.reconnects > reconnects)
            await worker.running.network.connection.round_trip(LONG)
            await tap.flush()
            assert len(heard) == before
            await near.restore()
        await tap.close()
        stubborn.released.set()
        for runtime in (caller, worker):  # before their links end
            await runtime.close()


# -- keyed agents ----------------------------------------------------------------------------------------------------


async def test_a_stream_holds_the_turn_of_a_keyed_agent_and_its_state_is_stored(make: Make) -> None:
    first, second = await make([], keyed=True), await make([], keyed=True)
    caller = await make()
    async with caller.stream_message(Count(5, what=""), AGENT, window=1) as stream:
        await anext(stream)
        other = asyncio.ensure_future(caller.send_message(Count(0), AGENT))
        await asyncio.sleep(0.3)
        assert not other.done()
        await all_of(stream)
    assert await other == Sum(2)
    for worker in (first, second):
        if worker.running.ownership.owns_some:
            await worker.stop()
    assert await all_of(caller.stream_message(Count(1), AGENT)) == [Item(1), Sum(3)]


class Crossing(RoutedAgent):
    """Streams from the agent of the other key, whose handlers call back, and notes who is inside."""

    def __init__(self, runtime: NatsAgentRuntime, notes: list[str]) -> None:
        super().__init__("crossing")
        self._runtime = runtime
        self._notes = notes

    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        if message == "nested":
            self._notes.append("nested begins")
            await asyncio.sleep(0.3)
            self._notes.append("nested ends")
            return "nested"
        other = AgentId("crossing", "b" if self.id.key == "a" else "a")
        async for item in self._runtime.stream_message(Count(3, what=message), other):
            self._notes.append(f"item {item.number}")
        return "done"

    @natsrt.streaming
    async def count(self, message: Count, ctx: MessageContext) -> AsyncGenerator[Item, None]:
        other = AgentId("crossing", "b" if self.id.key == "a" else "a")
        if message.what == "back":
            task = asyncio.ensure_future(self._runtime.send_message("nested", other))
            await asyncio.sleep(0.1)
        for number in range(1, message.to + 1):
            yield Item(number)
        if message.what == "back":
            await task


async def test_an_item_waits_for_a_handler_that_was_let_in_meanwhile(make: Make) -> None:
    notes: list[str] = []
    worker = await make()
    await worker.register_factory("crossing", lambda: Crossing(worker, notes), expected_class=Crossing, keyed=True)
    async with asyncio.timeout(LONG):
        assert await worker.send_message("back", AgentId("crossing", "a")) == "done"
    assert notes == ["nested begins", "nested ends", "item 1", "item 2", "item 3"]


async def test_streams_that_cross_are_a_deadlock_and_not_a_hang(make: Make) -> None:
    worker = await make()
    await worker.register_factory("crossing", lambda: Crossing(worker, []), expected_class=Crossing, keyed=True)
    agents = [AgentId("crossing", key) for key in ("a", "b")]
    async with asyncio.timeout(LONG):
        ends = await asyncio.gather(*(worker.send_message("x", agent) for agent in agents), return_exceptions=True)
    assert {type(end) for end in ends} <= {natsrt.Deadlock, str}, ends


# -- beside the stream -----------------------------------------------------------------------------------------------


async def test_interventions_see_the_message_once_and_each_item(make: Make) -> None:
    seen: list[Any] = []

    class Watch(DefaultInterventionHandler):
        async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
            seen.append(message)
            return Count(3)

        async def on_response(self, message: Any, *, sender: AgentId, recipient: AgentId | None) -> Any:
            seen.append(message)
            return message

    await make([])
    caller = await make(intervention_handlers=[Watch()])
    received = await all_of(caller.stream_message(Count(99), AGENT))
    assert received == [*items(3), Sum(1)] and seen == [Count(99), *received]


async def test_one_span_is_the_whole_stream_and_never_current_between_items(make: Make) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    await make([], tracer_provider=provider)
    caller = await make(tracer_provider=provider)
    with provider.get_tracer("test").start_as_current_span("outer") as outer:
        async for _ in caller.stream_message(Count(3), AGENT):
            with provider.get_tracer("test").start_as_current_span("consumer") as inner:
                assert inner.parent == outer.get_span_context()  # type: ignore[attr-defined]
    names = [span.name.split()[0] for span in exporter.get_finished_spans()]
    assert names.count("send") == 1 and names.count("process") == 1


async def test_parts_are_not_published_where_replies_are_not(namespace: str, make: Make) -> None:
    await make([])
    caller = await make()
    for parts_to in (f"{namespace}.topic.x", "$JS.API.x", "a b", "x.*", ""):
        call = Call(Count(1), AGENT, None, None, None, None)
        call.more = f',"partsto":"{parts_to}","window":"1","windowbytes":"1"'
        with pytest.raises(natsrt.CannotDecode, match="partsto"):
            await caller.running.outgoing.calls.send(call)


async def test_parts_of_calls_that_are_forwarded_go_to_the_caller(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    await make([], keyed=True)
    await make([], keyed=True)
    caller = await make()
    monkeypatch.setattr(caller.running.outgoing.calls._owners, "owner_of", lambda agent: None)
    for number in range(8):
        agent = AgentId("streams", str(number))
        for turn in (1, 2, 3):
            assert await all_of(caller.stream_message(Count(300), agent)) == [*items(300), Sum(turn)]
        async with caller.stream_message(Count(1_000_000), agent) as stream:
            await anext(stream)
        assert (await caller.send_message(Count(1), agent)).total > 0
