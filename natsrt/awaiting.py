"""What a task waits for: whether it goes on only after another task has ended.

asyncio has no public way to ask this before Python 3.14. But a future knows what to call when it is done, so the
question can be followed from the awaited task to those that wait for it: over ``await task``, ``gather``, ``wait``,
``wait_for``, ``shield``, ``as_completed``, task groups (those of AnyIO too), and threads that wait for a coroutine.

Waiting that goes over anything else, such as an `asyncio.Event` or an `asyncio.Queue` of the user's own, is not seen.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

AnyFuture = asyncio.Future[Any]

_THREAD_HAS_ENDED = "_chain_future.<locals>._call_check_cancel"
"""The callback of a future that asyncio completes when a thread has ended."""
_ONE_OF_SEVERAL = "_wait.<locals>._on_completion"
"""The callback that `asyncio.wait` adds to each future that it waits for."""


def awaits(waiter: asyncio.Task[Any], awaited: asyncio.Task[Any], *, surely: bool = False) -> bool:
    """Return True if ``waiter`` is ``awaited``, or is suspended until ``awaited`` has ended.

    With ``surely``, False also if ``waiter`` may go on earlier because it waits for the first of several.
    """
    if waiter is awaited:
        return True
    if waiter.done() or awaited.done():
        return False
    seen: set[AnyFuture] = {awaited}
    ahead: list[AnyFuture] = [awaited]
    while ahead:
        for following in _ended_by(ahead.pop(), surely):
            if following is waiter:
                return True
            if following not in seen and not following.done():
                seen.add(following)
                ahead.append(following)
    return False


def _ended_by(future: AnyFuture, surely: bool) -> Iterator[AnyFuture]:
    """The tasks that wait for ``future``, and the futures that are completed when it is."""
    for callback, _context in getattr(future, "_callbacks", None) or ():
        owner = getattr(callback, "__self__", None)
        if isinstance(owner, asyncio.Task):
            if callback.__name__.endswith("wakeup"):  # the task is suspended at this future
                yield owner
            continue
        for part in (owner, *_parts_of(callback, surely)):
            yield from _futures_of(part, surely)


def _parts_of(callback: Any, surely: bool) -> Iterable[Any]:
    """What a callback has been given: the arguments of a partial function, the variables of an inner function."""
    if isinstance(callback, partial):
        return (*callback.args, *callback.keywords.values())
    function = getattr(callback, "__func__", callback)
    cells = getattr(function, "__closure__", None) or ()
    values = dict(zip(function.__code__.co_freevars if cells else (), map(_content, cells), strict=True))
    if surely and function.__qualname__ == _ONE_OF_SEVERAL and values.get("return_when") == asyncio.FIRST_COMPLETED:
        return ()
    return values.values()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # its variable has no value yet
        return None


def _futures_of(part: Any, surely: bool) -> Iterator[AnyFuture]:
    """The futures that are completed by a callback that has ``part``."""
    if isinstance(part, asyncio.Task):
        return  # only its own end completes it
    if asyncio.isfuture(part):
        yield part
    elif isinstance(part, concurrent.futures.Future):
        if part._condition._waiters:  # type: ignore[attr-defined]  # a thread is blocked until it is done
            yield from _suspended_by_threads()
    elif isinstance(group_ended := getattr(part, "_on_completed_fut", None), asyncio.Future):
        yield group_ended
    elif not surely:
        queue = part if isinstance(part, asyncio.Queue) else getattr(part, "_done", None)  # of as_completed
        if isinstance(queue, asyncio.Queue):
            yield from queue._getters  # type: ignore[attr-defined]


def _suspended_by_threads() -> Iterator[AnyFuture]:
    """The futures of all tasks that are suspended until a thread has ended. Which thread it is cannot be found out."""
    for task in asyncio.all_tasks():
        future: AnyFuture | None = getattr(task, "_fut_waiter", None)
        for callback, _context in getattr(future, "_callbacks", None) or ():
            if future is not None and getattr(callback, "__qualname__", "") == _THREAD_HAS_ENDED:
                yield future
