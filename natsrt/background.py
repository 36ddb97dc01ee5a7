"""Tasks that nobody awaits: kept alive, watched, and ended together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from natsrt.errors import NatsrtError


class BackgroundTasks:
    """Runs coroutines that nobody awaits, each in a task of its own.

    The event loop keeps only weak references to its tasks, so each one is kept here until it ends. What a task raises
    is logged to ``logger``, introduced by ``what``: a `NatsrtError` as a warning, anything else with its traceback.
    """

    __slots__ = ("_logger", "_tasks", "_what")

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many tasks have not ended."""
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str | None = None) -> asyncio.Task[None]:
        """Run ``work`` in a task of its own, called ``name`` (None: a number of asyncio's)."""
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
        """Wait until the present tasks have ended, at most ``timeout`` seconds; None: however long that takes."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout)

    async def cancel(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
