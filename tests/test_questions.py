"""Questions of handlers to their callers: `natsrt.ask` and ``on_question``."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nats
import pytest
from autogen_core import (
    AgentId,
    CancellationToken,
    DefaultInterventionHandler,
    DropMessage,
    MessageContext,
    RoutedAgent,
    SingleThreadedAgentRuntime,
    TopicId,
    TypeSubscription,
    message_handler,
    rpc,
)
from autogen_core.exceptions import MessageDroppedException

import natsrt
from benchmarks.chaos.proxy import Proxy
from natsrt import NatsAgentRuntime, NobodyToAsk
from natsrt.embedded import EmbeddedServer
from tests.programs import question_worker
from tests.programs.question_worker import Answer, Answered, Ask, Asking, Question, Touch
from tests.programs.stream_worker import Item, Odd
from tests.support.cuts import cut_again_and_again
from tests.support.processes import Processes, eventually

PROGRAM = Path(question_worker.__file__)
AGENT = AgentId("asking", "k")
Make = Callable[..., Any]
QUESTIONS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors/streams.json").read_text())["questions"]
KEYED = pytest.mark.parametrize("keyed", [None, True], ids=["plain", "keyed"])


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    """Starts runtimes. ``notes``: workers of the type ``asking``, which note there what became of their questions."""
    async with AsyncExitStack() as stack:

        async def runtime(
            notes: list[str] | None = None, *, url: str = server.url, keyed: bool | None = None, **settings: Any
        ) -> NatsAgentRuntime:
            made = NatsAgentRuntime(url, namespace=namespace, **settings)
            if notes is not None:
                await made.register_factory("asking", lambda: Asking(notes), expected_class=Asking, keyed=keyed)
            return await stack.enter_async_context(made)

        yield runtime


async def answer(question: Question) -> Answer:
    await asyncio.sleep(0)
    return Answer(question.number * 10, "a" * len(question.text))


def nothing_is_open(*runtimes: NatsAgentRuntime) -> bool:
    return not any(
        runtime.running.outgoing.streams._open or runtime.running.incoming.streams._streams for runtime in runtimes
    )


@KEYED
@pytest.mark.parametrize("function", [answer, lambda question: Answer(question.number * 10)], ids=["async", "plain"])
async def test_a_handler_gets_the_callers_answers(make: Make, keyed: bool | None, function: Any) -> None:
    notes: list[str] = []
    worker, caller = await make(notes, keyed=keyed), await make()
    assert await caller.send_message(Ask(3), AGENT, on_question=function) == Answered([10, 20, 30])
    assert notes == ["False"] * 3  # this caller wants no items
    await eventually(lambda: nothing_is_open(worker, caller))


@KEYED
async def test_a_question_comes_after_the_items_before_it(make: Make, keyed: bool | None) -> None:
    await make([], keyed=keyed)
    caller = await make()
    seen: list[Any] = []

    def on_question(question: Question) -> Answer:
        seen.append(question)
        return Answer(7)

    async for item in caller.stream_message("items", AGENT, on_question=on_question):
        seen.append(item)
    assert seen == [Item(1), Question(1), Item(2), Answered([7])]


async def test_a_call_within_one_runtime_can_be_asked_too(make: Make) -> None:
    runtime = await make([])
    assert await runtime.send_message(Ask(), AGENT, on_question=answer) == Answered([10])


async def test_questions_may_be_open_at_the_same_time_and_are_answered_in_any_order(make: Make) -> None:
    await make([])
    caller = await make()
    gates = [asyncio.Event() for _ in range(5)]

    async def on_question(question: Question) -> Answer:
        gates[question.number - 1].set()
        await asyncio.gather(*(gate.wait() for gate in gates))
        await asyncio.sleep(random.random() / 20)
        return Answer(question.number)

    asked = caller.send_message(Ask(5, what="together"), AGENT, on_question=on_question)
    assert await asyncio.wait_for(asked, 20) == Answered([1, 2, 3, 4, 5])


@pytest.mark.parametrize("stream", [True, False])
async def test_without_on_question_the_handler_is_told_at_once(make: Make, stream: bool) -> None:
    notes: list[str] = []
    await make(notes)
    caller = await make()
    with pytest.raises(NobodyToAsk, match="asking/k: its caller gave no on_question") as raised:
        if stream:
            assert [item async for item in caller.stream_message(Ask(), AGENT)] == []
        else:
            await caller.send_message(Ask(), AGENT)
    assert raised.value.agent == "asking/k"
    assert "NobodyToAsk" in notes


async def test_an_event_has_nobody_to_ask_and_code_outside_of_handlers_neither(make: Make) -> None:
    notes: list[str] = []
    worker, caller = await make(notes), await make()
    await worker.add_subscription(TypeSubscription("orders", "asking"))
    await caller.publish_message(Ask(), TopicId("orders", "k"))
    await eventually(lambda: "NobodyToAsk" in notes)
    with pytest.raises(NobodyToAsk, match="nobody answers questions: no call is being handled"):
        await natsrt.ask(Question(1))


async def test_in_autogens_own_runtime_nobody_can_be_asked() -> None:
    runtime = SingleThreadedAgentRuntime()
    await runtime.register_factory("asking", lambda: Asking([]), expected_class=Asking)
    runtime.start()
    with pytest.raises(NobodyToAsk, match="asking/k"):
        await runtime.send_message(Ask(), AGENT)
    await runtime.stop()


async def test_what_on_question_raises_is_raised_at_the_handler(make: Make) -> None:
    worker, caller = await make([]), await make()
    worker.add_error_type(Odd)

    def on_question(question: Question) -> Answer:
        raise Odd(f"not {question.number}")

    items = [item async for item in caller.stream_message("fails", AGENT, on_question=on_question)]
    assert items == [Answered(error="not 1")]


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda question: {"numer": 1}, natsrt.CannotDecode),
        (lambda question: None, natsrt.CannotDecode),
        (lambda question: object(), natsrt.CannotSerialize),
        (lambda question: Item(1), natsrt.CannotDecode),
        (lambda: Answer(1), TypeError),
    ],
    ids=["wrong JSON", "nothing", "no message", "another class", "wrong signature"],
)
async def test_a_wrong_answer_is_a_clear_error_at_the_handler(make: Make, function: Any, error: Any) -> None:
    notes: list[str] = []
    await make(notes)
    caller = await make()
    with pytest.raises(error):
        await asyncio.wait_for(caller.send_message(Ask(), AGENT, on_question=function), 20)
    assert error.__name__ in notes


async def test_json_values_become_the_class_that_was_asked_for(make: Make) -> None:
    await make([])
    caller = await make()
    answered = await caller.send_message(Ask(), AGENT, on_question=lambda question: {"number": 5, "text": ""})
    assert answered == Answered([5])


async def test_a_function_that_is_cancelled_is_no_cancellation_of_the_handler(make: Make) -> None:
    await make([])
    caller = await make()

    def on_question(question: Question) -> Answer:
        raise asyncio.CancelledError

    with pytest.raises(NobodyToAsk, match="its on_question was cancelled"):
        await caller.send_message(Ask(), AGENT, on_question=on_question)


@pytest.mark.parametrize("wrong", ["text", 5, object()])
async def test_on_question_must_be_a_function(make: Make, wrong: Any) -> None:
    caller = await make([])
    with pytest.raises(TypeError, match="on_question must be a function of the question"):
        caller.stream_message(Ask(), AGENT, on_question=wrong)
    with pytest.raises(TypeError, match="on_question must be a function of the question"):
        await caller.send_message(Ask(), AGENT, on_question=wrong)


async def test_a_runtime_that_is_not_started_answers_no_questions(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    with pytest.raises(RuntimeError, match="start"):
        await runtime.send_message(Ask(), AGENT, on_question=answer)


async def test_large_questions_and_answers_arrive(make: Make) -> None:
    worker, caller = await make([]), await make()
    size = 3 * worker.running.incoming.streams._connection.max_payload
    assert await caller.send_message(Ask(2, size=size), AGENT, on_question=answer) == Answered([10, 20])


@KEYED
async def test_an_answer_that_nobody_waits_for_any_more_is_cancelled(make: Make, keyed: bool | None) -> None:
    notes: list[str] = []
    await make(notes, keyed=keyed)
    caller = await make()
    cancelled = asyncio.Event()

    async def on_question(question: Question) -> Answer:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return Answer(0)

    with pytest.raises(TimeoutError):
        await caller.send_message(Ask(timeout=0.3), AGENT, on_question=on_question)
    await asyncio.wait_for(cancelled.wait(), 5)


@pytest.mark.parametrize("how", ["token", "timeout", "task", "leave"])
@KEYED
async def test_a_caller_that_leaves_ends_question_and_handler(make: Make, how: str, keyed: bool | None) -> None:
    notes: list[str] = []
    worker, caller = await make(notes, keyed=keyed), await make()
    token, asked, cancelled = CancellationToken(), asyncio.Event(), asyncio.Event()

    async def on_question(question: Question) -> Answer:
        asked.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()
        return Answer(0)

    async def call() -> Any:
        if how == "leave":
            async with caller.stream_message("items", AGENT, on_question=on_question) as stream:
                await anext(stream)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(stream), 1.0)
            return None
        timeout = 1.0 if how == "timeout" else None
        return await caller.send_message(
            Ask(), AGENT, on_question=on_question, cancellation_token=token, timeout=timeout
        )

    calling = asyncio.ensure_future(call())
    await asyncio.wait_for(asked.wait(), 10)
    if how == "token":
        token.cancel()
    elif how == "task":
        calling.cancel()
    if how == "leave":
        await calling
    else:
        with pytest.raises((asyncio.CancelledError, natsrt.CallTimeout)):
            await calling
    await asyncio.wait_for(cancelled.wait(), 5)
    await eventually(lambda: "StreamAbandoned" in notes or (how == "token" and "CancelledError" in notes), timeout=5)
    await eventually(lambda: nothing_is_open(worker, caller), timeout=5)


async def test_a_question_is_passed_on_by_ask_itself(make: Make) -> None:
    await make([], keyed=True)
    caller = await make()
    assert await caller.send_message(Ask(3, what="relay"), AGENT, on_question=answer) == Answered([10, 20, 30])


@pytest.mark.slow  # three processes
async def test_who_passes_a_question_on_need_not_know_its_class(
    server: EmbeddedServer, namespace: str, make: Make, processes: Processes
) -> None:
    where = f"{server.url!r}, namespace={namespace!r}"
    asking = processes.python(
        f"""
