"""Programs that block their event loop: ``python stalling.py SCENARIO URL NAMESPACE SECONDS``.

They publish `Note` events with the numbers 1, 2, 3 … on `NOTES`, and end in order. The test counts what arrives.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, message_handler

from natsrt import NatsAgentRuntime

NOTES = TopicId("notes", "k")
KEEPER = AgentId("keeper", "k")


def tell(*words: object) -> None:
    """One line on standard output, for the test that waits for it."""
    print(*words, flush=True)  # noqa: T201


@dataclass
class Note:
    number: int


@dataclass
class Slow:
    seconds: float


class Keeper(RoutedAgent):
    """Keeps the numbers of the events that it gets, and answers `Slow` after its seconds."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__("keeps numbers")
        self.numbers = numbers

    @message_handler
    async def note(self, message: Note, ctx: MessageContext) -> None:
        self.numbers.append(message.number)

    @message_handler
    async def slow(self, message: Slow, ctx: MessageContext) -> Slow:
        await asyncio.sleep(message.seconds)
        return message


class Blocking(RoutedAgent):
    """Publishes before, between and after two stalls, and calls another worker."""

    def __init__(self, begins_after: float = 0.0) -> None:
        super().__init__("blocks")
        self.begins_after = begins_after

    @message_handler
    async def block(self, message: Slow, ctx: MessageContext) -> None:
        tell("begins")
        await asyncio.sleep(self.begins_after)
        await self.publish_message(Note(1), NOTES)
        time.sleep(message.seconds)
        await self.publish_message(Note(2), NOTES)
        await self.send_message(Slow(0.0), KEEPER)
        time.sleep(message.seconds)
        await self.publish_message(Note(3), NOTES)

    async def save_state(self) -> Mapping[str, Any]:
        return {"kept": True}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        assert state == {"kept": True}


async def publisher(runtime: NatsAgentRuntime, seconds: float) -> None:
    """Only publishes. The loop does not run between a publish and the stall after it."""
    for number in range(1, 4):
        await runtime.publish_message(Note(number), NOTES)
        time.sleep(seconds)
    await runtime.publish_message(Note(4), NOTES)
    await runtime.stop()


async def idle(runtime: NatsAgentRuntime, seconds: float) -> None:
    """Waits until it is idle after a stall, and tells how much of a processor that took."""
    time.sleep(seconds)
    await runtime.publish_message(Note(1), NOTES)
    used = time.process_time()
    await runtime.stop_when_idle()
    tell("processor", time.process_time() - used)


async def caller(runtime: NatsAgentRuntime, seconds: float) -> None:
    """Has a call in flight during the stall."""
    call = asyncio.create_task(runtime.send_message(Slow(seconds / 2), KEEPER))
    await asyncio.sleep(0.3)
    time.sleep(seconds)
    await runtime.publish_message(Note(1), NOTES)
    assert await call == Slow(seconds / 2)
    assert await runtime.send_message(Slow(0.0), KEEPER) == Slow(0.0)
    await runtime.publish_message(Note(2), NOTES)
    await runtime.stop()


async def handler(runtime: NatsAgentRuntime, seconds: float, *, keyed: bool = False) -> None:
    """The stalls are in a handler."""
    await runtime.register_factory("blocking", Blocking, expected_class=Blocking, keyed=keyed)
    await runtime.send_message(Slow(seconds), AgentId("blocking", "k"))
    await runtime.stop()


async def keyed(runtime: NatsAgentRuntime, seconds: float) -> None:
    """The stalls are in the handler of a keyed agent."""
    await handler(runtime, seconds, keyed=True)


async def registers(runtime: NatsAgentRuntime, seconds: float) -> None:
    """Writes to the registry after the stall."""
    await runtime.register_factory("blocking", lambda: Keeper([]), expected_class=Keeper)
    time.sleep(seconds)
    await runtime.add_subscription(TypeSubscription("other", "blocking"))
    await runtime.register_factory("another", lambda: Keeper([]), expected_class=Keeper)
    await runtime.publish_message(Note(1), NOTES)
    await runtime.stop()


async def drains(runtime: NatsAgentRuntime, seconds: float) -> None:
    """The stalls are in a handler while the runtime stops."""
    await runtime.register_factory("blocking", lambda: Blocking(0.3), expected_class=Blocking)
    await runtime.add_subscription(TypeSubscription("block", "blocking"))
    await runtime.publish_message(Slow(seconds), TopicId("block", "k"))
    await asyncio.sleep(0.1)
    await runtime.stop()


async def listens(runtime: NatsAgentRuntime, seconds: float) -> None:
    """Gets events during the stall, and tells their numbers."""
    numbers: list[int] = []
    await runtime.register_factory("keeper", lambda: Keeper(numbers), expected_class=Keeper)
    await runtime.add_subscription(TypeSubscription("notes", "keeper"))
    tell("begins")
    time.sleep(seconds)
    await runtime.stop_when_idle()
    tell("heard", *numbers)


async def main(scenario: str, url: str, namespace: str, seconds: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    # The registry gives a worker up after a second.
    runtime = NatsAgentRuntime(url, namespace=namespace, heartbeat_interval=0.4, heartbeat_ttl=1.0)
    await runtime.start()
    tell("started")
    await globals()[scenario](runtime, float(seconds))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
