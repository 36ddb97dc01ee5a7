"""Background tasks end when they are told to, even if a cancellation gets lost."""

from __future__ import annotations

import asyncio
import logging

import pytest

from natsrt.background import BackgroundTasks, all_of, end_tasks


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


async def test_the_first_failure_ends_what_runs_at_the_same_time_and_is_raised() -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("cancelled")

    with pytest.raises(ValueError, match="as told"):
        await asyncio.wait_for(all_of([waits(), fails(), waits()]), 5)
    assert ended == ["cancelled"] * 2


async def test_all_that_runs_at_the_same_time_has_ended_when_it_returns() -> None:
    ended: list[int] = []

    async def works(number: int) -> None:
        await asyncio.sleep(0)
        ended.append(number)

    await all_of(map(works, range(3)))
    assert ended == [0, 1, 2]
