"""Tasks: calls that are stored before they are handled, and whose results are stored too."""

from __future__ import annotations

import asyncio
import datetime
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from autogen_core import AgentId, DefaultInterventionHandler, MessageContext, RoutedAgent, rpc
from nats.js.errors import NotFoundError

import natsrt
from natsrt import NatsAgentRuntime, Ticket
from natsrt.embedded import EmbeddedServer
from natsrt.hosting import durable
from natsrt.task_types import TaskId, task_of
from natsrt.wire.times import LAST
from tests.programs import task_worker
from tests.programs.task_worker import Broken, Done, Work
from tests.support.processes import Processes, eventually

PROGRAM = Path(task_worker.__file__)
PLAIN, KEYED = "plain", "keyed"
TYPES = pytest.mark.parametrize("agent_type", [PLAIN, KEYED])
LONG = 20.0


@dataclass
class Seen:
    """What the handlers of a test have done. ``fails``: how often each task still fails."""

    begun: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    contexts: list[MessageContext] = field(default_factory=list)
    deliveries: list[natsrt.DeliveryInfo | None] = field(default_factory=list)
    fails: Counter[str] = field(default_factory=Counter)
    free: asyncio.Event = field(default_factory=asyncio.Event)


class Works(RoutedAgent):
    """Does what the message says, and counts that in its state."""

    def __init__(self, seen: Seen) -> None:
        super().__init__("works")
        self._seen = seen
        self._count = 0

    async def save_state(self) -> dict[str, Any]:
        return {"count": self._count}

    async def load_state(self, state: Any) -> None:
        self._count = state["count"]

    @rpc
    async def on_work(self, message: Work, ctx: MessageContext) -> Done:
        seen, name = self._seen, message.name
        seen.begun.append(name)
        seen.contexts.append(ctx)
        seen.deliveries.append(natsrt.current_delivery())
        if seen.fails[name] > 0:
            seen.fails[name] -= 1
            raise Broken(name, 7)
        match message.what:
            case "wait":
                while not seen.free.is_set() and not ctx.cancellation_token.is_cancelled():
                    await asyncio.sleep(0.01)
                if ctx.cancellation_token.is_cancelled():
                    raise asyncio.CancelledError
            case "later":
                raise natsrt.Retry(after=1e12)
            case "reject":
                raise natsrt.Reject("no such work")
            case "progress":
                for step in range(1, 4):
                    assert natsrt.progress(step / 4, f"step {step}")
                    await asyncio.sleep(0.3)
            case "large":
                self._count += 1
                seen.ended.append(name)
                return Done(name, self._count, "ü" * message.size)
        self._count += 1
        seen.ended.append(name)
        return Done(name, self._count, message.text)


Make = Callable[..., Any]


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    """Starts runtimes. ``seen``: with the agent types PLAIN and KEYED; None: without agents."""
    async with AsyncExitStack() as stack:

        async def runtime(seen: Seen | None = None, name: str = "w", **settings: Any) -> NatsAgentRuntime:
            settings = {"retry_delay": 0.05, "retry_delay_max": 0.2, "max_deliver": 3} | settings
            made = NatsAgentRuntime(server.url, namespace=namespace, name=name, **settings)
            if seen is not None:
                await made.register_factory(PLAIN, lambda: Works(seen), expected_class=Works)
                await made.register_factory(KEYED, lambda: Works(seen), expected_class=Works, keyed=True)
            await made.start()
            stack.push_async_callback(made.close)
            return made

        yield runtime


async def left(runtime: NatsAgentRuntime, stream: str) -> int:
    """The number of messages in a stream; 0 if there is none."""
    network = runtime.running.network
    try:
        info = await network.connection.jetstream.stream_info(network.subjects.bucket(stream))
    except NotFoundError:
        return 0
    return info.state.messages


async def nothing_is_left(runtime: NatsAgentRuntime) -> None:
    """No task is in its stream any more."""
    await eventually(lambda: _is_empty(runtime), message="a task that has ended is still stored")


async def _is_empty(runtime: NatsAgentRuntime) -> bool:
    return await left(runtime, "natsrt_events_tasks") == 0


