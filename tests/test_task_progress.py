"""What is told of a task while it is handled, and after that."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, rpc

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.task_types import TaskId
from tests.programs.task_worker import Work
from tests.support.processes import eventually
from tests.test_tasks import LONG, TYPES, Make, Seen, make

__all__ = ["make"]

STEPS = ("running", "waiting", "failed")


class Hasty(RoutedAgent):
    """Says how far it is, and fails some rounds of the event loop later."""

    @rpc
    async def on_work(self, message: Work, ctx: MessageContext) -> None:
        natsrt.progress(0.5, "half")
        for _ in range(message.size):
            await asyncio.sleep(0)
        raise ValueError("at once")


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("rounds", range(4))
async def test_what_a_failed_attempt_said_is_not_told_after_its_end(
    make: Make, namespace: str, keyed: bool, rounds: int
) -> None:
    submitter = await make(name="submitter")
    settings: dict[str, Any] = {"keyed": {"hasty": keyed}, "retry_delay": 0.3, "retry_delay_max": 0.3}
    worker = NatsAgentRuntime(submitter.options.servers, namespace=namespace, **settings)
    await natsrt.register(worker, Hasty, "hasty", lambda: Hasty("fails"))
    async with worker:
        ticket = await submitter.submit_message(Work("a", size=rounds), AgentId("hasty", "k"), retries=2)
        told = [(status.attempt, status.state) async for status in ticket]
        states = [(one[0], STEPS.index(one[1])) for one in told if one[0] is not None]
        assert {(1, "waiting"), (2, "waiting"), (3, "failed")} <= set(told)
        assert states == sorted(states), told  # "running" before "waiting", and both before the next attempt
        network, subjects = submitter.running.network, submitter.running.network.subjects
        subject = subjects.task("progress", "hasty", "k", ticket.message_id)

        async def nothing_is_told() -> bool:
            progress = await network.reader.last(network.tasks.stream, subject)
            return progress is None or progress.data == b"{}"

        await eventually(nothing_is_told)


@TYPES
async def test_a_task_that_is_tried_again_by_hand_begins_anew(make: Make, agent_type: str) -> None:
    submitter = await make(name="submitter")
    worker = await make(Seen(fails=Counter(a=3)))
    ticket = await submitter.submit_message(Work("a"), AgentId(agent_type, "k"))
    with pytest.raises(natsrt.RemoteAgentError):
        await ticket.result(LONG)
    await worker.close()
    network = submitter.running.network
    # As a worker leaves it that dies when it has stored the result.
    await network.tasks.tell(TaskId.parse(ticket.id), "running", attempt=3)
    assert await submitter.running.outgoing.tickets.retry(TaskId.parse(ticket.id))
    assert (await ticket.status()).state == "queued"
