"""A worker of the agent type ``streams``, whose handlers send items.

Arguments: URL of the server, namespace, name of the worker, and whether the type is keyed (``keyed`` or empty).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from autogen_core import MessageContext, RoutedAgent, rpc

import natsrt
from natsrt import NatsAgentRuntime


@dataclass
class Count:
    """Send the numbers from 1 to ``to``, each with a text of ``size`` characters, after ``pause`` seconds each."""

    to: int
    size: int = 0
    pause: float = 0.0
    what: str = ""


@dataclass
class Item:
    number: int
    text: str = ""


@dataclass
class Sum:
    total: int


class Odd(Exception):
    """A class that callers know."""


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Streams(RoutedAgent):
    """Notes in ``ended`` how its handlers ended, and counts its streams in its state."""

    def __init__(self, ended: list[str] | None = None) -> None:
        super().__init__("streams")
        self.ended = [] if ended is None else ended
        self.sent = 0
        self._streams = 0

    async def save_state(self) -> Mapping[str, Any]:
        return {"streams": self._streams}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._streams = state["streams"]

    @natsrt.streaming
    async def count(self, message: Count, ctx: MessageContext) -> AsyncGenerator[Item | Sum, None]:
        self._streams += 1
        try:
            for number in range(1, message.to + 1):
                if message.pause:
                    await asyncio.sleep(message.pause)
                self.sent = number
                yield Item(number, "x" * message.size)
            if message.what == "fail":
                raise Odd("after the items")
            if message.what == "hang":
                await asyncio.sleep(3600)
            if message.what != "nothing":
                yield Sum(self._streams)
        except BaseException as error:
            self.ended.append(type(error).__name__)
            tell(f"ended with {type(error).__name__}")
            raise
        self.ended.append("")

    @rpc
    async def emits(self, message: str, ctx: MessageContext) -> str:
        for number in range(1, 4):
            told = await natsrt.emit(Item(number, message))
            self.ended.append(str(told))
        return "last"


async def main(url: str, namespace: str, name: str, keyed: str) -> None:
    runtime = NatsAgentRuntime(url, namespace=namespace, name=name)
    await runtime.register_factory("streams", Streams, expected_class=Streams, keyed=bool(keyed))
    await runtime.start()
    tell("ready")
    await runtime.stop_when_signal()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
