"""The messages and the work of all peers, without AutoGen: bare nats-py's worker must not have to import it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import orjson

_LINE = "The quick brown fox jumps over the lazy dog, and what is measured stays comparable.\n"


@dataclass
class Text:
    """A call, its reply and an event."""

    content: str


@dataclass
class Handled:
    """Asks an agent to answer once it has handled ``total`` events."""

    total: int


def text_of(size: int) -> Text:
    """Lines of text that are ``size`` bytes as JSON."""
    empty = len(encoded(Text("")))
    lines = _LINE * ((size - empty) // (len(orjson.dumps(_LINE)) - 2))
    return Text(lines + "." * (size - len(encoded(Text(lines)))))


def encoded(message: Text) -> bytes:
    """The message as JSON, as AutoGen's serializers and natsrt's write it."""
    return orjson.dumps({"content": message.content})


def use_cpu(milliseconds: float) -> None:
    """Use CPU time of this thread; on a busy machine it takes longer, as other work would."""
    until = time.thread_time() + milliseconds / 1000
    while time.thread_time() < until:
        pass


class Counter:
    """Counts events, and tells when there were enough."""

    def __init__(self) -> None:
        self._count = 0
        self._awaited = 0
        self._reached = asyncio.Event()

    def add(self) -> None:
        self._count += 1
        if self._count == self._awaited:
            self._reached.set()

    async def reach(self, total: int) -> None:
        """Return when ``total`` events were counted, and begin anew."""
        self._awaited = total
        if self._count < total:
            await self._reached.wait()
        self._count = self._awaited = 0
        self._reached.clear()
