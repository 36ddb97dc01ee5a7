"""Messages before the start, one message at a time, and stopping at a condition: as the guides of AutoGen do it."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from autogen_core import (
    AgentId,
    CancellationToken,
    DefaultInterventionHandler,
    DefaultTopicId,
    MessageContext,
    RoutedAgent,
    SingleThreadedAgentRuntime,
    TopicId,
    default_subscription,
    event,
    message_handler,
    type_subscription,
)

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotSerialize, ServerUnreachable, UndeliveredCall
from tests.conformance.conftest import IN_PROCESS, ONE, MakeRuntime
from tests.conformance.samples import Number, Recorder, Seen, Text, Waiter, contents

RECORDER = AgentId("recorder", "k")
NEWS = TopicId("news", "k")
Make = Callable[..., Any]


@type_subscription("news")
class NewsRecorder(Recorder):
    pass


@default_subscription
class Countdown(RoutedAgent):
    """Publishes the next lower number, until 0."""

    def __init__(self, handled: list[int]) -> None:
        super().__init__("counts down")
        self.handled = handled

    @event
    async def count(self, message: Number, ctx: MessageContext) -> None:
        self.handled.append(message.value)
        if message.value > 0:
            # Not to itself: an agent does not get its own events.
            await self.publish_message(Number(message.value - 1), DefaultTopicId(source=f"at {message.value - 1}"))


@default_subscription
class Failing(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("fails")

    @event
    async def fail(self, message: Text, ctx: MessageContext) -> None:
        raise ValueError(message.content)


async def steps_until(runtime: Any, done: Callable[[], bool]) -> None:
    """Process what waits, one message at a time, until ``done()``."""
    async with asyncio.timeout(30):
        while not done():
            if runtime.unprocessed_messages_count:
                await runtime.process_next()
            else:
                await asyncio.sleep(0.001)


@pytest.fixture(params=[ONE, IN_PROCESS])
async def make(request: pytest.FixtureRequest, make_runtime: MakeRuntime) -> AsyncIterator[Make]:
    """Makes a runtime of either kind, not started."""
    in_process: list[SingleThreadedAgentRuntime] = []

    def make(**settings: Any) -> Any:
        if request.param == ONE:
            return make_runtime(**settings)
        in_process.append(SingleThreadedAgentRuntime(**settings))
        return in_process[-1]

    yield make
    for runtime in in_process:
        await runtime.close()


@pytest.fixture
async def runtime(make: Make) -> Any:
    return make()


# -- waiting for the start -------------------------------------------------------------------------------------------


async def test_events_that_are_published_before_the_start_are_handled_after_it_in_order(runtime: Any) -> None:
    seen: list[Seen] = []
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    for number in range(20):
        await runtime.publish_message(Text(f"{number}"), NEWS)
    assert runtime.unprocessed_messages_count == 20
    runtime.start()
    await runtime.stop_when_idle()
    assert contents(seen) == [f"{number}" for number in range(20)]
    assert runtime.unprocessed_messages_count == 0


async def test_a_call_that_is_made_before_the_start_is_answered_after_it(runtime: Any) -> None:
    await Recorder.register(runtime, "recorder", lambda: Recorder([]))
    call = asyncio.create_task(runtime.send_message(Text("early"), RECORDER))
    await asyncio.sleep(0)
    assert runtime.unprocessed_messages_count == 1
    assert not call.done()
    runtime.start()
    assert await call == Text("k got early")
    await runtime.stop()


async def test_what_is_sent_right_after_the_start_comes_after_what_waited(runtime: Any) -> None:
    seen: list[Seen] = []
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    await runtime.publish_message(Text("event 1"), NEWS)
    call = asyncio.create_task(runtime.send_message(Text("call 2"), RECORDER))
    await asyncio.sleep(0)
    await runtime.publish_message(Text("event 3"), NEWS)
    runtime.start()
    await runtime.publish_message(Text("event 4"), NEWS)
    await runtime.send_message(Text("call 5"), RECORDER)
    await call
    await runtime.stop_when_idle()
    assert contents(seen) == ["event 1", "call 2", "event 3", "event 4", "call 5"]


async def test_interventions_see_what_waited_and_may_send_themselves(make: Make) -> None:
    seen: list[Seen] = []

    class Doubling(DefaultInterventionHandler):
        async def on_publish(self, message: Any, *, message_context: MessageContext) -> Any:
            if not message.content.startswith("copy"):
                await runtime.publish_message(Text(f"copy of {message.content}"), NEWS)
            return message

    runtime = make(intervention_handlers=[Doubling()])
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    for number in range(3):
        await runtime.publish_message(Text(f"{number}"), NEWS)
    runtime.start()
    async with asyncio.timeout(20):
        await runtime.stop_when_idle()
    assert sorted(contents(seen)) == sorted(f"{copy}{number}" for copy in ("", "copy of ") for number in range(3))
    assert [text for text in contents(seen) if "copy" not in text] == ["0", "1", "2"]


async def test_stopping_before_the_start_is_a_runtime_error_and_what_waits_goes_on_waiting(runtime: Any) -> None:
    seen: list[Seen] = []
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    await runtime.publish_message(Text("waits"), NEWS)
    for stop in (runtime.stop, runtime.stop_when_idle):
        with pytest.raises(RuntimeError, match="not started"):
            await stop()
    with pytest.raises(RuntimeError, match="not started"):
        await runtime.stop_when(lambda: True)
    runtime.start()
    await runtime.stop_when_idle()
    assert contents(seen) == ["waits"]


async def test_what_cannot_be_sent_is_refused_at_once_and_does_not_wait(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    with pytest.raises(CannotSerialize):
        await runtime.publish_message(object(), NEWS)
    with pytest.raises(CannotSerialize):
        await runtime.send_message(object(), RECORDER)
    assert runtime.unprocessed_messages_count == 0


async def test_an_intervention_may_replace_what_could_not_be_sent(make_runtime: MakeRuntime) -> None:
    class Replacing(DefaultInterventionHandler):
        async def on_publish(self, message: Any, *, message_context: MessageContext) -> Any:
            return Text("replaced")

    seen: list[Seen] = []
    runtime = make_runtime(intervention_handlers=[Replacing()])
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    await runtime.publish_message(object(), NEWS)
    runtime.start()
    await runtime.stop_when_idle()
    assert contents(seen) == ["replaced"]


async def test_no_more_than_max_pending_bytes_wait_and_the_error_says_what_to_do(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(max_pending_bytes=10_000)
    with pytest.raises(RuntimeError, match=r"max_pending_bytes.*call start\(\) first"):
        for _ in range(100):
            await runtime.publish_message(Text("x" * 500), NEWS)
    waiting = runtime.unprocessed_messages_count
    assert 5 < waiting < 20
    calls = [asyncio.create_task(runtime.send_message(Text(""), RECORDER)) for _ in range(20)]
    done, refused = await asyncio.wait(calls, timeout=0.1)
    assert done and all(isinstance(call.exception(), RuntimeError) for call in done)
    for call in refused:
        call.cancel()
    await asyncio.wait(calls)
    assert runtime.unprocessed_messages_count == waiting  # a call that is given up does not wait any more


async def test_a_token_ends_a_call_that_waits_for_the_start(make_runtime: MakeRuntime) -> None:
    runtime, token = make_runtime(), CancellationToken()
    call = asyncio.create_task(runtime.send_message(Text("a"), RECORDER, cancellation_token=token))
    await asyncio.sleep(0)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert runtime.unprocessed_messages_count == 0


async def test_closing_without_a_start_ends_the_calls_and_names_the_events(
    make_runtime: MakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = make_runtime()
    call = asyncio.create_task(runtime.send_message(Text("a"), RECORDER))
    await asyncio.sleep(0)
    await runtime.publish_message(Text("b"), NEWS)
    await runtime.close()
    with pytest.raises(UndeliveredCall):
        await call
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "the runtime was closed before it was started: 1 events were not sent"
    ]
    with pytest.raises(RuntimeError, match="not started"):
        await runtime.publish_message(Text("c"), NEWS)


async def test_a_runtime_that_is_dropped_without_a_start_leaves_no_warning(
    server: EmbeddedServer, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    runtime = NatsAgentRuntime(server.url)
    call = asyncio.create_task(runtime.send_message(Text("a"), RECORDER))
    await runtime.publish_message(Text("b"), NEWS)
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait({call})
    del runtime, call
    gc.collect()
    await asyncio.sleep(0)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(warning.message) for warning in recwarn] == []


async def test_a_start_that_fails_fails_the_calls_that_waited_and_keeps_the_events(own_server: EmbeddedServer) -> None:
    url = own_server.url
    await own_server.stop()
    seen: list[Seen] = []
    runtime = NatsAgentRuntime(url, connect_timeout=0.3)
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    await runtime.publish_message(Text("1"), NEWS)
    call = asyncio.create_task(runtime.send_message(Text("call"), RECORDER))
    await asyncio.sleep(0)
    await runtime.publish_message(Text("2"), NEWS)
    for _ in range(2):
        with pytest.raises(ServerUnreachable):
            await runtime.start()
    with pytest.raises(ServerUnreachable):
        await call
    assert runtime.unprocessed_messages_count == 2
    await own_server.start()
    await runtime.start()
    await runtime.stop_when_idle()
    assert contents(seen) == ["1", "2"]
    with pytest.raises(RuntimeError, match="not started"):  # as after any stop
        await runtime.send_message(Text("late"), RECORDER)
    await runtime.close()


# -- one message at a time -------------------------------------------------------------------------------------------


async def test_messages_are_processed_one_by_one_without_a_start(runtime: Any) -> None:
    handled: list[int] = []
    await Countdown.register(runtime, "countdown", lambda: Countdown(handled))
    await runtime.publish_message(Number(5), DefaultTopicId())
    await steps_until(runtime, lambda: len(handled) == 6)
    assert handled == [5, 4, 3, 2, 1, 0]


async def test_a_handler_has_begun_when_its_step_returns(make_runtime: MakeRuntime) -> None:
    handled: list[int] = []
    runtime = make_runtime()
    await Countdown.register(runtime, "countdown", lambda: Countdown(handled))
    await runtime.publish_message(Number(5), DefaultTopicId())
    steps = 0
    while runtime.unprocessed_messages_count:
        assert len(handled) == steps
        await runtime.process_next()
        steps += 1
    assert handled == [5, 4, 3, 2, 1, 0]


async def test_nothing_is_processed_between_two_steps(runtime: Any) -> None:
    seen: list[Seen] = []
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    for number in range(3):
        await runtime.publish_message(Text(f"{number}"), NEWS)
    for number in range(3):
        assert runtime.unprocessed_messages_count == 3 - number
        await runtime.process_next()
        await asyncio.sleep(0.05)
        assert contents(seen) == [f"{n}" for n in range(number + 1)]
    assert runtime.unprocessed_messages_count == 0


async def test_a_call_and_the_calls_of_its_handler_are_processed_in_a_loop(runtime: Any) -> None:
    class Asking(RoutedAgent):
        @message_handler
        async def ask(self, message: Text, ctx: MessageContext) -> Text:
            answer: Text = await self.send_message(message, RECORDER)
            return Text(f"asked: {answer.content}")

    await Recorder.register(runtime, "recorder", lambda: Recorder([]))
    await runtime.register_factory("asking", lambda: Asking("asks"), expected_class=Asking)
    call = asyncio.create_task(runtime.send_message(Text("a"), AgentId("asking", "k")))
    await steps_until(runtime, call.done)
    assert await call == Text("asked: k got a")
    if isinstance(runtime, NatsAgentRuntime):  # in process, the step after the last one would not return
        call = asyncio.create_task(runtime.send_message(Text("b"), AgentId("asking", "k")))
        async with asyncio.timeout(30):
            while not call.done():
                await runtime.process_next()
        assert await call == Text("asked: k got b")


async def test_the_error_of_an_event_handler_is_raised_by_the_next_step_and_only_there(make: Make) -> None:
    runtime = make(ignore_unhandled_exceptions=False)
    await Failing.register(runtime, "failing", Failing)
    await runtime.publish_message(Text("wrong"), DefaultTopicId())
    await runtime.process_next()
    await asyncio.sleep(0.05)
    with pytest.raises(ValueError, match="wrong"):
        await runtime.process_next()
    await runtime.close()


async def test_a_start_after_some_steps_lets_the_rest_go(runtime: Any) -> None:
    seen: list[Seen] = []
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    for number in range(10):
        await runtime.publish_message(Text(f"{number}"), NEWS)
    for _ in range(3):
        await runtime.process_next()
    await steps_until(runtime, lambda: len(seen) >= 3)
    with pytest.raises(RuntimeError, match="not started"):
        await runtime.stop_when_idle()
    runtime.start()
    with pytest.raises(RuntimeError, match="already started"):
        runtime.start()
    await runtime.publish_message(Text("10"), NEWS)
    await runtime.stop_when_idle()
    assert contents(seen) == [f"{number}" for number in range(11)]


async def test_a_step_of_a_started_runtime_returns(runtime: Any) -> None:
    handled: list[int] = []
    await Countdown.register(runtime, "countdown", lambda: Countdown(handled))
    runtime.start()
    await runtime.publish_message(Number(0), DefaultTopicId())
    async with asyncio.timeout(10):
        await runtime.process_next()
        await runtime.stop_when_idle()
    assert handled == [0]


async def test_a_step_with_nothing_to_do_returns(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    async with asyncio.timeout(10):
        await runtime.process_next()
        await runtime.publish_message(Text("nobody hears it"), NEWS)
        await runtime.process_next()
    assert runtime.unprocessed_messages_count == 0
    assert runtime.worker_id is not None
    await runtime.stop()
    assert runtime.worker_id is None


@pytest.mark.parametrize("keyed", [False, True])
async def test_calls_of_other_runtimes_wait_for_a_step(make_runtime: MakeRuntime, keyed: bool) -> None:
    stepped, caller = make_runtime(), make_runtime()
    seen: list[Seen] = []
    await stepped.register_factory("recorder", lambda: Recorder(seen), expected_class=Recorder, keyed=keyed)
    await stepped.process_next()
    await caller.start()
    call = asyncio.create_task(caller.send_message(Text("a"), RECORDER))
    async with asyncio.timeout(10):
        while not stepped.unprocessed_messages_count:
            await asyncio.sleep(0.01)
        assert not seen
        await stepped.process_next()
        assert await call == Text("k got a")


async def test_what_waits_for_a_step_is_finished_by_a_stop(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    seen: list[Seen] = []
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    for number in range(3):
        await runtime.publish_message(Text(f"{number}"), NEWS)
    await runtime.process_next()
    async with asyncio.timeout(10):
        await runtime.stop()
    assert contents(seen) == ["0", "1", "2"]


# -- stopping at a condition -----------------------------------------------------------------------------------------


@dataclass
class Termination:
    reason: str


class TerminationHandler(DefaultInterventionHandler):
    """As in AutoGen's guide, "Termination using Intervention Handler"."""

    def __init__(self) -> None:
        self.termination: Termination | None = None

    async def on_publish(self, message: Any, *, message_context: MessageContext) -> Any:
        if isinstance(message, Termination):
            self.termination = message
        return message


