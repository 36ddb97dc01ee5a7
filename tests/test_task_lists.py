"""``runtime.tasks``, and tasks whose body is ready."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, rpc

import natsrt
from natsrt import NatsAgentRuntime, TaskStatus
from natsrt.task_types import TaskId, task_of
from tests.programs.task_worker import Work
from tests.support.processes import eventually
from tests.test_tasks import KEYED, LONG, PLAIN, TYPES, Make, Seen, left, make

__all__ = ["make"]


async def listed(runtime: NatsAgentRuntime, agent_type: str | None = None) -> dict[str, TaskStatus]:
    """The tasks in a list, by id. None is listed twice."""
    found = [status async for status in runtime.tasks(agent_type)]
    by_id = {status.id: status for status in found}
    assert len(by_id) == len(found)
    return by_id


async def submit(
    runtime: NatsAgentRuntime,
    body: bytes,
    agent: AgentId,
    type_name: str | None = None,
    message_id: str | None = None,
) -> TaskId:
    """Submit a task whose body is ready."""
    session = runtime.running
    await session.membership.take_tasks(agent.type)
    return await session.outgoing.tasks.submit_body(
        body, agent, type_name, message_id=message_id, due=None, attempts=1, result_ttl=60
    )


# -- lists -----------------------------------------------------------------------------------------------------------


async def test_before_there_was_a_task_the_list_is_empty(make: Make) -> None:
    assert await listed(await make(name="submitter")) == {}


def _to_milliseconds(status: TaskStatus) -> TaskStatus:
    """Two ways to read a time differ by a microsecond."""
    assert status.since is not None
    return replace(status, since=status.since.replace(microsecond=status.since.microsecond // 1000))


@TYPES
async def test_a_task_is_listed_with_the_status_that_its_ticket_tells(make: Make, agent_type: str) -> None:
    seen = Seen(fails=Counter(failed=1, waiting=1))
    submitter = await make(name="submitter")
    plans: dict[str, dict[str, Any]] = {
        "done": {},
        "failed": {"retries": 0},
        "waiting": {},
        "running": {},
        "scheduled": {"delay": 3600},
        "cancelled": {"delay": 3600},
    }
    tickets = {
        state: await submitter.submit_message(
            Work(state, "wait" if state == "running" else ""), AgentId(agent_type, state), **plan
        )
        for state, plan in plans.items()
    }
    tickets["queued"] = await submitter.submit_message(Work("queued"), AgentId("nobody", "k"))
    await tickets["cancelled"].cancel()
    await make(seen, retry_delay=3600, retry_delay_max=3600)

    async def as_planned() -> bool:
        return all([(await ticket.status()).state == state for state, ticket in tickets.items()])

    await eventually(as_planned, LONG)
    found = await listed(submitter)
    assert {name: _to_milliseconds(status) for name, status in found.items()} == {
        ticket.id: _to_milliseconds(await ticket.status()) for ticket in tickets.values()
    }
    assert {status.state for status in found.values()} == set(tickets)
    changes = [status.since for status in found.values() if status.since is not None]
    assert len(changes) == len(found) and changes == sorted(changes)
    seen.free.set()


async def test_the_tasks_of_one_type_are_listed_alone(make: Make) -> None:
    submitter = await make(name="submitter")
    await make(Seen())
    ids = {}
    for agent_type in (PLAIN, KEYED, "a.b", "a", "a.b.c"):
        tickets = [
            await submitter.submit_message(Work("a"), AgentId(agent_type, "some.key/x"), delay=delay)
            for delay in (None, 3600)
        ]
        ids[agent_type] = {ticket.id for ticket in tickets}
        if agent_type in (PLAIN, KEYED):
            await tickets[0].result(LONG)
    for agent_type, expected in ids.items():
        assert set(await listed(submitter, agent_type)) == expected
    assert set(await listed(submitter)) == set[str]().union(*ids.values())
    assert await listed(submitter, "b") == {}


async def test_names_that_are_too_long_for_a_subject_are_listed(make: Make) -> None:
    agent = AgentId("t" * 230, "ö" * 120)
    submitter = await make(name="submitter")
    queued = await submitter.submit_message(Work("a"), agent)
    scheduled = await submitter.submit_message(Work("b"), agent, delay=3600)
    cancelled = await submitter.submit_message(Work("c"), agent)
    await cancelled.cancel()
    states = {queued.id: "queued", scheduled.id: "scheduled", cancelled.id: "cancelled"}
    for agent_type in (None, agent.type):
        assert {name: status.state for name, status in (await listed(submitter, agent_type)).items()} == states


async def test_tasks_that_go_on_meanwhile_are_listed_once_each(make: Make) -> None:
    submitter = await make(name="submitter")
    agents = [AgentId(PLAIN, f"k{number}") for number in range(300)]
    delays = [0.0 if number % 2 else 0.5 for number in range(300)]
    tickets = await asyncio.gather(
        *(submitter.submit_message(Work("a"), agent, delay=delay) for agent, delay in zip(agents, delays, strict=True))
    )
    ids = {ticket.id for ticket in tickets}
    await make(Seen())
    states: Counter[str] = Counter()
    while states.keys() != {"done"}:
        found = await listed(submitter)
        assert set(found) == ids
        states = Counter(status.state for status in found.values())


async def test_what_others_have_stored_among_results_is_no_task(make: Make) -> None:
    submitter = await make(name="submitter")
    ticket = await submitter.submit_message(Work("a"), AgentId(PLAIN, "k"))
    network = submitter.running.network
    for subject, headers in (
        (network.subjects.task("result", PLAIN, "k", "one"), {"Natsrt-Task": "plain=2Fk=2Fone"}),
        (network.subjects.task("result", PLAIN, "k", "two"), {"Natsrt-Task": "nothing"}),
        (network.subjects.task("progress", PLAIN, "k", ticket.message_id), {}),
    ):
        await network.connection.jetstream.publish(subject, b"{}", headers=headers)
    assert [status.state for status in (await listed(submitter)).values()] == ["queued"]


# -- bodies that are ready -------------------------------------------------------------------------------------------


class Echo(RoutedAgent):
    """Answers a text with its length, and bytes with their SHA-256."""

    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> int:
        return len(message)

    @rpc
    async def on_bytes(self, message: bytes, ctx: MessageContext) -> str:
        return hashlib.sha256(message).hexdigest()


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("times", [0, 2])
async def test_a_body_of_any_size_needs_no_type(make: Make, namespace: str, keyed: bool, times: int) -> None:
    submitter = await make(name="submitter")
    size = submitter.running.connection.max_payload * times + 10
    worker = NatsAgentRuntime(submitter.options.servers, namespace=namespace, keyed={"echo": keyed})
    await natsrt.register(worker, Echo, "echo", lambda: Echo("echoes"))
    async with worker:
        tickets = submitter.running.outgoing.tickets
        for body, expected in (
            (b"not JSON" + b"x" * size, f"{size + 8}"),
            (b'"' + b"x" * size + b'"', f"{size}"),
            (noise := b"\xff" + secrets.token_bytes(size), f'"{hashlib.sha256(noise).hexdigest()}"'),
        ):
            task = await submit(submitter, body, AgentId("echo", "k"))
            assert (await tickets.payload(task, LONG)).decode() == expected
        typed = await submit(submitter, b'"%b"' % (b"y" * size), AgentId("echo", "k"), "str")
        assert await tickets.payload(typed, LONG) == b"%d" % size
        with pytest.raises(ValueError, match="not JSON"):
            await submit(submitter, b"not JSON", AgentId("echo", "k"), "str")


async def test_a_body_that_is_not_json_is_stored_in_an_envelope_that_is(make: Make) -> None:
    submitter = await make(name="submitter")
    for body in (b"not JSON", b'","data":', b"\xff"):
        task = await submit(submitter, body, AgentId("echo", "k"))
        network = submitter.running.network
        stored = await network.reader.last(network.tasks.tasks, network.subjects.topic(task.topic.type, "k"))
        assert stored is not None
        whole = json.loads(stored.data)
        assert (whole["messagetype"], base64.b64decode(whole["data_base64"])) == ("", body)


async def test_a_body_whose_id_has_a_result_is_not_stored_again(make: Make) -> None:
    submitter, agent = await make(name="submitter"), AgentId(PLAIN, "k")
    await submit(submitter, b"{}", agent, message_id="first")
    ended = TaskId.of(agent, "ended")  # so long ago that the stream has forgotten its id
    await submitter.running.network.tasks.finish(ended, "done", b"7", ttl=60)
    assert await submit(submitter, b"{}", agent, message_id="ended") == ended
    assert await submit(submitter, b"{}", agent, message_id="first") == TaskId.of(agent, "first")
    assert await left(submitter, "natsrt_events_tasks") == 1
    assert await submitter.ticket(str(ended)).result(LONG) == 7


@TYPES
async def test_a_body_without_a_type_can_be_cancelled_while_it_is_handled(make: Make, agent_type: str) -> None:
    seen = Seen()
    await make(seen)
    submitter = await make(name="submitter")
    task = await submit(submitter, b'{"name": "a", "what": "wait"}', AgentId(agent_type, "k"))
    await eventually(lambda: seen.begun == ["a"])
    assert await submitter.ticket(str(task)).cancel()
    await eventually(lambda: _is_empty(submitter))
    with pytest.raises(natsrt.TaskCancelled):
        await submitter.ticket(str(task)).result(LONG)


async def _is_empty(runtime: NatsAgentRuntime) -> bool:
    return await left(runtime, "natsrt_events_tasks") == 0


async def test_where_types_are_not_found_out_a_body_without_one_fails(make: Make) -> None:
    await make(Seen(), infer_types=False)
    submitter = await make(name="submitter")
    task = await submit(submitter, b'{"name": "a"}', AgentId(PLAIN, "k"))
    with pytest.raises(natsrt.CannotDecode, match="one of Work"):
        await submitter.ticket(str(task)).result(LONG)


async def test_a_plain_message_on_the_subject_of_a_task_is_one(make: Make) -> None:
    await make(Seen())
    submitter = await make(name="submitter")
    await submitter.take_tasks(PLAIN)
    task = TaskId.of(AgentId(PLAIN, "k"), "by-hand")
    assert task_of(task.topic) == task
    network = submitter.running.network
    await network.connection.publish(network.subjects.topic(task.topic.type, "k"), b'{"name": "a"}')

    async def is_done() -> bool:
        found = (await listed(submitter)).get(str(task))
        return found is not None and found.state == "done"

    await eventually(is_done, LONG)
    assert await submitter.running.outgoing.tickets.payload(task, LONG) == b'{"name":"a","count":1,"text":""}'
    assert await submitter.ticket(str(task)).result(LONG) == {"name": "a", "count": 1, "text": ""}
