"""The messages and the work of all peers. Does not import AutoGen, because the worker of bare nats-py must not."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import orjson

_LINE = "The quick brown fox jumps over the lazy dog, and what is measured stays comparable.\n"


@dataclass
class Text:
    """The message of a call, of its reply, and of an event."""

    content: str


@dataclass
class Handled:
    """Asks an agent to reply once it has handled ``total`` events."""

    total: int


def text_of(size: int) -> Text:
    """Return lines of text whose JSON is ``size`` bytes long."""
    empty = len(encoded(Text("")))
    lines = _LINE * ((size - empty) // (len(orjson.dumps(_LINE)) - 2))
    return Text(lines + "." * (size - len(encoded(Text(lines)))))


def encoded(message: Text) -> bytes:
    """Return the message as JSON, as the serializers of AutoGen and natsrt write it."""
    return orjson.dumps({"content": message.content})


def use_cpu(milliseconds: float) -> None:
    """Use so much CPU time in this thread. On a busy machine this takes longer, as other work would."""
    until = time.thread_time() + milliseconds / 1000
    while time.thread_time() < until:
        pass


class Counter:
    """Counts events, and waits for a number of them."""

    def __init__(self) -> None:
        self._count = 0
        self._awaited = 0
        self._reached = asyncio.Event()

    def add(self) -> None:
        self._count += 1
        if self._count == self._awaited:
            self._reached.set()

    async def reach(self, total: int) -> None:
        """Return when ``total`` events have been counted, and set the count back to 0."""
        self._awaited = total
        if self._count < total:
            await self._reached.wait()
        self._count = self._awaited = 0
        self._reached.clear()