# -- results ---------------------------------------------------------------------------------------------------------


@TYPES
async def test_an_attempt_after_the_times_that_servers_know_is_not_made_now(make: Make, agent_type: str) -> None:
    seen = Seen()
    runtime = await make(seen)
    ticket = await runtime.submit_message(Work("a", "later"), AgentId(agent_type, "x"))

    async def waits() -> bool:
        return (await ticket.status()).state == "waiting"

    await eventually(waits)
    assert (await ticket.status()).due == LAST
    for name in "bcd":  # each after the server has delivered what was due
        await (await runtime.submit_message(Work(name), AgentId(agent_type, "y"))).result(LONG)
    assert seen.begun == ["a", "b", "c", "d"]


@TYPES
async def test_a_task_is_handled_as_a_call_and_any_runtime_gets_its_result(make: Make, agent_type: str) -> None:
    seen = Seen()
    await make(seen)
    submitter, other = await make(name="submitter"), await make(name="other")
    ticket = await submitter.submit_message(Work("a", text="hello"), AgentId(agent_type, "some/key"))
    assert await ticket.result(LONG) == Done("a", 1, "hello")
    assert await other.ticket(ticket.id).result(LONG) == Done("a", 1, "hello")
    [context] = seen.contexts
    assert context.is_rpc and context.topic_id is None and context.message_id == ticket.message_id
    assert context.sender is None
    [delivery] = seen.deliveries
    assert delivery is not None and delivery.attempt == 1
    status = await other.ticket(ticket.id).status()
    assert (status.state, status.attempt, status.has_ended, status.id) == ("done", 1, True, ticket.id)
    assert (ticket.agent, str(ticket.agent)) == (AgentId(agent_type, "some/key"), f"{agent_type}/some/key")
    await nothing_is_left(submitter)


@TYPES
async def test_a_task_waits_for_a_worker(make: Make, agent_type: str) -> None:
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"))
    assert (await ticket.status()).state == "queued"
    with pytest.raises(natsrt.CallTimeout, match=ticket.id):
        await ticket.result(0.3)
    waiting = asyncio.create_task(ticket.result(LONG))
    seen = Seen()
    await make(seen)
    assert (await waiting).name == "a"
    assert seen.begun == ["a"]


async def test_a_sender_and_an_intervention_are_those_of_a_call(make: Make) -> None:
    class Changes(DefaultInterventionHandler):
        async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
            assert message_context.is_rpc and recipient == AgentId(PLAIN, "k")
            return Work("changed")

    seen = Seen()
    await make(seen)
    submitter = await make(name="submitter", intervention_handlers=[Changes()])
    ticket = await submitter.submit_message(Work("a"), AgentId(PLAIN, "k"), sender=AgentId("who", "me"))
    assert (await ticket.result(LONG)).name == "changed"
    assert seen.contexts[0].sender == AgentId("who", "me")


@TYPES
async def test_a_thousand_tasks_at_once_are_handled_once_each(make: Make, agent_type: str) -> None:
    seen = Seen()
    await make(seen, name="one")
    await make(seen, name="two")
    submitter = await make(name="submitter")
    names = [f"n{number}" for number in range(1000)]
    tickets = await asyncio.gather(
        *(submitter.submit_message(Work(name), AgentId(agent_type, f"k{i % 20}")) for i, name in enumerate(names))
    )
    results = await asyncio.gather(*(ticket.result(60) for ticket in tickets))
    assert [result.name for result in results] == names
    assert Counter(seen.ended) == Counter(names)
    if agent_type == KEYED:
        for key in range(20):
            counts = [result.count for i, result in enumerate(results) if i % 20 == key]
            assert counts == list(range(1, 51))  # in order, and each once in the state
    await nothing_is_left(submitter)


# -- failures --------------------------------------------------------------------------------------------------------


@TYPES
async def test_a_failed_attempt_is_tried_again(make: Make, agent_type: str) -> None:
    seen = Seen(fails=Counter(a=2))
    await make(seen)
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"))
    assert (await ticket.result(LONG)).count == 1
    assert seen.begun == ["a"] * 3
    assert [delivery.attempt for delivery in seen.deliveries if delivery is not None] == [1, 2, 3]
    assert (await ticket.status()).attempt == 3


