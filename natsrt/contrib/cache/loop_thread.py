"""An event loop in a thread of its own, for callers that cannot await."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, Final, TypeVar

from natsrt.background import end_tasks

T = TypeVar("T")

_END_WITHIN: Final = 5.0
"""Seconds within which the thread ends. It waits for nothing then but for its own tasks to be cancelled."""


class LoopThread:
    """A thread with an event loop, from its construction until `stop`. It keeps no process from exiting."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            while left := asyncio.all_tasks(self._loop):
                self._loop.run_until_complete(end_tasks(*left))
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()

    @property
    def is_current(self) -> bool:
        """True in the thread itself, which may neither `run` nor `stop`. The garbage collector may run there."""
        return threading.current_thread() is self._thread

    def run(self, work: Coroutine[Any, Any, T], timeout: float) -> T:
        """The result of ``work``, which the thread runs. ``work`` is cancelled if the caller is interrupted.

        Raises what ``work`` raises, TimeoutError if it has not ended after ``timeout`` seconds, and the
        ``CancelledError`` of concurrent.futures if the thread is stopped meanwhile, or was before.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise CancelledError from None
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()  # has no effect if it has ended
            raise

    def stop(self) -> None:
        """End the thread and its loop, and cancel what `run` waits for. Has no effect if it has ended."""
        try:
            self._loop.call_soon_threadsafe(self._loop.stop)
        except RuntimeError:  # the loop is closed
            return
        self._thread.join(_END_WITHIN)
