"""What a task waits for: whether it goes on only after another task has ended.

asyncio has no public way to ask this before Python 3.14. But a future knows what to call when it is done, so the
question can be followed from the awaited task to those that wait for it: over ``await task``, ``gather``, ``wait``,
``wait_for``, ``shield``, ``as_completed``, task groups (those of AnyIO too), and threads of an executor that are
blocked until a coroutine has ended.

Waiting that goes over anything else, such as an `asyncio.Event` or an `asyncio.Queue` of the user's own, is not seen.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any

AnyFuture = asyncio.Future[Any]

_ONE_OF_SEVERAL = "_wait.<locals>._on_completion"
"""The callback that `asyncio.wait` adds to each future that it waits for."""
_AS_COMPLETED = "as_completed.<locals>._on_completion"
"""The callback that `asyncio.as_completed` adds to each future, before Python 3.13."""


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
        return values.values() if values.get("counter") == 1 else ()
    if surely and function.__qualname__ == _AS_COMPLETED and len(values.get("todo", ())) > 1:
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
        yield from _completed_by(part, surely)
        for job in _blocked_jobs(part):
            yield from _completed_by(job, surely)
    elif isinstance(group_ended := getattr(part, "_on_completed_fut", None), asyncio.Future):
        yield group_ended
    elif isinstance(part, asyncio.Queue):
        yield from part._getters  # type: ignore[attr-defined]
    elif isinstance(queue := getattr(part, "_done", None), asyncio.Queue) and (not surely or len(part._todo) == 1):
        yield from queue._getters  # type: ignore[attr-defined]  # of as_completed, from Python 3.13 on


def _completed_by(future: concurrent.futures.Future[Any], surely: bool) -> Iterator[AnyFuture]:
    """The futures of event loops that are completed when a future of threads is."""
    for callback in future._done_callbacks:  # type: ignore[attr-defined]
        for part in _parts_of(callback, surely):
            if asyncio.isfuture(part) and not isinstance(part, asyncio.Task):
                yield part


def _blocked_jobs(future: concurrent.futures.Future[Any]) -> Iterator[concurrent.futures.Future[Any]]:
    """The futures of the jobs of executors that are blocked, in their threads, until ``future`` is done."""
    for frame in sys._current_frames().values():
        is_blocked = False
        at: FrameType | None = frame
        while at is not None:
            owner = at.f_locals.get("self") if at.f_code.co_name in ("result", "exception", "run") else None
            is_blocked |= owner is future
            job = getattr(owner, "future", None)
            if is_blocked and at.f_code.co_name == "run" and isinstance(job, concurrent.futures.Future):
                yield job
            at = at.f_back
