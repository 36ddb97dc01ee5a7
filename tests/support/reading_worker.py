"""A worker process for tests: hosts ``reader``, which remembers events, and agents to command and ask it.

Run as ``python reading_worker.py URL NAMESPACE NAME [TOPIC…]``. Each TOPIC is a subscription of ``reader``, a prefix
one if it ends in a dot. It writes ``ready`` to standard output once it serves.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from autogen_core import (
    MessageContext,
    RoutedAgent,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
    event,
    message_handler,
    rpc,
)

from natsrt import NatsAgentRuntime


@dataclass
class News:
    number: int


@dataclass
class Publish:
    """Asks an agent of type ``publisher-<name>`` to publish ``News(number)``."""

    topic_type: str
    source: str
    number: int


@dataclass
class WhatWasRead:
    """Asks an agent of type ``memory-<name>``."""


@dataclass
class Read:
    """``key number`` of each event that the process handled."""

    events: list[str]


_read: list[str] = []


class Reader(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("remembers events")

    @event
    async def on_news(self, message: News, ctx: MessageContext) -> None:
        _read.append(f"{self.id.key} {message.number}")


class Memory(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("tells what was read")

    @rpc
    async def on_question(self, message: WhatWasRead, ctx: MessageContext) -> Read:
        return Read(list(_read))


class Publisher(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("publishes on command")

    @message_handler
    async def on_publish(self, message: Publish, ctx: MessageContext) -> None:
        await self.publish_message(News(message.number), TopicId(message.topic_type, message.source))


def subscription(topic: str) -> TypeSubscription | TypePrefixSubscription:
    """What a topic on the command line means."""
    return TypePrefixSubscription(topic, "reader") if topic.endswith(".") else TypeSubscription(topic, "reader")


async def main(url: str, namespace: str, name: str, *topics: str) -> None:
    """Host the agents until a signal."""
    runtime = NatsAgentRuntime(url, namespace=namespace, name=name)
    await runtime.register_factory("reader", Reader, expected_class=Reader)
    await runtime.register_factory(f"memory-{name}", Memory, expected_class=Memory)
    await runtime.register_factory(f"publisher-{name}", Publisher, expected_class=Publisher)
    for topic in topics:
        await runtime.add_subscription(subscription(topic))
    async with runtime:
        print("ready", flush=True)  # noqa: T201
        await runtime.stop_when_signal()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
