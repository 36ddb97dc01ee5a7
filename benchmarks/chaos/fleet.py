"""Worker processes that are killed and replaced, and their callers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

from benchmarks.chaos import counters
from benchmarks.chaos.crew import Crew, Hand, ask_all, ledgers_of
from benchmarks.chaos.history import End, History
from benchmarks.chaos.roles import until
from benchmarks.chaos.scenario import Figure, under
from benchmarks.teams import ProcessFailed
from natsrt.embedded import EmbeddedServer

_GIVE_UP = 240.0


class Fleet:
    """A server, worker processes and caller processes. Use it with ``async with``.

    Args:
        workers: Number of processes that host the agents.
        callers: Number of processes that call the agents.
        tap: Whether another client subscribes to every subject.
        module: Name of the module with the roles ``worker``, ``caller`` and ``tap``.
        called: Settings of the callers' runtimes.
        settings: Settings of the workers' runtimes.
    """

    def __init__(
        self,
        *,
        workers: int = 3,
        callers: int = 4,
        tap: bool = False,
        module: str = counters.__name__,
        called: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self._counts = (workers, callers)
        self._tap = tap
        self._called = dict(called or {})
        self._settings = settings
        self.server = EmbeddedServer()
        self._crew = Crew(module)
        self.workers: dict[str, Hand] = {}
        """The running workers by worker id."""
        self.callers: list[Hand] = []
        self.ends: list[End] = []
        """The ends of workers that were killed or stopped, in order."""

    async def __aenter__(self) -> Fleet:
        await self.server.start()
        try:
            workers, callers = self._counts
            if self._tap:
                await self._crew.start("tap", self.server.url)
            self.callers = await self._crew.start_all("caller", [self.server.url] * callers, **self._called)
            await asyncio.gather(*(self.start_worker() for _ in range(workers)))
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        await self._crew.__aexit__(None, None, None)
        await self.server.stop()

    async def start_worker(self) -> None:
        """Start one more worker. It accepts messages when this returns.

        Raises:
            ProcessFailed: It did not start.
        """
        hand = await self._crew.start("worker", self.server.url, **self._settings)
        self.workers[(await hand.ask("health"))["worker_id"]] = hand

    async def kill(self, worker_id: str) -> None:
        """Kill a worker with SIGKILL."""
        hand = self.workers.pop(worker_id)
        self.ends.append(End(worker_id, time.monotonic()))
        await hand.kill()

    async def end_in_order(self, worker_id: str) -> None:
        """Stop a worker with SIGTERM, and wait until it has ended."""
        hand = self.workers.pop(worker_id)
        self.ends.append(End(worker_id, time.monotonic()))
        hand.terminate()
        await hand.gone()

    @asynccontextmanager
    async def dying(self, every: float) -> AsyncIterator[None]:
        """While the block runs, kill a random worker every ``every`` seconds, and start a new one at once.

        The last running worker is not killed, so that another worker can take over the agents of a killed one. A worker
        that cannot start, as while the server is away, is started again.
        """
        starting: set[asyncio.Task[None]] = set()

        async def keep_killing() -> None:
            while True:
                await asyncio.sleep(every)
                if len(self.workers) > 1:
                    await self.kill(random.choice(list(self.workers)))
                    starting.add(asyncio.create_task(self._replace()))

        killing = asyncio.create_task(keep_killing())
        try:
            yield
        finally:
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)
            await asyncio.gather(*starting)

    async def _replace(self) -> None:
        deadline = time.monotonic() + _GIVE_UP
        while True:
            try:
                await self.start_worker()
                return
            except ProcessFailed:
                if time.monotonic() > deadline:
                    raise

    async def ended(self, count: int) -> None:
        """Return when each caller has ended its share of ``count`` calls, or after `_GIVE_UP` seconds."""
        await ask_all(self.callers, "ended", count=-(-count // len(self.callers)), seconds=_GIVE_UP)

    async def deaths(self, count: int) -> None:
        """Return when ``count`` workers have ended, or after `_GIVE_UP` seconds."""
        await until(lambda: len(self.ends) >= count, _GIVE_UP)

    async def history(self, keys: Sequence[str]) -> History:
        """Stop the load of the callers. Returns their calls and the stored states of the counters with these keys."""
        ledgers = await ledgers_of(self.callers)
        return History(ledgers, await self.callers[0].ask("stored", keys=list(keys)))


async def also_beside_a_tap(measure: Callable[[bool], Awaitable[Sequence[Figure]]]) -> list[Figure]:
    """Return the figures of ``measure(tap)`` without a tap and with one."""
    return [*await measure(False), *under("beside a tap", await measure(True))]
