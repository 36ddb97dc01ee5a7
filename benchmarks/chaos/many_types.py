"""A process that hosts many agent types, each subscribed to a durable topic of its own."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from autogen_core import MessageContext, RoutedAgent, TopicId, TypeSubscription, event

import natsrt
from benchmarks.chaos import roles
from benchmarks.roles import Role
from natsrt import NatsAgentRuntime
from natsrt.jetstream.streams import EVENTS
from natsrt.wire.subjects import Subjects

TOPICS = "many."
"""The prefix of the topics."""


@dataclass
class Fact:
    """An event. ``number`` is that of its topic."""

    number: int


class Taker(RoutedAgent):
    """Counts the events that it handles."""

    handled: ClassVar[Counter[int]] = Counter()

    def __init__(self) -> None:
        super().__init__("counts")

    @event
    async def on_fact(self, message: Fact, ctx: MessageContext) -> None:
        self.handled[message.number] += 1


class Worker(roles.Worker):
    """Hosts agent types when it is told to."""

    async def start(self) -> None:
        self.runtime = NatsAgentRuntime(self.place.address, namespace=self.place.namespace, **dict(self.setup.options))

    async def begin(self, types: int) -> float:
        """Declare ``types`` agent types, and start. Returns the seconds that the start took."""
        for number in range(types):
            await natsrt.register(self.runtime, Taker, f"taker{number}", Taker)
            await self.runtime.add_subscription(TypeSubscription(f"{TOPICS}{number}", f"taker{number}"))
        began = time.monotonic()
        await self.runtime.start()
        return time.monotonic() - began

    async def end(self) -> float:
        """Stop. Returns the seconds that it took."""
        began = time.monotonic()
        await self.runtime.close()
        return time.monotonic() - began

    async def handled(self) -> int:
        """Return how many events the agents of this process have handled."""
        return sum(Taker.handled.values())


class Caller(roles.Caller):
    """Publishes one event on each topic."""

    async def publish_each(self, types: int) -> None:
        """Publish one event on each of ``types`` topics. Returns when they are stored."""
        for number in range(types):
            await self.runtime.publish_message(Fact(number), TopicId(f"{TOPICS}{number}", "all"))

    async def consumers(self) -> int:
        """Return how many consumers the stream has."""
        stream = Subjects(self.place.namespace).bucket(EVENTS)
        info = await self.runtime.running.connection.jetstream.stream_info(stream)
        return info.state.consumer_count


ROLES: dict[str, type[Role]] = {"worker": Worker, "caller": Caller}
