"""Ending a process although something in it goes on."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from .exits import Exit
from .output import note, written_to_the_end

_SHUTDOWN = "shutdown"
"""Part of the names of asyncio's own thread and task that wait for the threads of its executor."""


def end_within(seconds: float, loop: asyncio.AbstractEventLoop) -> threading.Timer:
    """End this process with `Exit.STUCK` if it has not ended by itself in ``seconds`` seconds.

    Returns the timer, which may be cancelled.

    A line on standard error then names the threads and tasks that were left.
    """
    timer = threading.Timer(seconds, _end, (seconds, loop))
    timer.daemon = True
    timer.start()
    return timer


def _end(seconds: float, loop: asyncio.AbstractEventLoop) -> None:
    left = [*_threads(), *_tasks(loop), *_children()]
    what = ", ".join(left) or "what runs at the exit (atexit)"
    note(f"still running {seconds:g} s after the stop: {what}; ending the process")
    written_to_the_end()
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
        yield f"task {task.get_name()}{_place(_innermost(task))}"


def _innermost(task: asyncio.Task[Any]) -> FrameType | None:
    """Where a task waits: the innermost frame of its coroutines that is not in asyncio; None if there is none."""
    found: FrameType | None = None
    coroutine: Any = task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        if not frame.f_code.co_filename.startswith(os.path.dirname(asyncio.__file__)):
            found = frame
        coroutine = getattr(coroutine, "cr_await", None)
    return found


def _children() -> Iterator[str]:
    """The processes of ``multiprocessing`` that this one waits for at its end."""
    for child in multiprocessing.active_children():
        if not child.daemon:
            yield f"process {child.name} ({child.pid})"


def _place(frame: FrameType | None) -> str:
    """Where a frame is, to be put after a name; empty if there is none."""
    return "" if frame is None else f" at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
