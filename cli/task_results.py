"""Waiting for the result of a task on the command line."""

from __future__ import annotations

import asyncio
import time

from natsrt import TaskStatus
from natsrt.background import end_tasks
from natsrt.errors import CallTimeout, NatsrtError
from natsrt.runtime import NatsAgentRuntime
from natsrt.sending.tickets import Tickets
from natsrt.task_types import TaskId

from .connecting import Connecting
from .exits import CommandFailed, Exit, is_remote
from .messages import with_option
from .moments import shown
from .output import line, note, printable


async def print_result(connecting: Connecting, runtime: NatsAgentRuntime, task: TaskId, begun: float) -> None:
    """Wait for the result of a task, and print it as ``natsrt send`` does. Its progress goes to standard error.

    ``--timeout`` limits the wait, from ``begun`` on, by `time.monotonic`. Raises what the task's handler raised.
    """
    tickets = runtime.running.outgoing.tickets
    telling = asyncio.create_task(_tell_progress(tickets, task))
    try:
        payload = await tickets.payload(task, _time_left(connecting, runtime, begun))
    except asyncio.CancelledError:
        note(f"{task} goes on; to wait again: natsrt tasks result {task} --wait")
        raise
    except Exception as error:
        if is_remote(error):
            raise with_option(error) from None
        if isinstance(error, CallTimeout):
            text = f"{task} goes on: it has no result within --timeout = {runtime.options.connect_timeout:g} s"
            raise CommandFailed(text, Exit.TIMEOUT) from None
        raise
    finally:
        await end_tasks(telling)
    line(payload.decode("utf-8", "backslashreplace"))


def _time_left(connecting: Connecting, runtime: NatsAgentRuntime, begun: float) -> float | None:
    """Seconds that are left of ``--timeout``; None if it was not given."""
    if connecting.timeout is None:
        return None
    # The text of --timeout is also the setting connect_timeout, which has converted and checked it.
    return max(runtime.options.connect_timeout - (time.monotonic() - begun), 0.001)


async def _tell_progress(tickets: Tickets, task: TaskId) -> None:
    try:
        async for status in tickets.follow(task):
            if not status.has_ended:
                note(printable(status_text(status)))
    except NatsrtError:  # the wait for the result says what is wrong
        pass


def status_text(status: TaskStatus) -> str:
    """A status in words."""
    text: str = status.state
    if status.attempt is not None and status.attempt > 1:
        text += f", attempt {status.attempt}"
    if status.due is not None:
        text += f", due {shown(status.due.timestamp())}"
    if progress := progress_text(status):
        text += f": {progress}"
    return text


def progress_text(status: TaskStatus) -> str:
    """What a task's handler has said, in one line; empty if it said nothing."""
    done = [] if status.fraction is None else [f"{status.fraction:.0%}"]
    return " ".join([*done, *(status.text or "").split()])
