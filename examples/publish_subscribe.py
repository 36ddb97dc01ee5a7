"""Publish and subscribe: an event reaches each agent whose type is subscribed to its topic, in any process.

Run it: python examples/publish_subscribe.py
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from autogen_core import MessageContext, RoutedAgent, TopicId, TypePrefixSubscription, TypeSubscription, message_handler
from local_server import local_server

from natsrt import NatsAgentRuntime


@dataclass
class Headline:
    text: str


class Reader(RoutedAgent):
    """Notes what it reads. The key of its id is the source of the topic, so every source has its own reader."""

    def __init__(self, notes: asyncio.Queue[str]) -> None:
        super().__init__("reads headlines")
        self._notes = notes

    @message_handler
    async def read(self, message: Headline, ctx: MessageContext) -> None:
        await self._notes.put(f"{self.id.type} for {self.id.key} read: {message.text}")


async def main() -> None:
    notes: asyncio.Queue[str] = asyncio.Queue()
    async with (
        local_server() as url,
        NatsAgentRuntime(url) as one,
        NatsAgentRuntime(url) as two,
        NatsAgentRuntime(url) as publisher,
    ):
        await Reader.register(one, "engineer", lambda: Reader(notes))
        await one.add_subscription(TypeSubscription("news.tech", "engineer"))
        await Reader.register(two, "archivist", lambda: Reader(notes))
        await two.add_subscription(TypePrefixSubscription("news.", "archivist"))

        await publisher.publish_message(Headline("NATS speaks AutoGen"), TopicId("news.tech", "berlin"))
        await publisher.publish_message(Headline("Home team wins"), TopicId("news.sports", "berlin"))

        # The archivist is subscribed to both topics, the engineer to one of them.
        read = sorted([await notes.get() for _ in range(3)])
        print("\n".join(read))
        assert read == [
            "archivist for berlin read: Home team wins",
            "archivist for berlin read: NATS speaks AutoGen",
            "engineer for berlin read: NATS speaks AutoGen",
        ]


if __name__ == "__main__":
    asyncio.run(main())
