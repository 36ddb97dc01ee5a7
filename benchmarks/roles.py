"""What the processes of a peer do. Each public coroutine method of a role is a command that the driver can give.

The loops that are timed stand here once, so that they are the same for every peer. A peer says only how to call and
how to publish.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import statistics
import time
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.setup import Place, Setup

Send = Callable[[], Awaitable[Any]]

_GIVE_UP = 120.0
"""Seconds after which one measurement has failed."""


class Role(ABC):
    """One process of a peer. ``address`` is where the other processes find it, if that is what it is for."""

    address = ""

    def __init__(self, place: Place, setup: Setup) -> None:
        self.place = place
        self.setup = setup

    @abstractmethod
    async def start(self) -> None:
        """Return when others can rely on it."""

    @abstractmethod
    async def stop(self) -> None:
        """End in order."""


class Worker(Role):
    """Hosts the agents."""

    async def memory(self) -> int:
        """Bytes of all Python objects; needs ``Setup.trace_memory``."""
        gc.collect()
        return tracemalloc.get_traced_memory()[0]


class Caller(Role):
    """Calls and publishes, and times it."""

    @abstractmethod
    async def calling(self, size: int) -> Send:
        """What makes one call with ``size`` bytes of payload. Raises where the reply is not the payload."""

    @abstractmethod
    async def publishing(self, size: int) -> list[Send]:
        """What publishes one event with ``size`` bytes of payload, for each publisher."""

    @abstractmethod
    async def handled(self, count: int) -> None:
        """Return when every subscriber has handled ``count`` events."""

    async def calls(self, concurrency: int, count: int, size: int) -> float:
        """Seconds for ``count`` calls by ``concurrency`` callers, each of which makes one after the other."""
        return await self.timed(await self.calling(size), concurrency, count)

    async def timed(self, call: Send, concurrency: int, count: int) -> float:
        """The same for any ``call``."""

        async def make(number: int) -> None:
            for _ in range(number):
                await call()

        gc.collect()
        async with asyncio.timeout(_GIVE_UP):
            began = time.perf_counter()
            await asyncio.gather(*(make(number) for number in _shares(count, concurrency)))
            return time.perf_counter() - began

    async def latency(self, count: int, size: int) -> float:
        """The median of the seconds that one call takes, ``count`` times one after the other."""
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
        """Seconds from the first of ``count`` events until every subscriber has handled all of them."""
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
        """One call."""
        await self.calling(100)


def _shares(count: int, parts: int) -> list[int]:
    return [count // parts + (number < count % parts) for number in range(parts)]


def free_address() -> str:
    """``127.0.0.1:<port>``, free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


async def until_listening(address: str, timeout: float = 10.0) -> None:
    """Return when something accepts connections at ``address``. Raises TimeoutError."""
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
