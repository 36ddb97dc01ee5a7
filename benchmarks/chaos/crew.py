"""The processes of one scenario: started, commanded, killed and frozen."""

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
    """One process. Commands are given by `ask`, one at a time."""

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone. Harmless when it is."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    async def gone(self, seconds: float = 60.0) -> None:
        """Wait until it ended by itself. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            await self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP: it stands still, its connections staying open."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: it goes on."""
        self._process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        """Let it end by itself, a frozen one too; kill it where it does not."""
        if self._process.returncode is None:
            self.resume()
        await super().stop()


class Crew:
    """Processes that share a namespace, to be used with ``async with``, which kills those that are left at its end.

    ``module`` is where their ``ROLES`` are.
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
        """Start a process that connects to ``servers``, with these settings of its runtime."""
        place = Place(address=servers, namespace=self.namespace)
        hand = await Hand.start(self._peer, role, place, Setup(options=tuple(settings.items())), "asyncio")
        self._hands.append(hand)
        return hand

    async def start_all(self, role: str, servers: Sequence[str], **settings: Any) -> list[Hand]:
        """One process for each of ``servers``."""
        return list(await asyncio.gather(*(self.start(role, url, **settings) for url in servers)))


async def ask_all(hands: Sequence[Hand], command: str, **arguments: Any) -> list[Any]:
    """Give all of them the same command at the same moment."""
    return list(await asyncio.gather(*(hand.ask(command, **arguments) for hand in hands)))


async def ledgers_of(callers: Sequence[Hand]) -> list[Ledger]:
    """End the load of these callers, and take what became of it: a ledger for each."""
    return [Ledger.from_json(rows) for rows in await ask_all(callers, "end")]
