"""What the tests of calls share: runtimes, workers with laborers, and proof that a call ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from natsrt import NatsAgentRuntime
from tests.programs import labor
from tests.support.processes import Process, Processes

PROGRAM = Path(labor.__file__).with_name("labor_worker.py")


@asynccontextmanager
async def running(url: str, namespace: str, *agent_types: str, **settings: Any) -> AsyncIterator[NatsAgentRuntime]:
    """A runtime in this process, hosting laborers of ``agent_types``."""
    runtime = NatsAgentRuntime(url, namespace=namespace, **settings)
    await runtime.start()
    try:
        await labor.host(runtime, *agent_types)
        yield runtime
    finally:
        await runtime.close()


async def worker_process(
    processes: Processes, url: str, namespace: str, *agent_types: str, **settings: Any
) -> tuple[Process, str]:
    """A worker in a process of its own, ready, and its worker id."""
    process = processes.python(PROGRAM, url, namespace, json.dumps(settings), *agent_types, name="worker")
    ready = await process.wait_for_line("ready ", timeout=20.0)
    return process, ready.removeprefix("ready ")


async def known(runtime: NatsAgentRuntime, *agent_types: str) -> None:
    """Return when the runtime's view of the registry lists a live worker for each type."""
    async with asyncio.timeout(10):
        for agent_type in agent_types:
            while not runtime.running.registry.view.workers_hosting(agent_type):
                await asyncio.sleep(0.01)


async def ended(call: Awaitable[Any], within: float = 5.0) -> asyncio.Task[Any]:
    """The ended task of ``call``; fails if it has not ended ``within`` seconds."""
    task = asyncio.ensure_future(call)
    await asyncio.wait({task}, timeout=within)
    if not task.done():
        task.cancel()
        raise AssertionError(f"the call hangs: it has not ended within {within:g} s")
    return task  # type: ignore[return-value]


async def failure(call: Awaitable[Any], within: float = 5.0) -> BaseException:
    """What ``call`` raises, ``within`` seconds."""
    task = await ended(call, within)
    if task.cancelled():
        return asyncio.CancelledError()
    error = task.exception()
    assert error is not None, f"the call returned {task.result()!r}"
    return error
