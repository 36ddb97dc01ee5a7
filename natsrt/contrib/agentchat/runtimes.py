"""The runtime of a remote agent or team: the one that it was given, or one of its own for each use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from natsrt import NatsAgentRuntime, Options
from natsrt.contrib.agentchat.message_types import MessageTypes


class Runtimes(Protocol):
    """Where a remote agent or team gets a started runtime from."""

    @property
    def options(self) -> Options:
        """The settings of the runtimes."""

    def use(self) -> AbstractAsyncContextManager[NatsAgentRuntime]:
        """A runtime for the block, started."""


@dataclass(frozen=True, slots=True)
class GivenRuntime:
    """The runtime that the user has given, and starts and stops."""

    runtime: NatsAgentRuntime
    types: MessageTypes

    def __post_init__(self) -> None:
        self.types.register(self.runtime)

    @property
    def options(self) -> Options:
        return self.runtime.options

    @asynccontextmanager
    async def use(self) -> AsyncIterator[NatsAgentRuntime]:
        yield self.runtime


@dataclass(frozen=True, slots=True)
class OwnRuntimes:
    """A runtime for each use, which only calls: for agents and teams that were loaded from a configuration.

    Nobody closes what AgentChat loads, so nothing is kept open between the uses.
    """

    options: Options
    types: MessageTypes

    @asynccontextmanager
    async def use(self) -> AsyncIterator[NatsAgentRuntime]:
        async with NatsAgentRuntime(options=self.options) as runtime:
            self.types.register(runtime)
            yield runtime
