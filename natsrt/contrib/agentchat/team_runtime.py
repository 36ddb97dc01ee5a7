"""`team_runtime`: the agent types of a team in this process leave the registry with the team."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from autogen_core import AgentRuntime, AgentType

from natsrt import NatsAgentRuntime


@asynccontextmanager
async def team_runtime(runtime: NatsAgentRuntime) -> AsyncIterator[AgentRuntime]:
    """Give teams of this process a runtime, and unregister at the end of the block what they have registered.

    A team registers an agent type for each participant, under a name that no other team uses, and never removes it. A
    program that makes a team for each request needs this block around each one. A run that has not ended must be
    cancelled before the end of the block.

    Args:
        runtime: The runtime, which is started, and on which the teams run.

    Returns:
        What to pass to the teams as ``runtime``.

    Raises:
        Exception: At the end of the block, the first of what `NatsAgentRuntime.unregister` raises, which is called
            for all.
    """
    registering = _Registering(runtime)
    try:
        yield cast(AgentRuntime, registering)
    finally:
        errors: list[Exception] = []
        for agent_type in registering.types:
            try:
                await runtime.unregister(agent_type)
            except Exception as error:  # the others are unregistered all the same
                errors.append(error)
        if errors:
            raise errors[0]


class _Registering:
    """A runtime that remembers the agent types which are registered through it. All else is the runtime's own."""

    def __init__(self, runtime: NatsAgentRuntime) -> None:
        self._runtime = runtime
        self.types: list[AgentType] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    async def register_factory(self, type: str | AgentType, *arguments: Any, **settings: Any) -> AgentType:
        agent_type = await self._runtime.register_factory(type, *arguments, **settings)
        self.types.append(agent_type)
        return agent_type