@TYPES
@pytest.mark.parametrize(("retries", "attempts"), [(None, 3), (0, 1), (4, 5)])
async def test_after_the_last_attempt_the_result_is_what_the_handler_raised(
    make: Make, agent_type: str, retries: int | None, attempts: int
) -> None:
    seen = Seen(fails=Counter(a=100))
    worker = await make(seen)
    submitter = await make(name="submitter")
    submitter.add_error_type(Broken)
    ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"), retries=retries)
    with pytest.raises(Broken) as raised:
        await ticket.result(LONG)
    assert (raised.value.name, raised.value.number) == ("a", 7)
    status = await ticket.status()
    assert (status.state, status.attempt) == ("failed", attempts)
    assert len(seen.begun) == attempts
    [letter] = [letter async for letter in worker.dead_letters(agent_type)]
    assert letter.attempts == attempts and task_of(letter.topic) == TaskId.parse(ticket.id)
    await nothing_is_left(submitter)


@TYPES
async def test_reject_ends_a_task_at_once(make: Make, agent_type: str) -> None:
    seen = Seen()
    await make(seen)
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a", "reject"), AgentId(agent_type, "k"))
    with pytest.raises(natsrt.Reject, match="no such work"):
        await ticket.result(LONG)
    assert seen.begun == ["a"]


@TYPES
async def test_a_task_that_has_failed_is_tried_again_by_hand(make: Make, agent_type: str) -> None:
    seen = Seen(fails=Counter(a=3))
    worker = await make(seen)
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"))
    with pytest.raises(natsrt.NatsrtError):
        await ticket.result(LONG)
    tickets = submitter.running.outgoing.tickets
    assert await tickets.retry(TaskId.parse(ticket.id))
    assert (await ticket.result(LONG)).name == "a"
    assert not await tickets.retry(TaskId.parse(ticket.id))
    assert [letter async for letter in worker.dead_letters()] == []
    await nothing_is_left(submitter)


@TYPES
async def test_a_dead_letter_of_a_task_that_is_redriven_gives_a_result(make: Make, agent_type: str) -> None:
    seen = Seen(fails=Counter(a=3))
    worker = await make(seen)
    ticket = await worker.submit_message(Work("a"), AgentId(agent_type, "k"))
    with pytest.raises(natsrt.RemoteAgentError, match="Broken"):
        await ticket.result(LONG)
    [letter] = [letter async for letter in worker.dead_letters()]
    await worker.redrive(letter)
    await eventually(lambda: _is_done(ticket), timeout=LONG)
    assert (await ticket.result(LONG)).name == "a"


async def _is_done(ticket: Ticket) -> bool:
    return (await ticket.status()).state == "done"


async def test_a_task_whose_message_is_unknown_to_its_agent_fails(make: Make) -> None:
    @dataclass
    class Unknown:
        text: str

    await make(Seen())
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Unknown("x"), AgentId(PLAIN, "k"), retries=0)
    with pytest.raises(natsrt.UnhandledMessage):
        await ticket.result(LONG)


# -- progress --------------------------------------------------------------------------------------------------------


@TYPES
async def test_progress_is_told_to_those_that_follow(make: Make, agent_type: str) -> None:
    await make(Seen())
    submitter, other = await make(name="submitter"), await make(name="other")
    ticket = await submitter.submit_message(Work("a", "progress"), AgentId(agent_type, "k"))
    statuses = [status async for status in other.ticket(ticket.id)]
    told = [(status.fraction, status.text) for status in statuses if status.state == "running"]
    assert told == [(0.25, "step 1"), (0.5, "step 2"), (0.75, "step 3")]
    assert statuses[-1].state == "done"
    assert all(status.worker_id is not None for status in statuses if status.state == "running")
    assert [status.state async for status in ticket] == ["done"]


