"""Worker and caller for any `AgentRuntime`. A peer adds how its runtime is created, started and stopped."""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import abstractmethod
from typing import Any

from autogen_core import (
    AgentId,
    AgentInstantiationContext,
    AgentRuntime,
    TopicId,
    TypeSubscription,
    try_get_known_serializers_for_type,
)

from benchmarks.measured_agents import CLASSES, Echo
from benchmarks.roles import Caller, Role, Send, Worker
from benchmarks.setup import ECHO, KEY, TOPIC, Setup
from benchmarks.work import Handled, Text, text_of

_AT_A_TIME = 64


class RuntimeRole(Role):
    """A role that uses one or more runtimes."""

    @abstractmethod
    async def open(self) -> AgentRuntime:
        """Return a new, started runtime."""

    @abstractmethod
    async def close(self, runtime: Any) -> None:
        """Stop a runtime that `open` returned."""


async def host_echoes(runtime: AgentRuntime, setup: Setup) -> None:
    """Register the agents of ``setup`` and their subscriptions."""
    cls = CLASSES[setup.agent]
    for agent_type in setup.type_names:
        await cls.register(runtime, agent_type, lambda: cls(setup.work_ms))
    for agent_type in setup.type_names[: setup.subscribers]:
        await runtime.add_subscription(TypeSubscription(TOPIC, agent_type))
    for number in range(1, setup.subscriptions):
        await runtime.add_subscription(TypeSubscription(f"{TOPIC}{number}", ECHO))


class RuntimeWorker(RuntimeRole, Worker):
    """Hosts the agents. The commands measure work inside the worker."""

    runtime: AgentRuntime

    async def start(self) -> None:
        self.runtime = await self.open()
        await host_echoes(self.runtime, self.setup)

    async def stop(self) -> None:
        await self.close(self.runtime)

    async def register(self, count: int, at_once: bool = False) -> float:
        """Register ``count`` agent types on the running runtime, one by one or all at once. Returns the seconds."""
        began = time.perf_counter()
        registering = (Echo.register(self.runtime, f"registered{number}", lambda: Echo()) for number in range(count))
        if at_once:
            await asyncio.gather(*registering)
        else:
            for one in registering:
                await one
        return time.perf_counter() - began

    async def subscribe(self, count: int) -> float:
        """Add ``count`` subscriptions of a hosted agent type, one after the other. Returns the seconds."""
        began = time.perf_counter()
        for number in range(count):
            await self.runtime.add_subscription(TypeSubscription(f"subscribed{number}", ECHO))
        return time.perf_counter() - began

    async def agents_alone(self, count: int) -> int:
        """Create ``count`` agents, with their ids, outside any runtime. Returns their size in bytes."""
        before = await self.memory()
        alone = []
        for number in range(count):
            with AgentInstantiationContext.populate_context((self.runtime, AgentId(ECHO, f"alone{number}"))):
                alone.append(CLASSES[self.setup.agent]())
        after = await self.memory()
        return after - before - alone.__sizeof__()


class RuntimeCaller(RuntimeRole, Caller):
    """Calls and publishes through ``send_message`` and ``publish_message``."""

    runtime: AgentRuntime

    async def start(self) -> None:
        self.runtime = await self.open()
        self._publishers = [self.runtime]
        while len(self._publishers) < self.setup.publishers:
            self._publishers.append(await self.open())
        for runtime in self._publishers:
            for message_type in (Text, Handled):
                runtime.add_message_serializer(try_get_known_serializers_for_type(message_type))
        self._new = itertools.count()
        self._recipients = itertools.cycle(
            [AgentId(agent_type, key) for key in self.setup.keys for agent_type in self.setup.type_names]
        )

    async def stop(self) -> None:
        for runtime in self._publishers:
            await self.close(runtime)

    async def make_live(self, count: int) -> None:
        """Call the first ``count`` agents of every type, `_AT_A_TIME` at once, so that they are live."""
        message = text_of(100)
        recipients = iter(
            [AgentId(agent_type, str(number)) for agent_type in self.setup.type_names for number in range(count)]
        )

        async def call_on() -> None:
            for recipient in recipients:
                await self.runtime.send_message(message, recipient)

        await asyncio.gather(*(call_on() for _ in range(_AT_A_TIME)))

    async def calling(self, size: int) -> Send:
        message, recipients, send = text_of(size), self._recipients, self.runtime.send_message
        if await send(message, AgentId(ECHO, KEY)) != message:
            raise RuntimeError("the agent did not answer with what it was sent")
        return lambda: send(message, next(recipients))

    async def first_calls(self, concurrency: int, count: int, size: int) -> float:
        """Make ``count`` calls by ``concurrency`` callers, each to a new agent. Returns the seconds."""
        message = text_of(size)
        return await self.timed(
            lambda: self.runtime.send_message(message, AgentId(ECHO, f"new{next(self._new)}")), concurrency, count
        )

    async def publishing(self, size: int) -> list[Send]:
        message, topic = text_of(size), TopicId(TOPIC, KEY)

        def by(runtime: AgentRuntime) -> Send:
            return lambda: runtime.publish_message(message, topic)

        return [by(runtime) for runtime in self._publishers]

    async def handled(self, count: int) -> None:
        subscribers = self.setup.type_names[: self.setup.subscribers]
        await asyncio.gather(
            *(self.runtime.send_message(Handled(count), AgentId(agent_type, KEY)) for agent_type in subscribers)
        )
