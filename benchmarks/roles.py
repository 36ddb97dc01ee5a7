"""Base classes of the processes of a peer. Each public coroutine method of a role is a command for the driver.

The timed loops are defined here, so that they are the same for every peer. A peer defines only how to call and how to
publish.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
import statistics
import time
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.setup import Place, Setup

Send = Callable[[], Awaitable[Any]]

_GIVE_UP = 120.0
"""Time limit of one measurement in seconds; it then fails."""


class Role(ABC):
    """One process of a peer. ``address`` is the address that other processes connect to; empty if they do not."""

    address = ""

    def __init__(self, place: Place, setup: Setup) -> None:
        self.place = place
        self.setup = setup

    @abstractmethod
    async def start(self) -> None:
        """Start. Returns when the other processes can use it."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop gracefully."""

    async def peak_memory(self) -> int:
        """Return the most resident memory that this process has had, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class ForgetfulRole(Role):
    """A process that can forget its peak memory, so that the peak of a part of its work is measured. On Linux only."""

    async def peak_memory(self) -> int:
        """Return the most resident memory that this process has had since `forget_peak`, in bytes."""
        return _memory("VmHWM")

    async def forget_peak(self) -> int:
        """Forget the most resident memory that this process has had. Returns what it has now, in bytes."""
        gc.collect()
        _forget_peak()
        return _memory("VmRSS")


class Worker(Role):
    """Hosts the agents."""

    async def memory(self) -> int:
        """Return the size of all Python objects in bytes. Requires ``Setup.trace_memory``."""
        gc.collect()
        return tracemalloc.get_traced_memory()[0]


class Caller(Role):
    """Calls and publishes, and measures the time."""

    @abstractmethod
    async def calling(self, size: int) -> Send:
        """Return a function that makes one call with ``size`` bytes of payload.

        Raises:
            RuntimeError: The reply to a first call is not the payload.
        """

    @abstractmethod
    async def publishing(self, size: int) -> list[Send]:
        """Return one function per publisher, which publishes one event with ``size`` bytes of payload."""

    @abstractmethod
    async def handled(self, count: int) -> None:
        """Return when every subscriber has handled ``count`` events."""

    async def calls(self, concurrency: int, count: int, size: int) -> float:
        """Make ``count`` calls by ``concurrency`` callers, each one call after the other. Returns the seconds."""
        return await self.timed(await self.calling(size), concurrency, count)

    async def timed(self, call: Send, concurrency: int, count: int) -> float:
        """Await ``call()`` ``count`` times, as `calls` does. Returns the seconds."""

        async def make(number: int) -> None:
            for _ in range(number):
                await call()

        gc.collect()
        async with asyncio.timeout(_GIVE_UP):
            began = time.perf_counter()
            await asyncio.gather(*(make(number) for number in _shares(count, concurrency)))
            return time.perf_counter() - began

    async def latency(self, count: int, size: int) -> float:
        """Make ``count`` calls one after the other. Returns the median duration of a call in seconds."""
        call = await self.calling(size)
        took = []
        gc.collect()
        async with asyncio.timeout(_GIVE_UP):
            for _ in range(count):
                began = time.perf_counter()
                await call()
                took.append(time.perf_counter() - began)
        return statistics.median(took)

    async def events(self, count: int, size: int) -> float:
        """Publish ``count`` events. Returns the seconds until every subscriber has handled all of them."""
        publishers = await self.publishing(size)

        async def publish(send: Send, number: int) -> None:
            for _ in range(number):
                await send()

        gc.collect()
        async with asyncio.timeout(_GIVE_UP):
            began = time.perf_counter()
            shares = _shares(count, len(publishers))
            await asyncio.gather(*(publish(send, share) for send, share in zip(publishers, shares, strict=True)))
            await self.handled(count)
            return time.perf_counter() - began

    async def call_once(self) -> None:
        """Make one call."""
        await self.calling(100)


def _shares(count: int, parts: int) -> list[int]:
    return [count // parts + (number < count % parts) for number in range(parts)]


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def free_address() -> str:
    """Return an address ``127.0.0.1:<port>`` whose port is free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


async def until_listening(address: str, timeout: float = 10.0) -> None:
    """Return when something accepts connections at ``address``.

    Raises:
        TimeoutError: Nothing did within ``timeout`` seconds.
    """
    host, port = address.split(":")
    async with asyncio.timeout(timeout):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                await writer.wait_closed()
                return
