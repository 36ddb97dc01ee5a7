"""Event loops whose clock jumps to the next timer, so that a schedule of a minute runs in milliseconds.

`run` runs everything in one loop. `Processes` has a loop for each simulated process, with one clock for all, so that a
process can be frozen as by SIGSTOP, and killed, with everything that runs in it.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_BEGIN = 1_000.0
"""The time in seconds at which the clock starts: not 0, as that of a real loop is not."""


class _Selector(selectors.SelectSelector):
    now = _BEGIN

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("every task waits, and no timer is left that could wake one")
            self.now += max(timeout, 0.0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Runs callbacks as any event loop, but never sleeps. For code without sockets and threads."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def block(self, seconds: float) -> None:
        """Let time pass as code does that blocks the event loop."""
        self._virtual.now += seconds


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, run in a virtual-time loop of its own."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)


class Processes:
    """Processes with one clock. Their loops run one at a time, each until it has nothing to do at this moment."""

    def __init__(self) -> None:
        self.now = _BEGIN
        self._all: list[Process] = []

    def start(self) -> Process:
        """Another process, which does nothing yet."""
        process = Process(self)
        self._all.append(process)
        return process

    def time(self) -> float:
        return self.now

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, run in a process of its own. All processes end then."""
        outcome = self.start().begin(work)
        try:
            while not outcome.done():
                due = min((one for one in self._all if not one.frozen), key=lambda one: one.wakes_at)
                if due.wakes_at == math.inf:
                    raise AssertionError("every task waits, and no timer is left that could wake one")
                self.now = max(self.now, due.wakes_at)
                due.run()
            return outcome.result()
        finally:
            for process in self._all:
                process.end()


class Process(asyncio.SelectorEventLoop):
    """The event loop of one simulated process. Code of other processes may call `begin`, `call_at` and the methods
    below."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.wakes_at = math.inf
        """When it has something to do again."""
        self.frozen = False
        self.killed = False
        super().__init__(_Idle(self))

    def time(self) -> float:
        return self._processes.now

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        self.wakes_at = min(self.wakes_at, when)
        return super().call_at(when, callback, *args, context=context)

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Run ``work`` in this process. Await the result with `result_of` in another process."""
        self.wakes_at = self.time()
        return self.create_task(work)

    def run(self) -> None:
        """Run until there is nothing to do at this moment."""
        self.run_forever()

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = self.killed

    def kill(self) -> None:
        self.frozen = self.killed = True

    def end(self) -> None:
        """Cancel everything that runs in it, and close it."""
        self.set_exception_handler(lambda loop, context: None)
        for _ in range(5):
            for task in asyncio.all_tasks(self):
                task.cancel()
            self.run_forever()
        self.close()


async def result_of(work: asyncio.Future[T]) -> T:
    """The result of what another process does."""
    here: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    work.get_loop().call_at(
        loop.time(), lambda: work.add_done_callback(lambda _: loop.call_at(loop.time(), _set_done, here))
    )
    await here
    return work.result()


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Idle(selectors.SelectSelector):
    """Ends the run of a process when it has nothing to do. There are no sockets to look at."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._process.wakes_at = math.inf if timeout is None else self._process.time() + timeout
            self._process.stop()
        return []
