"""Background tasks end when they are told to, even if a cancellation gets lost."""

from __future__ import annotations

import asyncio
import logging

from natsrt.background import BackgroundTasks, end_tasks


async def ignores_cancellations(times: int) -> None:
    """What ``asyncio.wait_for`` does before Python 3.12 if it is cancelled when what it waits for is done."""
    for _ in range(times):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue
    await asyncio.Event().wait()


async def fails() -> None:
    raise ValueError("as told")


async def test_tasks_end_although_a_cancellation_was_lost() -> None:
    tasks = BackgroundTasks(logging.getLogger("tests"), "a task failed")
    stubborn = [tasks.spawn(ignores_cancellations(times)) for times in (0, 1, 2)]
    await asyncio.sleep(0)
    await asyncio.wait_for(tasks.cancel(), 5)
    assert all(task.cancelled() for task in stubborn) and len(tasks) == 0


async def test_what_tasks_raise_at_their_end_is_ignored() -> None:
    failed = asyncio.ensure_future(fails())
    waiting = asyncio.ensure_future(ignores_cancellations(1))
    await asyncio.wait({failed})
    await asyncio.wait_for(end_tasks(failed, waiting), 5)
    assert waiting.cancelled() and failed.exception() is not None


async def test_ending_nothing_returns_at_once() -> None:
    await asyncio.wait_for(end_tasks(), 5)
