"""Tasks as programs use them: what follows from stops, kills and cancellations, and from unusual arguments."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from autogen_core import AgentId, CancellationToken, MessageContext, RoutedAgent, rpc
from nats.js.api import StreamConfig

import natsrt
from natsrt import NatsAgentRuntime, TaskStatus, Ticket
from natsrt.embedded import EmbeddedServer
from natsrt.hosting.lines import Again, Lines, Outcome, Settled, Tries
from natsrt.retry_types import RetryOptions
from natsrt.wire.envelope import Envelope
from natsrt.wire.task_attributes import MOST, attempts_of, result_ttl_of
from tests.programs import task_worker
from tests.programs.task_worker import Work
from tests.support.processes import Process, Processes, eventually

PLAIN, KEYED = "plain", "keyed"
TYPES = pytest.mark.parametrize("agent_type", [PLAIN, KEYED])
LONG = 20.0


@dataclass
class Step:
    """``what`` to do: ``later`` is tried again in an hour, anything else is returned."""

    what: str


class Steps(RoutedAgent):
    def __init__(self, handled: list[str]) -> None:
        super().__init__("takes steps")
        self._handled = handled

    async def save_state(self) -> dict[str, Any]:
        return {}

    async def load_state(self, state: Any) -> None:
        pass

    @rpc
    async def on_step(self, message: Step, ctx: MessageContext) -> str:
        self._handled.append(message.what)
        if message.what == "later":
            raise natsrt.Retry(after=3600)
        return message.what


Make = Callable[..., Awaitable[NatsAgentRuntime]]


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    """Starts runtimes. ``handled``: with the agent types PLAIN and KEYED, which add to it what they handle."""
    async with AsyncExitStack() as stack:

        async def runtime(handled: list[str] | None = None) -> NatsAgentRuntime:
            made = NatsAgentRuntime(server.url, namespace=namespace)
            if handled is not None:
                await made.register_factory(PLAIN, lambda: Steps(handled), expected_class=Steps)
                await made.register_factory(KEYED, lambda: Steps(handled), expected_class=Steps, keyed=True)
            await made.start()
            stack.push_async_callback(made.close)
            return made

        yield runtime


async def follow(ticket: Ticket) -> list[TaskStatus]:
    return [status async for status in ticket]


async def is_in(ticket: Ticket, state: str) -> bool:
    return (await ticket.status()).state == state


# -- a runtime that is stopped ---------------------------------------------------------------------------------------


async def test_who_waits_for_a_task_is_told_at_once_that_the_runtime_is_stopped(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsrt.sending.tickets._LOOK_EVERY", math.inf)
    runtime = await make()
    ticket = await runtime.submit_message(Step("a"), AgentId(PLAIN, "k"))
    statuses = aiter(ticket)
    assert (await anext(statuses)).state == "queued"
    waiting = [asyncio.ensure_future(ticket.result()), asyncio.ensure_future(anext(statuses))]
    await eventually(lambda: _so_many_wait(runtime, 2))
    await runtime.stop()
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(error, natsrt.StreamUnavailable) and "stopped" in str(error)


async def _so_many_wait(runtime: NatsAgentRuntime, number: int) -> bool:
    return len(runtime.running.outgoing.tickets._waiting) == number


async def test_a_ticket_of_a_stopped_runtime_says_so_and_a_new_one_has_the_result(make: Make) -> None:
    await make([])
    runtime = await make()
    ticket = await runtime.submit_message(Step("a"), AgentId(PLAIN, "k"))
    assert await ticket.result(LONG) == "a"
    await runtime.stop()
    await runtime.start()
    uses: list[Callable[[], Awaitable[Any]]] = [ticket.result, ticket.status, ticket.cancel, lambda: follow(ticket)]
    for use in uses:
        with pytest.raises(natsrt.StreamUnavailable, match="stopped"):
            await use()
    assert await runtime.ticket(ticket.id).result(LONG) == "a"


# -- workers that die ------------------------------------------------------------------------------------------------


@pytest.mark.slow  # workers die, and the server ends the pins of those that fed
async def test_a_task_that_ends_its_workers_ends_as_many_as_it_has_attempts_and_one_more(
    server: EmbeddedServer, namespace: str, make: Make, processes: Processes, tmp_path: Path
) -> None:
    file = tmp_path / "handled"
    file.touch()
    program = Path(task_worker.__file__)
    submitter = await make()
    worker = processes.python(program, server.url, namespace, str(file))
    await worker.wait_for_line("ready", timeout=LONG)
    ticket = await submitter.submit_message(Work("a", "die"), AgentId(KEYED, "k"), retries=1)
    while not (await ticket.status()).has_ended and file.read_text().count("a") < 6:
        await eventually(partial(_is_over, worker, ticket), timeout=LONG)
        if not worker.running:
            worker = processes.python(program, server.url, namespace, str(file))
            await worker.wait_for_line("ready", timeout=LONG)
    with pytest.raises((natsrt.WorkerLost, natsrt.NotSettled)):
        await ticket.result(LONG)
    assert file.read_text().split() in (["a", "a"], ["a", "a", "a"])


@pytest.mark.slow  # a worker is killed, and another must notice it
async def test_a_worker_that_started_last_takes_over_from_a_feeder_that_is_killed(
    server: EmbeddedServer, namespace: str, make: Make, processes: Processes, tmp_path: Path
) -> None:
    file = tmp_path / "handled"
    program, arguments = Path(task_worker.__file__), (server.url, namespace, str(file), "", "3600.0")
    submitter, agent = await make(), AgentId(KEYED, "k")
    first = processes.python(program, *arguments)
    await first.wait_for_line("ready", timeout=LONG)
    await (await submitter.submit_message(Work("a"), agent)).result(LONG)
    second = processes.python(program, *arguments)
    await second.wait_for_line("ready", timeout=LONG)
    await submitter.submit_message(Work("b", "3600"), agent)
    await eventually(lambda: _is(file.read_text().split(), ["a", "b"]), timeout=LONG)
    first.kill()
    await eventually(lambda: _is(file.read_text().split(), ["a", "b", "b"]), timeout=LONG)


async def _is_over(worker: Process, ticket: Ticket) -> bool:
    return not worker.running or (await ticket.status()).has_ended


# -- cancelled while they wait ---------------------------------------------------------------------------------------


@TYPES
async def test_the_later_tasks_of_an_agent_do_not_wait_for_one_that_was_cancelled(make: Make, agent_type: str) -> None:
    handled: list[str] = []
    await make(handled)
    submitter = await make()
    agent = AgentId(agent_type, "k")
    ticket = await submitter.submit_message(Step("later"), agent)
    await eventually(lambda: is_in(ticket, "waiting"))
    later = await submitter.submit_message(Step("a"), agent)
    assert await ticket.cancel()
    assert await later.result(LONG) == "a"
    assert handled == ["later", "a"]
    status = await ticket.status()
    assert (status.state, status.worker_id) == ("cancelled", None)


class _Place(int):
    @property
    def sequence(self) -> int:
        return int(self)


class _Hands:
    """Delivers messages of which the first one is to wait for a day."""

    def __init__(self, token: CancellationToken) -> None:
        self.token = token
        self.delivered: list[int] = []
        self.waits = asyncio.Event()

    async def deliver(self, place: _Place, message: str, tries: Tries) -> Outcome:
        self.delivered.append(place)
        if len(self.delivered) > 1:
            return Settled.HANDLED
        self.waits.set()
        return Again(86400.0, token=self.token)

    async def read(self, place: _Place) -> str | None:
        return "read"

    async def begin(self, place: _Place) -> int:
        return 0

    def settled(self, place: _Place, outcome: Settled) -> None:
        pass


@pytest.mark.parametrize("early", [True, False])
async def test_a_line_goes_on_when_what_it_waits_for_is_cancelled(early: bool) -> None:
    token = CancellationToken()
    hands = _Hands(token)
    lines: Lines[_Place, str] = Lines(hands, max_bytes=1000, most=10, retries=RetryOptions())
    if early:
        token.cancel()
    for place in (1, 2):
        lines.take("k", _Place(place), "message", 1)
    await hands.waits.wait()
    token.cancel()
    await eventually(lambda: _is(hands.delivered, [1, 1, 2]))
    await lines.stop()


async def _is(one: object, other: object) -> bool:
    return one == other


# -- one id ----------------------------------------------------------------------------------------------------------


@TYPES
async def test_a_task_that_was_submitted_again_before_it_was_due_is_handled_once(make: Make, agent_type: str) -> None:
    handled: list[str] = []
    await make(handled)
    submitter = await make()
    agent = AgentId(agent_type, "k")
    await (await submitter.submit_message(Step("first"), agent)).result(LONG)
    await _forget_ids_soon(submitter)
    await submitter.submit_message(Step("a"), agent, message_id="a", delay=1.5)
    await eventually(lambda: _are_forgotten(submitter))
    ticket = await submitter.submit_message(Step("a"), agent, message_id="a")
    assert await ticket.result(LONG) == "a"
    last = await submitter.submit_message(Step("last"), agent, delay=1.5)
    assert await last.result(LONG) == "last"
    assert handled == ["first", "a", "last"]


async def _forget_ids_soon(runtime: NatsAgentRuntime) -> None:
    """Have the stream of tasks know the ids of messages for a moment only, as if minutes had passed."""
    network = runtime.running.network
    info = await network.connection.jetstream.stream_info(network.subjects.bucket("natsrt_events_tasks"))
    config: StreamConfig = info.config
    config.duplicate_window = 0.1
    await network.connection.jetstream.update_stream(config)


async def _are_forgotten(runtime: NatsAgentRuntime) -> bool:
    """True if the stream stores a message a second time. It is for no agent type."""
    network = runtime.running.network
    subject = network.subjects.topic("natsrt.task.nobody:probe", "k")
    acks = [await network.connection.jetstream.publish(subject, b"1", headers={"Nats-Msg-Id": "probe"})]
    await eventually(lambda: _is_stored_again(runtime, subject))
    return not acks[0].duplicate


async def _is_stored_again(runtime: NatsAgentRuntime, subject: str) -> bool:
    jetstream = runtime.running.network.connection.jetstream
    return not (await jetstream.publish(subject, b"1", headers={"Nats-Msg-Id": "probe"})).duplicate


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"retries": 10**9}, {"result_ttl": 1e10}, {"result_ttl": math.nan}], ids=str)
async def test_numbers_that_the_server_cannot_use_are_refused(make: Make, wrong: dict[str, Any]) -> None:
    runtime = await make()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        await runtime.submit_message(Step("a"), AgentId(PLAIN, "k"), **wrong)


def test_a_setting_that_the_server_cannot_use_is_refused() -> None:
    with pytest.raises(natsrt.ConfigurationError, match="result_ttl"):
        NatsAgentRuntime(result_ttl=1e10)


@TYPES
async def test_the_longest_time_to_live_is_one(make: Make, agent_type: str) -> None:
    await make([])
    submitter = await make()
    ticket = await submitter.submit_message(Step("a"), AgentId(agent_type, "k"), result_ttl=MOST)
    assert await ticket.result(LONG) == "a"
    other = await submitter.submit_message(Step("b"), AgentId(agent_type, "k"), result_ttl=1.0)
    assert await other.result(LONG) == "b"
    await eventually(lambda: _is_unknown(other), timeout=LONG)
    assert await ticket.result(LONG) == "a"


async def _is_unknown(ticket: Ticket) -> bool:
    try:
        await ticket.status()
    except natsrt.TaskUnknown:
        return True
    return False


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("007", 7), ("1000000000", MOST), ("1" + "0" * 30, MOST)]
    + [(text, None) for text in ("0", "00", "-1", "1.5", "", "²", "1" * 101, " 1")],
)
def test_numbers_of_others_are_bounded(text: str, number: int | None) -> None:
    body = Envelope({"type": "natsrt.event", "resultttl": text, "maxdeliver": text}, b"", b"")
    assert (result_ttl_of(body), attempts_of(body)) == (number, number)