@default_subscription
class Worker(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("works three times")
        self.received = 0

    @message_handler
    async def work(self, message: Text, ctx: MessageContext) -> None:
        self.received += 1
        if self.received > 3:
            await self.publish_message(Termination("reached maximum number of messages"), DefaultTopicId())


async def test_a_runtime_stops_when_an_intervention_has_seen_the_termination(make: Make) -> None:
    handler = TerminationHandler()
    runtime = make(intervention_handlers=[handler])
    await Worker.register(runtime, "worker", Worker)
    runtime.start()
    for text in "abcd":
        await runtime.publish_message(Text(text), DefaultTopicId())
    async with asyncio.timeout(20):
        await runtime.stop_when(lambda: handler.termination is not None)
    assert handler.termination == Termination("reached maximum number of messages")
    with pytest.raises(RuntimeError):
        await runtime.stop()


async def test_stop_when_stops_at_once_if_the_condition_is_true(runtime: Any) -> None:
    runtime.start()
    await runtime.stop_when(lambda: True)
    with pytest.raises(RuntimeError, match="not started"):
        await runtime.stop()


async def test_an_error_of_the_condition_is_raised_and_the_runtime_goes_on(runtime: Any) -> None:
    runtime.start()
    with pytest.raises(ZeroDivisionError):
        await runtime.stop_when(lambda: 1 // 0 == 0)
    await runtime.stop()


async def test_stop_when_returns_if_somebody_else_stops_the_runtime(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    await runtime.start()
    waiting = asyncio.create_task(runtime.stop_when(lambda: False))
    await asyncio.sleep(0)
    await runtime.stop()
    await asyncio.wait_for(waiting, 5)


async def test_stop_when_finishes_the_handlers_that_run(make_runtime: MakeRuntime) -> None:
    entered, release, log = asyncio.Event(), asyncio.Event(), list[MessageContext]()
    runtime, caller = make_runtime(), make_runtime()
    await Waiter.register(runtime, "waiter", lambda: Waiter(entered, release, log))
    await runtime.start()
    await caller.start()
    call = asyncio.create_task(caller.send_message(Text("a"), AgentId("waiter", "k")))
    await entered.wait()
    stopping = asyncio.create_task(runtime.stop_when(lambda: True))
    await asyncio.sleep(0)
    release.set()
    await stopping
    assert await call == Text("a")


async def test_what_is_published_between_two_steps_counts_until_it_is_handled(make: Make) -> None:
    runtime, seen = make(), list[Seen]()
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    for number in range(12):
        await runtime.publish_message(Text(str(number)), NEWS)
        if number % 3 == 2:
            await runtime.process_next()
    while runtime.unprocessed_messages_count:
        await runtime.process_next()
    await asyncio.sleep(0.1)
    assert contents(seen) == [str(number) for number in range(12)]


@pytest.mark.parametrize("way", ["stop_when_signal", "stop_when", "wait_until_stopped"])
async def test_a_start_that_is_not_awaited_and_fails_is_raised_by_what_waits_for_the_end(
    way: str,
) -> None:
    runtime = NatsAgentRuntime("nats://127.0.0.1:9", connect_timeout=0.3)
    runtime.start()  # type: ignore[unused-coroutine]
    waits = {
        "stop_when_signal": runtime.stop_when_signal,
        "stop_when": lambda: runtime.stop_when(lambda: False),
        "wait_until_stopped": runtime.wait_until_stopped,
    }
    with pytest.raises(ServerUnreachable):
        await waits[way]()