@TYPES
async def test_a_task_that_waits_for_its_next_attempt_says_so(make: Make, agent_type: str) -> None:
    await make(Seen(fails=Counter(a=1)), retry_delay=1.0, retry_delay_max=1.0)
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"))
    await eventually(lambda: _is(ticket, "waiting"))
    status = await ticket.status()
    assert status.due is not None and status.due > datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
    assert (await ticket.result(LONG)).name == "a"


async def _is(ticket: Ticket, state: str) -> bool:
    return (await ticket.status()).state == state


async def test_progress_says_nothing_outside_of_tasks_and_refuses_what_is_none() -> None:
    assert natsrt.progress(0.5, "x") is False
    for wrong in (1.5, -0.1, True, float("nan"), "0.5"):
        with pytest.raises(ValueError, match="fraction"):
            natsrt.progress(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text"):
        natsrt.progress(0.5, 7)  # type: ignore[arg-type]


# -- cancelling ------------------------------------------------------------------------------------------------------


@TYPES
async def test_a_queued_task_that_is_cancelled_is_not_handled(make: Make, agent_type: str) -> None:
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"))
    other = await submitter.submit_message(Work("b"), AgentId(agent_type, "k"))
    assert await ticket.cancel()
    seen = Seen()
    await make(seen)
    assert (await other.result(LONG)).name == "b"
    assert seen.begun == ["b"]
    with pytest.raises(natsrt.TaskCancelled, match=ticket.id):
        await ticket.result(LONG)
    assert (await ticket.status()).state == "cancelled"
    assert not await ticket.cancel() and not await other.cancel()


@TYPES
async def test_cancelling_sets_the_token_of_a_handler_that_runs(
    make: Make, agent_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Seen()
    worker = await make(seen)
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a", "wait"), AgentId(agent_type, "k"))
    await eventually(lambda: seen.begun == ["a"])
    await eventually(lambda: _is(ticket, "running"))
    waiting = asyncio.create_task(ticket.result(LONG))
    assert await submitter.ticket(ticket.id).cancel()
    with pytest.raises(natsrt.TaskCancelled):
        await waiting
    await nothing_is_left(submitter)
    after = await submitter.submit_message(Work("b"), AgentId(agent_type, "k"))
    assert (await after.result(LONG)).name == "b"
    assert seen.begun == ["a", "b"]
    assert [letter async for letter in worker.dead_letters()] == []
    assert [record for record in caplog.records if "failed" in record.getMessage()] == []


@TYPES
async def test_a_task_that_waits_for_its_next_attempt_can_be_cancelled(make: Make, agent_type: str) -> None:
    seen = Seen(fails=Counter(a=100))
    await make(seen, retry_delay=1.5, retry_delay_max=1.5)
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"))
    await eventually(lambda: _is(ticket, "waiting"))
    assert await ticket.cancel()
    after = await submitter.submit_message(Work("b"), AgentId(agent_type, "other"), delay=2.5)
    assert (await after.result(LONG)).name == "b"
    assert seen.begun == ["a", "b"]


@TYPES
async def test_a_task_that_waits_behind_another_one_can_be_cancelled(make: Make, agent_type: str) -> None:
    seen = Seen()
    await make(seen, max_running=1)
    submitter = await make(name="submitter")
    first = await submitter.submit_message(Work("a", "wait"), AgentId(agent_type, "k"))
    await eventually(lambda: seen.begun == ["a"])
    second = await submitter.submit_message(Work("b"), AgentId(agent_type, "k"))
    third = await submitter.submit_message(Work("c"), AgentId(agent_type, "k"))
    await asyncio.sleep(0.1)  # it has been delivered by now, most probably
    assert await second.cancel()
    seen.free.set()
    assert (await third.result(LONG)).name == "c"
    assert (await first.result(LONG)).name == "a"
    assert seen.begun == ["a", "c"]


# -- later -----------------------------------------------------------------------------------------------------------


@TYPES
async def test_a_task_is_handled_when_it_is_due(make: Make, agent_type: str) -> None:
    seen = Seen()
    await make(seen)
    submitter = await make(name="submitter")
    due = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=4)
    ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"), at=due)
    status = await ticket.status()
    assert status.state == "scheduled"
    assert status.due is not None and abs((status.due - due).total_seconds()) < 0.01
    assert seen.begun == []
    assert (await ticket.result(LONG)).name == "a"
    assert datetime.datetime.now(datetime.UTC) >= due
    await nothing_is_left(submitter)


@TYPES
async def test_a_delayed_task_can_be_cancelled(make: Make, agent_type: str) -> None:
    seen = Seen()
    await make(seen)
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"), delay=4)
    other = await submitter.submit_message(Work("b"), AgentId(agent_type, "k"), delay=5)
    assert await ticket.cancel()
    assert (await other.result(LONG)).name == "b"
    assert seen.begun == ["b"]


# -- one id is one task ----------------------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("message_id", ["order 7", "ö/.*>", "=41"])
async def test_tasks_with_one_id_are_one_task(make: Make, agent_type: str, message_id: str) -> None:
    seen, agent = Seen(), AgentId(agent_type, "k")
    submitter = await make(name="submitter")
    tickets = [await submitter.submit_message(Work("a"), agent, message_id=message_id) for _ in range(3)]
    assert await left(submitter, "natsrt_events_tasks") == 1
    await make(seen)
    assert [(await ticket.result(LONG)).count for ticket in tickets] == [1, 1, 1]
    later = await submitter.submit_message(Work("a"), agent, message_id=message_id)
    assert later.id == tickets[0].id
    assert (await submitter.ticket(later.id).result(LONG)).count == 1
    assert seen.begun == ["a"] and seen.contexts[0].message_id == message_id


@TYPES
async def test_a_task_is_handled_again_when_its_result_has_expired(make: Make, agent_type: str) -> None:
    seen, agent = Seen(), AgentId(agent_type, "k")
    await make(seen)
    submitter = await make(name="submitter")
    for number in (1, 2):
        ticket = await submitter.submit_message(Work(str(number)), agent, message_id="order-7", result_ttl=1.0)
        assert (await ticket.result(LONG)).count == number
        await eventually(partial(_is_unknown, ticket))
    assert seen.begun == ["1", "2"]


@TYPES
async def test_a_task_that_is_stored_again_when_the_first_one_has_just_ended_is_not_handled_again(
    make: Make, agent_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its submitter looked for a result before the first one had one."""
    seen, agent = Seen(), AgentId(agent_type, "k")
    await make(seen)
    submitter = await make(name="submitter")
    first = await submitter.submit_message(Work("a"), agent, message_id="order-7")
    assert (await first.result(LONG)).count == 1
    await nothing_is_left(submitter)

    async def none_yet(task: TaskId) -> bool:
        return False

    monkeypatch.setattr(submitter.running.outgoing.tickets, "has_result", none_yet)
    second = await submitter.submit_message(Work("b"), agent, message_id="order-7")
    assert (await second.result(LONG)).name == "a"
    await nothing_is_left(submitter)
    assert seen.begun == ["a"]


@pytest.mark.parametrize("message_id", [None, "order-7"])
async def test_a_task_is_submitted_while_the_server_restarts(
    own_server: EmbeddedServer, namespace: str, message_id: str | None
) -> None:
    async with NatsAgentRuntime(own_server.url, namespace=namespace) as submitter:
        await submitter.submit_message(Work("a"), AgentId(PLAIN, "k"))
        await own_server.kill()
        submitting = asyncio.ensure_future(
            submitter.submit_message(Work("b"), AgentId(PLAIN, "k"), message_id=message_id)
        )
        await eventually(lambda: submitter.running.outgoing.under_way == 1)
        await own_server.restart()
        assert (await (await submitting).status()).state == "queued"


async def test_who_cannot_find_out_whether_a_task_has_a_result_is_told_that_it_was_not_stored(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitter = await make(name="submitter", publish_timeout=0.5)
    await submitter.submit_message(Work("a"), AgentId(PLAIN, "k"))

    async def no_answer(task: TaskId) -> bool:
        raise natsrt.StreamUnavailable("read", "natsrt_results", "JetStream does not answer", passing=True)

    monkeypatch.setattr(submitter.running.outgoing.tickets, "has_result", no_answer)
    with pytest.raises(natsrt.EventNotStored, match="does not answer") as raised:
        await submitter.submit_message(Work("a"), AgentId(PLAIN, "k"), message_id="order-7")
    assert not raised.value.may_be_stored
    assert await left(submitter, "natsrt_events_tasks") == 1


async def test_ids_of_tasks_cannot_be_guessed(make: Make) -> None:
    submitter = await make(name="submitter")
    tickets = [await submitter.submit_message(Work("a"), AgentId(PLAIN, "k")) for _ in range(20)]
    ids = [ticket.message_id for ticket in tickets]
    assert all(len(bytes.fromhex(one)) == 12 for one in ids)
    assert len({one[:8] for one in ids}) == len({one[-8:] for one in ids}) == 20


# -- payloads of any size --------------------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("times", [0.9, 1.0, 3.0])
async def test_large_tasks_and_results_arrive_and_leave_nothing(make: Make, agent_type: str, times: float) -> None:
    await make(Seen(), blob_ttl=5.0)
    submitter = await make(name="submitter", result_ttl=5.0, blob_ttl=5.0)
    size = int(submitter.running.connection.max_payload * times)
    ticket = await submitter.submit_message(Work("a", text="x" * size), AgentId(agent_type, "k"))
    result = await ticket.result(LONG)
    assert len(result.text) == size
    ticket = await submitter.submit_message(Work("b", "large", size=size // 2), AgentId(agent_type, "k"))
    assert (await ticket.result(LONG)).text == (await ticket.result(LONG)).text == "ü" * (size // 2)
    await eventually(lambda: _nothing_at_all(submitter), timeout=40.0)


@TYPES
@pytest.mark.parametrize("delay", [None, 3600.0])
async def test_the_payload_of_a_large_task_that_is_cancelled_is_deleted(
    make: Make, agent_type: str, delay: float | None
) -> None:
    submitter = await make(name="submitter", result_ttl=1.0)
    size = 2 * submitter.running.connection.max_payload
    ticket = await submitter.submit_message(Work("a", text="x" * size), AgentId(agent_type, "k"), delay=delay)
    assert await left(submitter, "natsrt_blobs") > 0
    assert await ticket.cancel()
    await eventually(lambda: _nothing_at_all(submitter), timeout=LONG)


async def _nothing_at_all(runtime: NatsAgentRuntime) -> bool:
    streams = ("natsrt_events_tasks", "natsrt_results", "natsrt_blobs")
    return [await left(runtime, stream) for stream in streams] == [0, 0, 0]


# -- health ----------------------------------------------------------------------------------------------------------


async def test_health_counts_the_tasks_that_wait(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_MEASURED_EVERY", 0.05)
    seen = Seen()
    worker = await make(seen, max_running=1)
    assert worker.health().tasks_waiting is None
    tickets = [await worker.submit_message(Work(str(n), "wait"), AgentId(PLAIN, "k")) for n in range(5)]
    # It holds the one that runs, and the next one.
    await eventually(lambda: worker.health().tasks_waiting == 3)
    seen.free.set()
    await asyncio.gather(*(ticket.result(LONG) for ticket in tickets))
    await eventually(lambda: worker.health().tasks_waiting == 0)


@TYPES
async def test_a_task_that_ends_or_is_cancelled_does_not_acknowledge_earlier_ones(make: Make, agent_type: str) -> None:
    """The server would take them for handled, and a new feeder would leave them out."""
    seen = Seen()
    await make(seen)
    submitter = await make(name="submitter")
    waits = await submitter.submit_message(Work("waits", "wait"), AgentId(agent_type, "slow"))
    await eventually(lambda: seen.begun == ["waits"])
    queued = await submitter.submit_message(Work("queued", "wait"), AgentId(agent_type, "slow"))
    for number in range(5):
        done = await submitter.submit_message(Work(str(number)), AgentId(agent_type, "quick"))
        await done.result(LONG)
    assert await queued.cancel()
    js, network = submitter.running.connection.jetstream, submitter.running.network
    info = await js.consumer_info(network.tasks.tasks, agent_type)
    assert info.ack_floor is not None
    assert (info.ack_floor.consumer_seq, info.ack_floor.stream_seq) == (0, 0)
    seen.free.set()
    assert (await waits.result(LONG)).name == "waits"
    await nothing_is_left(submitter)


# -- workers that die ------------------------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("where", ["before the result", "before the removal", "before the acknowledgement"])
@pytest.mark.timeout(90)
async def test_a_worker_that_is_killed_at_the_end_of_a_task_loses_and_doubles_nothing(
    server: EmbeddedServer,
    make: Make,
    namespace: str,
    processes: Processes,
    tmp_path: Path,
    agent_type: str,
    where: str,
) -> None:
    file = tmp_path / "handled"
    submitter = await make(name="submitter")
    arguments = (server.url, namespace, str(file))
    with processes.python(PROGRAM, *arguments, where, name="dies") as dies:
        await dies.wait_for_line("ready")
        ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"))
        assert await dies.wait(20) == -signal.SIGKILL
    with processes.python(PROGRAM, *arguments, name="goes on") as goes_on:
        await goes_on.wait_for_line("ready")
        handled_twice = where == "before the result" and agent_type == PLAIN
        if where == "before the result" and agent_type == KEYED:
            with pytest.raises(natsrt.TaskResultLost):  # its effect is in the state
                await ticket.result(30)
        else:
            assert (await ticket.result(30)).count == 1
        await eventually(lambda: _is_empty(submitter), timeout=30.0)
        after = await submitter.submit_message(Work("b"), AgentId(agent_type, "k"))
        result = await after.result(30)
        assert result.text == ("a b" if handled_twice or agent_type == KEYED else "b")
    assert file.read_text().split() == (["a", "a", "b"] if handled_twice else ["a", "b"])


# -- what there is not -----------------------------------------------------------------------------------------------


async def test_unknown_tasks_and_wrong_ids_are_errors(make: Make) -> None:
    await make(Seen())
    submitter = await make(name="submitter")
    never = submitter.ticket("plain/k/never")
    for _ in range(2):
        with pytest.raises(natsrt.TaskUnknown, match="plain/k/never"):
            await never.result(LONG)
        with pytest.raises(natsrt.TaskUnknown):
            await never.status()
        with pytest.raises(natsrt.TaskUnknown):
            await never.cancel()
        with pytest.raises(natsrt.TaskUnknown):
            [status async for status in never]
        await (await submitter.submit_message(Work("a"), AgentId(PLAIN, "k"))).result(LONG)  # now there is a stream
    for wrong in ("", "plain", "plain/k", "pl ain/k/x", "plain/k/", 7):
        with pytest.raises(ValueError, match="task"):
            submitter.ticket(wrong)  # type: ignore[arg-type]


async def test_a_result_expires(make: Make) -> None:
    await make(Seen())
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a"), AgentId(PLAIN, "k"), result_ttl=1.0)
    await ticket.result(LONG)
    await eventually(lambda: _is_unknown(ticket))
    with pytest.raises(natsrt.TaskUnknown):
        await ticket.result(LONG)


async def _is_unknown(ticket: Ticket) -> bool:
    try:
        await ticket.status()
    except natsrt.TaskUnknown:
        return True
    return False


@pytest.mark.parametrize(
    "wrong",
    [
        {"retries": -1},
        {"retries": 1.5},
        {"retries": True},
        {"result_ttl": 0.5},
        {"result_ttl": float("inf")},
        {"result_ttl": "1"},
        {"message_id": ""},
        {"message_id": "x" * 201},
        {"delay": 1.0, "at": datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)},
        {"at": datetime.datetime(2030, 1, 1)},
        {"recipient": "plain/k"},
        {"sender": "plain/k"},
        {"message_id": 7},
    ],
    ids=lambda wrong: str(wrong)[:40],
)
async def test_wrong_arguments_store_nothing(make: Make, wrong: dict[str, Any]) -> None:
    submitter = await make(name="submitter")
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", ".")):
        await submitter.submit_message(Work("a"), **{"recipient": AgentId(PLAIN, "k")} | wrong)
    assert await left(submitter, "natsrt_events_tasks") == 0
