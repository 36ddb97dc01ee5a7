"""``natsrt submit``: submitting tasks from a terminal."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime

import click
from autogen_core import AgentId

from natsrt.runtime import NatsAgentRuntime
from natsrt.task_types import TaskId, checked_result_ttl
from natsrt.wire.task_attributes import MOST

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .messages import given_body, type_name_option
from .moments import Duration, Time
from .moments import due as due_then
from .naming import DEFAULT, agent_id
from .output import line, note
from .task_results import print_result


@dataclass(frozen=True, slots=True)
class _Task:
    """A task that is to be submitted. None is as in `Sender.submit_body`, and for ``result_ttl`` the setting."""

    agent: AgentId
    body: bytes
    type_name: str | None
    message_id: str | None
    due: datetime | None
    retries: int | None
    result_ttl: float | None

    async def submit(self, runtime: NatsAgentRuntime) -> TaskId:
        session = runtime.running
        try:
            ttl = checked_result_ttl(runtime.options.result_ttl if self.result_ttl is None else self.result_ttl)
            if self.message_id is not None:
                TaskId.of(self.agent, self.message_id)
            await session.membership.take_tasks(self.agent.type)
            return await session.outgoing.tasks.submit_body(
                self.body,
                self.agent,
                self.type_name,
                message_id=self.message_id,
                due=self.due,
                attempts=None if self.retries is None else self.retries + 1,
                result_ttl=ttl,
            )
        except ValueError as error:
            raise CommandFailed(str(error), Exit.USAGE) from None


@click.command()
@click.argument("agent", metavar="TYPE[/KEY]")
@click.argument("body", required=False)
@type_name_option
@click.option("--delay", type=Duration(), help="Have it handled after this time: 90s, 24h.")
@click.option("--at", type=Time(), help="Have it handled at this time: 2030-01-31T09:00:00Z.")
@click.option(
    "--retries",
    type=click.IntRange(0, MOST - 1),
    metavar="N",
    help="How often it is tried again after it has failed. [default: as the agent type's workers say]",
)
@click.option("--result-ttl", type=Duration(), help="How long its result is kept. [default: the setting result_ttl]")
@click.option(
    "--message-id", metavar="ID", help="Tasks of one agent with the same id are one task. [default: a new id]"
)
@click.option("--wait", is_flag=True, help="Wait for the result, and print it.")
@connects()
def submit(
    connecting: Connecting,
    agent: str,
    body: str | None,
    type_name: str | None,
    delay: float | None,
    at: datetime | None,
    retries: int | None,
    result_ttl: float | None,
    message_id: str | None,
    wait: bool,
) -> None:
    """Submit a task: a call that is stored until it is handled, and whose result is stored too.

    Prints the id of the task, for `natsrt tasks`. With --wait, the id and the progress go to standard error; the result
    is printed, or the error told, as `natsrt send` does. --timeout then limits the wait. The task goes on when the time
    is up, or after Ctrl-C.

    BODY is the message as JSON; "-", or no BODY with a pipe, reads it from standard input. It may have any size.
    Without KEY, the key is "default".

    \b
    natsrt submit upper/demo '{"text": "hi"}' --wait
    """
    begun = time.monotonic()
    due = due_then(delay, at)
    named = agent_id(agent, default_key=DEFAULT)
    task = _Task(named, given_body(body), type_name, message_id, due, retries, result_ttl)
    asyncio.run(_submit(connecting, task, wait, begun))


async def _submit(connecting: Connecting, task: _Task, wait: bool, begun: float) -> None:
    async with connecting.runtime() as runtime:
        submitted = await task.submit(runtime)
        agent_type = task.agent.type
        if not runtime.running.registry.view.workers_hosting(agent_type):
            note(f"no live worker hosts {agent_type!r} now; the task waits for one")
        if wait:
            note(str(submitted))
            await print_result(connecting, runtime, submitted, begun)
        else:
            line(str(submitted))
