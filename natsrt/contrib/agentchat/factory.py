"""Makes the agent or team of a session, with what the user has given."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

from autogen_agentchat.base import ChatAgent, Team
from autogen_core import AgentId, AgentInstantiationContext, AgentRuntime

from natsrt.contrib.agentchat.closing import Live, entered
from natsrt.contrib.agentchat.message_types import MessageTypes

Made: TypeAlias = ChatAgent | Team
Factory: TypeAlias = Callable[[], Made | Awaitable[Made] | AbstractAsyncContextManager[Made]]


@dataclass(frozen=True, slots=True)
class SessionFactory:
    """Makes the agents or teams of the sessions of one agent type."""

    factory: Factory
    types: MessageTypes
    """The message classes that are known here."""

    async def make(self, runtime: AgentRuntime, agent_id: AgentId) -> Live[Made]:
        """Make the one of a session. The factory finds both arguments in AutoGen's `AgentInstantiationContext`.

        Raises TypeError if it makes something else, and what the factory raises.
        """
        end: Callable[[], Awaitable[None]] | None = None
        with AgentInstantiationContext.populate_context((runtime, agent_id)):
            found: Any = self.factory()
            if inspect.isawaitable(found):
                found = await found
            if isinstance(found, AbstractAsyncContextManager) and not isinstance(found, ChatAgent | Team):
                found, end = await entered(found)
        if isinstance(found, ChatAgent) and end is None:
            end = found.close
        if isinstance(found, ChatAgent | Team):
            return Live(found, end)
        await Live(found, end).close(f"what the factory of {agent_id.type!r} made")
        raise TypeError(f"the factory of {agent_id.type!r} must make a ChatAgent or a Team, not {found!r:.80}")