import asyncio
from dataclasses import dataclass
from autogen_core import MessageContext, RoutedAgent, rpc
import natsrt
@dataclass
class Approval:
    text: str
@dataclass
class Verdict:
    yes: bool
class Asks(RoutedAgent):
    def __init__(self): super().__init__("asks")
    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        return repr(await natsrt.ask(Approval(message), reply_type=Verdict))
async def main():
    async with natsrt.NatsAgentRuntime({where}) as runtime:
        await runtime.register_factory("far", Asks, expected_class=Asks)
        print("ready", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
""",
        name="asking",
    )
    passing = processes.python(
        f"""
import asyncio
from autogen_core import AgentId, MessageContext, RoutedAgent, rpc
import natsrt
class Passes(RoutedAgent):
    def __init__(self): super().__init__("passes")
    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        runtime = natsrt.runtime_of(self)
        return await runtime.send_message(message, AgentId("far", "k"), on_question=natsrt.ask)
async def main():
    async with natsrt.NatsAgentRuntime({where}) as runtime:
        await runtime.register_factory("near", Passes, expected_class=Passes)
        print("ready", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
""",
        name="passing",
    )
    for process in (asking, passing):
        await process.wait_for_line("ready", 20)
    caller, asked = await make(), []

    def on_question(question: Approval | Yes) -> Any:  # it is known by this annotation
        asked.append(question)
        return {"yes": True}

    assert await caller.send_message("x", AgentId("near", "k"), on_question=on_question) == "Verdict(yes=True)"
    assert asked == [Approval("x")]


@dataclass
class Approval:
    text: str


async def test_a_keyed_agent_may_be_called_back_by_who_answers(make: Make) -> None:
    await make([], keyed=True)
    caller = await make()

    async def on_question(question: Question) -> Answer:
        touched: Answered = await caller.send_message(Touch(), AGENT)
        return Answer(touched.numbers[0])

    asked = caller.send_message(Ask(2), AGENT, on_question=on_question)
    assert await asyncio.wait_for(asked, 20) == Answered([1, 2])


class Crosses(RoutedAgent):
    """A keyed agent whose handler calls the agent that asks, in a chain of its own."""

    def __init__(self) -> None:
        super().__init__("crosses")

    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> Answered:
        crossed: Answered = await self.send_message(Touch(), AGENT)
        return crossed

    @rpc
    async def on_touch(self, message: Touch, ctx: MessageContext) -> Answered:
        return Answered([42])


@pytest.mark.parametrize("together", [True, False], ids=["one worker", "two workers"])
async def test_a_cycle_over_a_question_is_a_deadlock(make: Make, together: bool) -> None:
    worker = await make([], keyed=True)
    other = worker if together else await make()
    await other.register_factory("crosses", Crosses, expected_class=Crosses, keyed=True)
    caller, third, asked = await make(), await make(), asyncio.Event()
    crosses = AgentId("crosses", "c")

    async def on_question(question: Question) -> Answer:
        asked.set()
        await asyncio.sleep(0.5)  # the other agent is busy then
        touched: Answered = await caller.send_message(Touch(), crosses)
        return Answer(touched.numbers[0])

    asking = asyncio.ensure_future(caller.send_message(Ask(), AGENT, on_question=on_question))
    await asked.wait()
    crossing = asyncio.ensure_future(third.send_message("", crosses))
    async with asyncio.timeout(20):
        results = await asyncio.gather(asking, crossing, return_exceptions=True)
    refused = [result for result in results if isinstance(result, natsrt.Deadlock)]
    assert len(refused) == 1
    assert results in ([Answered([42]), refused[0]], [refused[0], Answered([1])])
    assert await caller.send_message(Touch(), AGENT) == Answered([1])  # both are free
    assert await caller.send_message(Touch(), crosses) == Answered([42])


async def test_an_answer_that_does_not_wait_for_its_call_is_in_no_cycle(make: Make) -> None:
    worker = await make([], keyed=True)
    await worker.register_factory("crosses", Crosses, expected_class=Crosses, keyed=True)
    caller, third, asked, free = await make(), await make(), asyncio.Event(), asyncio.Event()
    crosses, calls = AgentId("crosses", "c"), []

    async def on_question(question: Question) -> Answer:
        asked.set()
        await asyncio.sleep(0.5)
        calls.append(asyncio.ensure_future(caller.send_message(Touch(), crosses)))
        await free.wait()  # a person's answer, say
        return Answer(7)

    asking = asyncio.ensure_future(caller.send_message(Ask(), AGENT, on_question=on_question))
    await asked.wait()
    crossing = asyncio.ensure_future(third.send_message("", crosses))
    await asyncio.sleep(5)  # several rounds of the search
    assert not asking.done() and not crossing.done() and not calls[0].done()
    free.set()
    assert await asyncio.wait_for(asyncio.gather(asking, crossing, calls[0]), 20) == [
        Answered([7]),
        Answered([1]),
        Answered([42]),
    ]


async def test_an_answer_may_wait_for_many_calls(make: Make, tmp_path: Path) -> None:
    """The caller says which, about every half second. That fits into a message, so the caller does not fall silent."""
    config = tmp_path / "nats.conf"
    store = tmp_path / "data"
    config.write_text(f"listen: 127.0.0.1:-1\nmax_payload: 8KB\njetstream {{ store_dir: {store} }}\n")
    async with EmbeddedServer(config=config) as server:
        worker = await make([], keyed=True, stream_idle_timeout=1.5, url=server.url)
        caller = await make(url=server.url)
        await answer_by_many_calls(worker, caller)


async def answer_by_many_calls(worker: NatsAgentRuntime, caller: NatsAgentRuntime) -> None:
    free = asyncio.Event()

    class Slow(RoutedAgent):
        @rpc
        async def on_touch(self, message: Touch, ctx: MessageContext) -> None:
            await free.wait()

    await worker.register_factory("slow", lambda: Slow("slow"), expected_class=Slow)

    async def on_question(question: Question) -> Answer:
        calls = (caller.send_message(Touch(), AgentId("slow", str(number))) for number in range(1_000))
        await asyncio.gather(*calls)
        return Answer(7)

    asking = asyncio.ensure_future(caller.send_message(Ask(), AGENT, on_question=on_question))
    await asyncio.wait({asking}, timeout=5)
    free.set()
    assert await asyncio.wait_for(asking, 30) == Answered([7])
    await worker.stop()
    await caller.stop()


class Consumer(RoutedAgent):
    """A keyed agent that is asked, and is called back while it answers."""

    def __init__(self) -> None:
        super().__init__("consumer")

    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> Answered:
        async def on_question(question: Question) -> Answer:
            back: Answered = await self.send_message(Touch(), self.id)
            return Answer(back.numbers[0])

        items = [item async for item in natsrt.runtime_of(self).stream_message(message, AGENT, on_question=on_question)]
        answered: Answered = items[-1]
        return answered

    @rpc
    async def on_touch(self, message: Touch, ctx: MessageContext) -> Answered:
        return Answered([42])


async def test_a_keyed_agent_that_answers_may_be_called_back_too(make: Make) -> None:
    await make([], keyed=True)
    worker, caller = await make(), await make()
    await worker.register_factory("consumer", Consumer, expected_class=Consumer, keyed=True)
    called = caller.send_message("items", AgentId("consumer", "c"))
    assert await asyncio.wait_for(called, 20) == Answered([42])


async def test_the_answer_is_given_in_the_context_of_the_consumer(make: Make) -> None:
    await make([])
    caller = await make()
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    variable.set(77)
    assert await caller.send_message(Ask(), AGENT, on_question=lambda question: Answer(variable.get())) == Answered(
        [77]
    )


async def test_items_go_on_while_a_question_is_open(make: Make) -> None:
    class Both(RoutedAgent):
        def __init__(self) -> None:
            super().__init__("both")

        @rpc
        async def on_text(self, message: str, ctx: MessageContext) -> Answered:
            async def emit() -> None:
                for number in range(1, 4):
                    await natsrt.emit(Item(number))

            asking = asyncio.ensure_future(natsrt.ask(Question(1), reply_type=Answer))
            await asyncio.sleep(0)
            await emit()
            return Answered([(await asking).number])

    worker, caller = await make(), await make()
    await worker.register_factory("both", Both, expected_class=Both)
    third = asyncio.Event()

    async def on_question(question: Question) -> Answer:
        await third.wait()
        return Answer(3)

    seen = []
    async for item in caller.stream_message("x", AgentId("both", "k"), on_question=on_question):
        seen.append(item)
        if item == Item(3):
            third.set()
    assert seen == [Item(1), Item(2), Item(3), Answered([3])]


@pytest.mark.parametrize("drop", ["question", "answer"])
async def test_interventions_see_questions_and_answers(make: Make, drop: str) -> None:
    seen: list[str] = []

    class Watching(DefaultInterventionHandler):
        async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
            seen.append(f"send {type(message).__name__}")
            return DropMessage if isinstance(message, Answer) and drop == "answer" else message

        async def on_response(self, message: Any, *, sender: AgentId, recipient: AgentId | None) -> Any:
            seen.append(f"response {type(message).__name__}")
            return DropMessage if isinstance(message, Question) and drop == "question" else message

    await make([])
    caller = await make(intervention_handlers=[Watching()])
    with pytest.raises(MessageDroppedException):
        await caller.send_message(Ask(), AGENT, on_question=answer)
    expected = ["send Ask", "response Question", "send Answer"]
    assert seen == (expected if drop == "answer" else expected[:2])


async def test_a_keyed_owner_elsewhere_asks_the_caller_that_it_does_not_know(make: Make) -> None:
    await asyncio.gather(*(make([], keyed=True) for _ in range(3)))
    caller = await make()
    owners = [AgentId("asking", f"k{number}") for number in range(6)]
    answers = await asyncio.gather(
        *(caller.send_message(Ask(2), agent, on_question=answer) for agent in owners for _ in range(2))
    )
    assert answers == [Answered([10, 20])] * 12


@pytest.mark.slow  # connections are cut again and again
@pytest.mark.parametrize("seed", range(4))
async def test_over_links_that_are_cut_every_question_is_answered_once(
    make: Make, server: EmbeddedServer, seed: int
) -> None:
    choose = random.Random(seed)
    settings = {"reconnect_wait": 0.05}
    asked: list[int] = []

    async def on_question(question: Question) -> Answer:
        asked.append(question.number)
        await asyncio.sleep(choose.random() / 20)
        return Answer(question.number)

    async with Proxy(server.url) as near, Proxy(server.url) as far:
        worker = await make([], url=far.url, keyed=seed % 2 == 1 or None, **settings)
        caller = await make(url=near.url, **settings)
        async with cut_again_and_again(choose, near, far), asyncio.timeout(60):
            assert await caller.send_message(Ask(60), AGENT, on_question=on_question) == Answered([*range(1, 61)])
        assert asked == [*range(1, 61)]
        for runtime in (caller, worker):  # before their links end
            await runtime.close()


@pytest.mark.slow  # a worker is killed
@pytest.mark.parametrize("keyed", ["", "keyed"])
async def test_a_worker_that_dies_while_it_asks_ends_the_call_and_the_question(
    server: EmbeddedServer, namespace: str, make: Make, processes: Processes, keyed: str
) -> None:
    worker = processes.python(PROGRAM, server.url, namespace, "w", keyed)
    await worker.wait_for_line("ready", 20)
    caller = await make()
    asked, cancelled = asyncio.Event(), asyncio.Event()

    async def on_question(question: Question) -> Answer:
        asked.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()
        return Answer(0)

    calling = asyncio.ensure_future(caller.send_message(Ask(), AGENT, on_question=on_question))
    await asyncio.wait_for(asked.wait(), 10)
    worker.kill()
    with pytest.raises(natsrt.WorkerLost):
        await asyncio.wait_for(calling, 10)
    assert cancelled.is_set()


class Asker(RoutedAgent):
    """The worker of the conversation among the vectors."""

    def __init__(self) -> None:
        super().__init__("asker")

    @message_handler
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        await natsrt.emit("an item")
        name = await natsrt.ask("your name?")
        try:
            await natsrt.ask(f"your age, {name}?")
        except ValueError as error:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await natsrt.ask(f"ValueError: {error}")
            await asyncio.sleep(0.2)  # until nobody waits for the third answer, as everybody is told
        return "done"


def filled(template: Any, places: dict[str, str]) -> Any:
    text = json.dumps(template)
    for place, value in places.items():
        text = text.replace(f"{{{place}}}", value)
    return json.loads(text)


async def test_a_participant_that_is_written_from_the_protocol_can_answer(
    server: EmbeddedServer, namespace: str, make: Make
) -> None:
    worker = await make()
    await worker.register_factory("asker", Asker, expected_class=Asker)
    client = await nats.connect(server.url)
    try:
        inbox = client.new_inbox()
        places = {"worker": worker.worker_id, "inbox": inbox}
        arrived = await client.subscribe(f"{inbox}.>")
        came: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for step in QUESTIONS["steps"]:
            if "caller_sends" in step:
                subject = filled(step["to"], places)
                reply = f"{inbox}.{'reply' if subject.startswith('agent.') else 'confirmed'}"
                body = json.dumps(filled(step["caller_sends"], places), separators=(",", ":"))
                await client.publish(f"{namespace}.{subject}", body.encode(), reply=reply)
                continue
            expected, subject = filled(step["worker_sends"], places), filled(step["to"], places)
            while not came[subject]:  # each subject has its own order
                message = await arrived.next_msg(timeout=5)
                came[message.subject].append(json.loads(message.data))
            data = came[subject].pop(0)
            assert {name: data.get(name) for name in expected} == expected
    finally:
        await client.close()


class Busy(RoutedAgent):
    """Works for a while, and asks in tasks that it leaves behind."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__("busy")
        self.notes = notes
        self.tasks: list[asyncio.Task[Any]] = []

    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        if message == "works":
            await asyncio.sleep(1.0)
            self.notes.append("worked")
        elif message == "never awaits":
            await asyncio.sleep(3600)
        else:
            self.tasks = [asyncio.ensure_future(self.ask(pause)) for pause in (0.0, 0.5)]
            await asyncio.sleep(0.1)
        return "done"

    async def ask(self, pause: float) -> None:
        await asyncio.sleep(pause)
        try:
            await natsrt.ask("?")
        except natsrt.StreamAbandoned as error:
            self.notes.append(str(error))


@pytest.mark.parametrize("on_question", [None, answer])
async def test_a_handler_that_runs_is_not_stopped_by_a_deadline_of_its_caller(make: Make, on_question: Any) -> None:
    notes: list[str] = []
    worker, caller = await make(), await make()
    await worker.register_factory("busy", lambda: Busy(notes), expected_class=Busy)
    with pytest.raises(natsrt.CallTimeout):
        await caller.send_message("works", AgentId("busy", "k"), on_question=on_question, timeout=0.3)
    await eventually(lambda: notes == ["worked"])


async def test_a_handler_that_has_ended_has_nobody_to_ask(make: Make) -> None:
    notes: list[str] = []
    worker, caller = await make(), await make()
    await worker.register_factory("busy", lambda: Busy(notes), expected_class=Busy)
    asked = asyncio.Event()

    async def on_question(question: str) -> str:
        asked.set()
        await asyncio.sleep(3600)
        return ""

    agent = AgentId("busy", "k")
    assert await caller.send_message("asks", agent, on_question=on_question) == "done"
    assert asked.is_set()
    await eventually(lambda: len(notes) == 2)
    assert "its handler has ended" in notes[1]


async def test_a_silent_caller_gets_a_typed_error_and_no_cancellation(make: Make, server: EmbeddedServer) -> None:
    async with Proxy(server.url) as near:
        worker = await make(stream_idle_timeout=1.0)
        caller = await make(url=near.url, reconnect_wait=0.05)
        await worker.register_factory("busy", lambda: Busy([]), expected_class=Busy)
        await worker.register_factory("first", First, expected_class=First)
        stream = caller.stream_message("x", AgentId("first", "k"))
        assert await anext(stream) == "first"
        near.cut()
        await asyncio.sleep(3.0)
        await near.restore()
        with pytest.raises(natsrt.StreamAbandoned):
            await asyncio.wait_for(anext(stream), 20)
        await caller.close()


class First(RoutedAgent):
    """Sends an item, and then nothing."""

    def __init__(self) -> None:
        super().__init__("first")

    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> None:
        await natsrt.emit("first")
        await asyncio.sleep(3600)


async def test_a_function_that_swallows_its_cancellation_leaves_nothing_behind(make: Make) -> None:
    notes: list[str] = []
    worker = await make(notes, drain_timeout=0.5)
    caller = await make()
    asked = asyncio.Event()

    async def on_question(question: Question) -> Answer:
        asked.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
        return Answer(1)

    before = asyncio.all_tasks()
    calling = asyncio.ensure_future(caller.send_message(Ask(), AGENT, on_question=on_question))
    await asyncio.wait_for(asked.wait(), 10)
    await worker.close()
    with pytest.raises((natsrt.WorkerLost, natsrt.WorkerStopped)):
        await asyncio.wait_for(calling, 20)
    await caller.close()
    await eventually(lambda: not [task for task in asyncio.all_tasks() - before if "_answer" in repr(task)])


@dataclass
class Yes:
    reason: str


@dataclass
class No:
    why: str


class Typed(RoutedAgent):
    """Asks for an answer of the type that the message names."""

    TYPES: Mapping[str, Any] = {
        "union": Yes | No,
        "optional": Yes | None,
        "list": list[Yes],
        "numbers": dict[str, int],
        "any": Any,
        "bytes": bytes,
        "int": int,
        "literal": Literal["a", "b"],
    }

    def __init__(self) -> None:
        super().__init__("typed")

    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        return repr(await natsrt.ask("?", reply_type=self.TYPES[message]))


@pytest.mark.parametrize(
    ("wanted", "given", "result"),
    [
        ("union", {"why": "w"}, "No(why='w')"),
        ("union", Yes("r"), "Yes(reason='r')"),
        ("union", {"neither": 1}, natsrt.CannotDecode),
        ("optional", None, "None"),
        ("optional", {"reason": "r"}, "Yes(reason='r')"),
        ("optional", No("w"), natsrt.CannotDecode),
        ("list", [{"reason": "r"}], "[Yes(reason='r')]"),
        ("list", ["r"], natsrt.CannotDecode),
        ("numbers", {"a": 1}, "{'a': 1}"),
        ("numbers", {"a": "b"}, natsrt.CannotDecode),
        ("any", {"a": "b"}, "{'a': 'b'}"),
        ("bytes", b"x", "b'x'"),
        ("bytes", "eHg=", natsrt.CannotDecode),
        ("int", 5, "5"),
        ("int", True, natsrt.CannotDecode),
        ("int", "5", natsrt.CannotDecode),
        ("literal", "a", natsrt.CannotSerialize),
    ],
)
async def test_an_answer_is_of_the_type_that_was_asked_for(make: Make, wanted: str, given: Any, result: Any) -> None:
    worker, caller = await make(), await make()
    await worker.register_factory("typed", Typed, expected_class=Typed)
    calling = caller.send_message(wanted, AgentId("typed", "k"), on_question=lambda question: given)
    if isinstance(result, str):
        answered = await calling
        assert answered.replace(f"{__name__}.", "") == result
        return
    with pytest.raises(result) as raised:
        await calling
    if result is natsrt.CannotDecode:
        assert "asked for" in str(raised.value) and "answer of the caller" in str(raised.value)


async def test_answers_that_come_again_or_late_or_forged_change_nothing(
    make: Make, server: EmbeddedServer, namespace: str
) -> None:
    notes: list[str] = []
    worker, caller = await make(notes), await make()
    client = await nats.connect(server.url)
    try:
        gate = asyncio.Event()

        async def on_question(question: Question) -> Answer:
            if question.number == 2:
                (receiving,) = caller.running.outgoing.streams._open
                for number in ("1", "3", "x"):  # the first was answered, the others were not asked
                    forged = {
                        "specversion": "1.0",
                        "type": "natsrt.answer",
                        "id": "a",
                        "source": "/",
                        "partsto": receiving.parts_to,
                        "question": number,
                        "messagetype": "Answer",
                        "data": {"number": 99, "text": ""},
                    }
                    subject = f"{namespace}.natsrt.worker.{worker.worker_id}"
                    body = json.dumps(forged, separators=(",", ":")).encode()
                    await client.request(subject, body, timeout=5)
                gate.set()
            return Answer(question.number)

        assert await caller.send_message(Ask(2), AGENT, on_question=on_question) == Answered([1, 2])
        assert gate.is_set()
        assert worker.running.counters.undecodable == 0
    finally:
        await client.close()
