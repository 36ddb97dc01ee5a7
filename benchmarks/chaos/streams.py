"""Roles for streams: workers that send numbered items, and callers that read them and note how each stream ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autogen_core import AgentId, MessageContext, RoutedAgent, rpc

import natsrt
from benchmarks.chaos import roles
from benchmarks.chaos.journal import Journal
from benchmarks.roles import Role

PLAIN, KEYED = "plain", "keyed"
COMPLETE, LEFT, HUNG = "complete", "left", "hung"
"""How a stream ends that ends without an error, and one that does not end."""
BEGAN, ENDED, STOPPED = "began", "ended", "stopped"
"""What a handler notes: that it was started, that it came to its end, or that something ended it before."""
_POLL = 0.05


@dataclass
class Send:
    """Asks for the numbers from 1 to ``count``, each with ``size`` characters, and each after ``pause`` seconds."""

    name: str
    count: int
    size: int
    pause: float


@dataclass
class Item:
    number: int
    text: str


@dataclass
class Probe:
    """Asks for an answer."""


class Sender(RoutedAgent):
    """Sends items, and writes into a journal how its handlers ended."""

    journal: Journal

    def __init__(self) -> None:
        super().__init__("sends items")
        self._streams = 0

    @natsrt.streaming
    async def on_send(self, message: Send, ctx: MessageContext) -> AsyncGenerator[Item, None]:
        self.journal.write(BEGAN, message.name)
        self._streams += 1
        text = "x" * message.size
        try:
            for number in range(1, message.count + 1):
                if message.pause:
                    await asyncio.sleep(message.pause)
                yield Item(number, text)
        except BaseException:
            self.journal.write(STOPPED, message.name)
            raise
        self.journal.write(ENDED, message.name)

    @rpc
    async def on_probe(self, message: Probe, ctx: MessageContext) -> int:
        return self._streams

    async def save_state(self) -> Mapping[str, Any]:
        return {"streams": self._streams}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._streams = state["streams"]


class StreamWorker(roles.Worker):
    """Hosts the agents. The option ``journal`` is the directory of the journal."""

    async def start(self) -> None:
        options = dict(self.setup.options)
        Sender.journal = Journal(options.pop("journal"))
        self.runtime = natsrt.NatsAgentRuntime(self.place.address, namespace=self.place.namespace, **options)
        await self.runtime.register_factory(PLAIN, Sender, expected_class=Sender)
        await self.runtime.register_factory(KEYED, Sender, expected_class=Sender, keyed=True)
        await self.runtime.start()

    async def at_rest(self, seconds: float) -> float | None:
        """Wait until no stream is kept, and no handler runs."""
        incoming = self.runtime.running.incoming
        return await roles.until(
            lambda: not incoming.streams._streams and not self.runtime.health().handlers_running, seconds
        )


class StreamCaller(roles.Worker):
    """Reads streams."""

    async def ready(self, seconds: float) -> float | None:
        """Wait until the agents answer."""
        deadline = time.monotonic() + seconds
        for agent_type in (PLAIN, KEYED):
            while True:
                try:
                    await self.runtime.send_message(Probe(), AgentId(agent_type, "probe"))
                    break
                except natsrt.NatsrtError:
                    if time.monotonic() > deadline:
                        return None
                    await asyncio.sleep(_POLL)
        return time.monotonic()

    async def read(self, streams: Sequence[Mapping[str, Any]], seconds: float) -> list[dict[str, Any]]:
        """Read streams, all at the same time, for ``seconds`` at most. Returns how each has ended."""
        return list(await asyncio.gather(*(self._read(seconds, **stream) for stream in streams)))

    async def _read(
        self,
        seconds: float,
        name: str,
        count: int,
        size: int,
        pause: float,
        read_pause: float,
        window: int,
        keyed: bool,
        take: int | None,
    ) -> dict[str, Any]:
        received, wrong, why = 0, "", ""
        stream = self.runtime.stream_message(
            Send(name, count, size, pause), AgentId(KEYED if keyed else PLAIN, name), window=window
        )
        try:
            async with asyncio.timeout(seconds), stream:
                async for item in stream:
                    received += 1
                    if item.number != received or len(item.text) != size:
                        wrong = wrong or f"item {item.number} with {len(item.text)} characters in place of {received}"
                    if received == take:
                        break
                    if read_pause:
                        await asyncio.sleep(read_pause)
            outcome = COMPLETE if received != take else LEFT
        except Exception as error:
            outcome, why = HUNG if type(error) is TimeoutError else type(error).__name__, str(error)
        return {
            "name": name,
            "outcome": outcome,
            "why": why,
            "wrong": wrong,
            "received": received,
            "ended": time.monotonic(),
        }

    async def at_rest(self, seconds: float) -> float | None:
        """Wait until no stream is open."""
        return await roles.until(lambda: not self.runtime.running.outgoing.streams._open, seconds)


ROLES: dict[str, type[Role]] = {"worker": StreamWorker, "caller": StreamCaller}
