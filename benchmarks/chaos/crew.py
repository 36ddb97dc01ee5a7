"""Starts, controls, kills and freezes the processes of one scenario."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from benchmarks.chaos import roles
from benchmarks.chaos.ledger import Ledger
from benchmarks.peers import Peer
from benchmarks.setup import Place, Setup
from benchmarks.teams import Member


class Hand(Member):
    """One process. `ask` runs commands in it, one at a time."""

    async def kill(self) -> None:
        """Kill the process with SIGKILL, and wait until it has ended. Does nothing if it has already ended."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    async def gone(self, seconds: float = 60.0) -> None:
        """Wait until the process has ended by itself.

        Raises:
            TimeoutError: It did not end within ``seconds``.
        """
        async with asyncio.timeout(seconds):
            await self._process.wait()

    def freeze(self) -> None:
        """Freeze the process with SIGSTOP. Its connections stay open."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume the process with SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        """Resume the process if it is frozen, and let it end by itself. Kill it if it does not end in time."""
        if self._process.returncode is None:
            self.resume()
        await super().stop()


class Crew:
    """Processes that share a namespace. Use it with ``async with``, which kills the remaining processes at its end.

    Args:
        module: Name of the module that defines their ``ROLES``.
    """

    def __init__(self, module: str = roles.__name__) -> None:
        self.namespace = f"chaos{secrets.token_hex(4)}"
        self._peer = Peer(name="chaos", title="chaos", module=module)
        self._hands: list[Hand] = []

    async def __aenter__(self) -> Crew:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.gather(*(hand.kill() for hand in self._hands))
        await asyncio.gather(*(hand.stop() for hand in self._hands))

    async def start(self, role: str, servers: str, **settings: Any) -> Hand:
        """Start a process that connects to ``servers``. ``settings`` are settings of its runtime."""
        place = Place(address=servers, namespace=self.namespace)
        hand = await Hand.start(self._peer, role, place, Setup(options=tuple(settings.items())), "asyncio")
        self._hands.append(hand)
        return hand

    async def start_all(self, role: str, servers: Sequence[str], **settings: Any) -> list[Hand]:
        """Start one process for each of ``servers``."""
        return list(await asyncio.gather(*(self.start(role, url, **settings) for url in servers)))


async def ask_all(hands: Sequence[Hand], command: str, **arguments: Any) -> list[Any]:
    """Run the same command in all of these processes at the same time. Returns their results in order."""
    return list(await asyncio.gather(*(hand.ask(command, **arguments) for hand in hands)))


async def ledgers_of(callers: Sequence[Hand]) -> list[Ledger]:
    """Stop the load of these callers. Returns the ledger of each."""
    return [Ledger.from_json(rows) for rows in await ask_all(callers, "end")]
