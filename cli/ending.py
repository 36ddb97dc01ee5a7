"""Ending a process although something in it goes on."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from .exits import Exit
from .output import note

_SHUTDOWN = "shutdown"
"""Part of the names of asyncio's own thread and task that wait for the threads of its executor."""


def end_within(seconds: float, loop: asyncio.AbstractEventLoop) -> None:
    """End this process with `Exit.STUCK` if it has not ended by itself in ``seconds`` seconds.

    A line on standard error then names the threads and tasks that were left.
    """
    timer = threading.Timer(seconds, _end, (seconds, loop))
    timer.daemon = True
    timer.start()


def _end(seconds: float, loop: asyncio.AbstractEventLoop) -> None:
    left = [*_threads(), *_tasks(loop)]
    note(f"still running {seconds:g} s after the stop: {', '.join(left) or 'something unknown'}; ending the process")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(Exit.STUCK)


def _threads() -> Iterator[str]:
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread is threading.main_thread() or thread is threading.current_thread() or thread.daemon:
            continue
        if _SHUTDOWN in thread.name:
            continue
        yield f"thread {thread.name}{_place(frames.get(thread.ident or 0))}"


def _tasks(loop: asyncio.AbstractEventLoop) -> Iterator[str]:
    try:
        tasks = list(asyncio.all_tasks(loop))
    except RuntimeError:  # the set changed, or the loop is closed
        return
    for task in tasks:
        if _SHUTDOWN in repr(task.get_coro()):
            continue
        yield f"task {task.get_name()}{_place(next(iter(task.get_stack(limit=1)), None))}"


def _place(frame: FrameType | None) -> str:
    """Where a frame is, to be put after a name; empty if there is none."""
    return "" if frame is None else f" at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
