"""Background tasks: they are kept alive, watched, and ended together. Public for what is built on natsrt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

from natsrt.errors import NatsrtError

_CANCEL_AGAIN = 0.1
"""Seconds after which a task that was cancelled and goes on is cancelled again."""


class BackgroundTasks:
    """Runs coroutines in background tasks.

    The event loop keeps only weak references to its tasks, so each one is kept here until it ends. An exception of a
    task is logged to ``logger`` after the text ``what``: a `NatsrtError` as a warning, any other with its traceback.
    """

    __slots__ = ("_logger", "_tasks", "_what")

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Return the number of tasks that have not ended."""
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str | None = None) -> asyncio.Task[None]:
        """Run ``work`` in a new task, called ``name``. None: asyncio makes a name."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, NatsrtError):
            self._logger.warning("%s: %s", self._what, error)
        else:
            self._logger.error("%s", self._what, exc_info=error)

    async def wait(self, timeout: float | None = None) -> None:
        """Wait until the present tasks have ended, at most ``timeout`` seconds; None: without a limit."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout)

    async def cancel(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        await end_tasks(*self._tasks)


async def end_tasks(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they have ended. What they raise is ignored.

    A cancellation may get lost: before Python 3.12, ``asyncio.wait_for`` ignores one that comes at the moment when what
    it waits for is done, and nats-py uses it. So a task that goes on is cancelled again.
    """
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=_CANCEL_AGAIN)
    await asyncio.gather(*tasks, return_exceptions=True)


async def all_of(works: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Run coroutines at the same time. When this returns or raises, all of them have ended.

    Raises what the first one that fails has raised. The others are cancelled.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end_tasks(*tasks)
