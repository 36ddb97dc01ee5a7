"""Makes the agent or team of a session, with what the user has given."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from autogen_agentchat.base import ChatAgent, Team
from autogen_core import AgentId, AgentInstantiationContext, AgentRuntime

from natsrt.contrib.agentchat.message_types import MessageTypes

Factory: TypeAlias = Callable[[], ChatAgent | Team | Awaitable[ChatAgent | Team]]


@dataclass(frozen=True, slots=True)
class SessionFactory:
    """Makes the agents or teams of the sessions of one agent type."""

    factory: Factory
    types: MessageTypes
    """The message classes that are known here."""

    async def make(self, runtime: AgentRuntime, agent_id: AgentId) -> ChatAgent | Team:
        """Make the one of a session. The factory finds both arguments in AutoGen's `AgentInstantiationContext`.

        Raises TypeError if it makes something else, and what the factory raises.
        """
        with AgentInstantiationContext.populate_context((runtime, agent_id)):
            made = self.factory()
            found = await made if inspect.isawaitable(made) else made
        if not isinstance(found, ChatAgent | Team):
            raise TypeError(f"the factory of {agent_id.type!r} must make a ChatAgent or a Team, not {found!r:.80}")
        return found
