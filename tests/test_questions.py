"""Questions of handlers to their callers: `natsrt.ask` and ``on_question``."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

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
    await eventually(lambda: "StreamAbandoned" in notes or "CancelledError" in notes, timeout=5)
    await eventually(lambda: nothing_is_open(worker, caller), timeout=5)


async def test_a_question_is_passed_on_by_ask_itself(make: Make) -> None:
    await make([], keyed=True)
    caller = await make()
    assert await caller.send_message(Ask(3, what="relay"), AGENT, on_question=answer) == Answered([10, 20, 30])


async def test_a_keyed_agent_may_be_called_back_by_who_answers(make: Make) -> None:
    await make([], keyed=True)
    caller = await make()

    async def on_question(question: Question) -> Answer:
        touched: Answered = await caller.send_message(Touch(), AGENT)
        return Answer(touched.numbers[0])

    asked = caller.send_message(Ask(2), AGENT, on_question=on_question)
    assert await asyncio.wait_for(asked, 20) == Answered([1, 2])


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
