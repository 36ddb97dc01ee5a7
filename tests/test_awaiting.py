"""What a task waits for, over everything with which asyncio lets a task wait for another one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from natsrt.awaiting import awaits
from tests.support.processes import eventually

Task = asyncio.Task[Any]
Way = Callable[[Task], Awaitable[Any]]


async def itself(task: Task) -> None:
    await task


async def in_a_helper(task: Task) -> None:
    await asyncio.create_task(itself(task))


async def gathered(task: Task) -> None:
    await asyncio.gather(asyncio.sleep(0), task)


async def gathered_within_a_gather(task: Task) -> None:
    await asyncio.gather(asyncio.gather(task), asyncio.sleep(0))


async def with_exceptions(task: Task) -> None:
    await asyncio.gather(task, return_exceptions=True)


async def waited_for_all(task: Task) -> None:
    await asyncio.wait([task, asyncio.create_task(asyncio.sleep(0))], timeout=30)


async def wait_for(task: Task) -> None:
    await asyncio.wait_for(task, 30)


async def wait_for_without_limit(task: Task) -> None:
    await asyncio.wait_for(task, None)


async def within_a_timeout(task: Task) -> None:
    async with asyncio.timeout(30):
        await task


async def shielded(task: Task) -> None:
    await asyncio.shield(task)


async def shielded_gather(task: Task) -> None:
    await asyncio.shield(asyncio.gather(task))


async def in_a_task_group(task: Task) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(itself(task))


async def in_a_group_within_a_group(task: Task) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(in_a_task_group(task))


async def by_a_callback(task: Task) -> None:
    ended = asyncio.get_running_loop().create_future()
    task.add_done_callback(lambda _: ended.set_result(None))
    await ended


async def by_a_partial_callback(task: Task) -> None:
    ended = asyncio.get_running_loop().create_future()
    task.add_done_callback(functools.partial(lambda future, _: future.set_result(None), ended))
    await ended


async def in_an_anyio_group(task: Task) -> None:
    anyio = pytest.importorskip("anyio")
    async with anyio.create_task_group() as group:
        group.start_soon(itself, task)


async def in_a_thread(task: Task) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(lambda: asyncio.run_coroutine_threadsafe(itself(task), loop).result())


async def in_a_gathered_thread(task: Task) -> None:
    await asyncio.gather(in_a_thread(task), asyncio.sleep(0))


def blocks_until_it_ends(task: Task) -> Callable[[], None]:
    loop = asyncio.get_running_loop()
    return lambda: asyncio.run_coroutine_threadsafe(itself(task), loop).result()


async def in_an_executor(task: Task) -> None:
    await asyncio.get_running_loop().run_in_executor(None, blocks_until_it_ends(task))


async def in_gathered_executors(task: Task) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.gather(loop.run_in_executor(None, blocks_until_it_ends(task)), asyncio.sleep(0))


async def in_an_executor_with_a_limit(task: Task) -> None:
    await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(None, blocks_until_it_ends(task)), 30)


async def in_an_executor_of_its_own(task: Task) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        await asyncio.wrap_future(pool.submit(blocks_until_it_ends(task)))


async def wrapped(task: Task) -> None:
    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(itself(task), asyncio.get_running_loop()))


async def the_only_one_of_several(task: Task) -> None:
    await asyncio.wait([task], return_when=asyncio.FIRST_COMPLETED)


async def the_last_one_as_completed(task: Task) -> None:
    for first in asyncio.as_completed([task, asyncio.create_task(asyncio.sleep(0))]):
        await first


async def waited_for_the_first(task: Task) -> None:
    never = asyncio.get_running_loop().create_future()
    await asyncio.wait([task, never], return_when=asyncio.FIRST_COMPLETED)


async def as_completed(task: Task) -> None:
    never = asyncio.get_running_loop().create_future()
    for first in asyncio.as_completed([task, never]):
        await first
        return


FOR_SURE: list[Way] = [
    itself,
    in_a_helper,
    gathered,
    gathered_within_a_gather,
    with_exceptions,
    waited_for_all,
    wait_for,
    wait_for_without_limit,
    within_a_timeout,
    shielded,
    shielded_gather,
    in_a_task_group,
    in_a_group_within_a_group,
    by_a_callback,
    by_a_partial_callback,
    in_an_anyio_group,
    in_a_thread,
    in_a_gathered_thread,
    in_an_executor,
    in_gathered_executors,
    in_an_executor_with_a_limit,
    in_an_executor_of_its_own,
    wrapped,
    the_only_one_of_several,
    the_last_one_as_completed,
]
FOR_ONE_OF_SEVERAL: list[Way] = [waited_for_the_first, as_completed]


async def nothing(task: Task, until: asyncio.Event) -> None:
    await until.wait()


async def another_task(task: Task, until: asyncio.Event) -> None:
    kept = {task}
    task.add_done_callback(kept.discard)
    other = asyncio.create_task(until.wait())
    kept.add(other)
    other.add_done_callback(kept.discard)
    await other


async def only_cancels(task: Task, until: asyncio.Event) -> None:
    other = asyncio.create_task(until.wait())
    task.add_done_callback(lambda _: other.get_name())
    await other


async def the_body_of_a_group(task: Task, until: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(itself(task))
        await until.wait()


async def a_thread_that_waits_for_nobody(task: Task, until: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(lambda: asyncio.run_coroutine_threadsafe(until.wait(), loop).result())


async def another_thread(task: Task, until: asyncio.Event) -> None:
    background = asyncio.create_task(asyncio.to_thread(blocks_until_it_ends(task)))
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(lambda: asyncio.run_coroutine_threadsafe(until.wait(), loop).result())
    await background


NOT: list[Callable[[Task, asyncio.Event], Awaitable[Any]]] = [
    nothing,
    another_task,
    only_cancels,
    the_body_of_a_group,
    a_thread_that_waits_for_nobody,
    another_thread,
]


async def _run(work: Awaitable[Any]) -> None:
    await work


@pytest.mark.parametrize("way", [*FOR_SURE, *FOR_ONE_OF_SEVERAL], ids=lambda way: way.__name__)
async def test_a_task_that_waits_for_another_one_is_found(way: Way) -> None:
    end = asyncio.Event()
    awaited: Task = asyncio.create_task(end.wait())
    waiter = asyncio.create_task(_run(way(awaited)))
    await eventually(lambda: awaits(waiter, awaited, surely=way in FOR_SURE))
    assert awaits(waiter, awaited)
    assert awaits(waiter, awaited, surely=True) is (way in FOR_SURE)
    assert not awaits(awaited, waiter)
    bystander = asyncio.create_task(end.wait())
    await asyncio.sleep(0)
    assert not awaits(waiter, bystander) and not awaits(bystander, awaited)
    end.set()
    await waiter
    assert not awaits(waiter, awaited)
    await bystander


@pytest.mark.parametrize("way", NOT, ids=lambda way: way.__name__)
async def test_a_task_that_waits_for_something_else_does_not_count(
    way: Callable[[Task, asyncio.Event], Awaitable[Any]],
) -> None:
    end, until = asyncio.Event(), asyncio.Event()
    awaited: Task = asyncio.create_task(end.wait())
    waiter = asyncio.create_task(_run(way(awaited, until)))
    for _ in range(10):
        await asyncio.sleep(0.001)
        assert not awaits(waiter, awaited) and not awaits(waiter, awaited, surely=True)
    end.set()
    await awaited
    until.set()
    await waiter


async def test_a_task_waits_for_what_it_does_itself() -> None:
    task = asyncio.current_task()
    assert task is not None and awaits(task, task, surely=True)
