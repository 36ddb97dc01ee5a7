"""``natsrt tasks``: tasks that were submitted, and their results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, get_args

import click

from natsrt import TaskStatus
from natsrt.errors import NatsrtError
from natsrt.runtime import NatsAgentRuntime
from natsrt.sending.tickets import Tickets
from natsrt.task_types import TaskId, TaskState
from natsrt.wire.ranges import LARGEST

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit, answered, exit_code, is_remote
from .messages import with_option
from .moments import iso, shown
from .naming import agent_type as checked_type
from .output import as_json as print_json
from .output import json_option, line, note, printable, table
from .suggesting import Commands
from .task_results import print_result, progress_text, status_text

_STYLES = {"failed": "bold red", "waiting": "yellow", "running": "green"}


@click.group(cls=Commands)
def tasks() -> None:
    """Show tasks and their results, cancel them, and try them again.

    A task is named by its id, TYPE/KEY/ID, which `natsrt submit` prints. It is known until its result has expired.
    """


def _task(task_id: str) -> TaskId:
    """The task that an argument names."""
    try:
        return TaskId.parse(task_id)
    except ValueError as error:
        raise CommandFailed(str(error), Exit.USAGE) from None


# -- ls and show -------------------------------------------------------------------------------------------------


@tasks.command()
@click.argument("agent_type", metavar="[TYPE]", required=False)
@click.option(
    "--state", "states", type=click.Choice(get_args(TaskState)), multiple=True, help="Only those in this state."
)
@click.option("--limit", type=click.IntRange(1, LARGEST), metavar="N", help="Only the N that changed last.")
@json_option
@connects()
def ls(
    connecting: Connecting, agent_type: str | None, states: tuple[TaskState, ...], limit: int | None, as_json: bool
) -> None:
    """List tasks, of one agent type or of all. The one that changed last comes last.

    --state may be given several times.
    """

    async def read() -> list[TaskStatus]:
        asked = None if agent_type is None else checked_type(agent_type)
        async with connecting.runtime() as runtime:
            return [status async for status in runtime.tasks(asked) if not states or status.state in states]

    found = asyncio.run(read())
    found = found if limit is None else found[-limit:]
    if as_json:
        print_json([_row(status) for status in found])
    elif not found:
        note("there are no tasks" if agent_type is None and not states else "there are no such tasks")
    else:
        rows = [
            (
                status.id,
                status.state,
                status.attempt or "-",
                progress_text(status) or "-",
                status.worker_id or "-",
                _shown(status.since),
                _shown(status.due),
            )
            for status in found
        ]
        table(("TASK", "STATE", "ATTEMPT", "PROGRESS", "WORKER", "SINCE", "DUE"), rows, _STYLES)


def _shown(moment: datetime | None) -> str:
    return "-" if moment is None else shown(moment.timestamp())


def _row(status: TaskStatus) -> dict[str, Any]:
    """What is listed of a task."""
    return {
        "id": status.id,
        "state": status.state,
        "attempt": status.attempt,
        "fraction": status.fraction,
        "text": status.text,
        "worker_id": status.worker_id,
        "since": None if status.since is None else iso(status.since.timestamp()),
        "due": None if status.due is None else iso(status.due.timestamp()),
    }


@tasks.command()
@click.argument("task_id", metavar="ID")
@json_option
@connects()
def show(connecting: Connecting, task_id: str, as_json: bool) -> None:
    """Show what is known of one task; if it has failed, also its error. Exits with 4 if there is none with this id."""

    async def read() -> dict[str, Any]:
        task = _task(task_id)
        async with connecting.runtime() as runtime:
            return await _whole(runtime, task)

    row = asyncio.run(read())
    if as_json:
        print_json(row)
        return
    trace = row.pop("traceback", None)
    for name, value in row.items():
        if value is not None:
            line(printable(f"{name}: {value}"))
    if trace:
        line(printable(trace.rstrip()))


async def _whole(runtime: NatsAgentRuntime, task: TaskId) -> dict[str, Any]:
    """All that is known of a task."""
    tickets = runtime.running.outgoing.tickets
    status = await tickets.status(task)
    row = _row(status)
    result = await tickets.stored_result(task) if status.has_ended else None
    if result is not None and result.ttl is not None and status.since is not None:
        row["expires"] = iso(status.since.timestamp() + result.ttl)
    if status.state == "failed":
        try:
            await tickets.payload(task, None)
        except Exception as error:
            if not is_remote(error):
                raise
            remote = error.natsrt_remote  # type: ignore[attr-defined]
            row |= {"error": answered(with_option(error)), "traceback": remote.traceback}
    return row


# -- result ------------------------------------------------------------------------------------------------------


@tasks.command()
@click.argument("task_id", metavar="ID")
@click.option("--wait", is_flag=True, help="Wait until it has a result; --timeout limits the wait.")
@connects()
def result(connecting: Connecting, task_id: str, wait: bool) -> None:
    """Print the result of a task, as `natsrt send` prints a reply.

    Exits with 5 if it has none yet, with 6 if the task has failed, with 1 if it was cancelled, and with 4 if there is
    no such task. With --wait, its progress goes to standard error.
    """
    begun = time.monotonic()

    async def run() -> None:
        task = _task(task_id)
        async with connecting.runtime() as runtime:
            if not wait:
                status = await runtime.running.outgoing.tickets.status(task)
                if not status.has_ended:
                    text = f"{task} has no result yet: it is {status_text(status)}; --wait waits for it"
                    raise CommandFailed(printable(text), Exit.TIMEOUT)
            await print_result(connecting, runtime, task, begun)

    asyncio.run(run())


# -- cancel and retry --------------------------------------------------------------------------------------------


@tasks.command()
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@connects()
def cancel(connecting: Connecting, task_ids: tuple[str, ...]) -> int:
    """Cancel tasks. Their result is from now on that they were cancelled.

    Those that wait are not handled any more. If a handler runs, its cancellation token is set, and what it returns is
    dropped. Exits with the code of the failure if a task could not be cancelled, and with 7 if there are several such
    codes; one that has a result already is such a failure, with 1.
    """

    async def work(tickets: Tickets, task: TaskId) -> None:
        if not await tickets.cancel(task):
            status = await tickets.status(task)
            raise CommandFailed(f"{task} has a result already: it is {status.state}")

    return asyncio.run(_each(connecting, task_ids, work, "cancelled"))


@tasks.command()
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@connects()
def retry(connecting: Connecting, task_ids: tuple[str, ...]) -> int:
    """Try tasks again that have failed. Their attempts begin with 1, and their failures are forgotten.

    A task keeps its id. Exits as `natsrt tasks cancel` does; a task that has not failed is a failure, with 1.
    """

    async def work(tickets: Tickets, task: TaskId) -> None:
        if not await tickets.retry(task):
            status = await tickets.status(task)
            reason = "its dead letter is gone" if status.state == "failed" else f"it is {status_text(status)}"
            raise CommandFailed(printable(f"{task} cannot be tried again: {reason}"))

    return asyncio.run(_each(connecting, task_ids, work, "tried again"))


async def _each(
    connecting: Connecting,
    task_ids: tuple[str, ...],
    work: Callable[[Tickets, TaskId], Awaitable[None]],
    done: str,
) -> int:
    """Do ``work`` with each task that is named. Returns the exit code."""
    named, codes = [_task(task_id) for task_id in dict.fromkeys(task_ids)], set[Exit]()
    async with connecting.runtime() as runtime:
        for task in named:
            try:
                await work(runtime.running.outgoing.tickets, task)
                note(f"{done}: {task}")
            except (CommandFailed, NatsrtError) as error:
                note(f"natsrt: {error}", "error")
                codes.add(exit_code(error))
    return Exit.OK if not codes else codes.pop() if len(codes) == 1 else Exit.PROBLEMS
