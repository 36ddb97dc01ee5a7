"""Names of agents and agent types, as they are given to commands."""

from __future__ import annotations

from autogen_core import AgentId

from natsrt.errors import UnknownAgentType
from natsrt.jetstream.registry.view import View

from .exits import CommandFailed, Exit


def agent_id(text: str, *, default_key: str | None = None) -> AgentId:
    """The agent that ``TYPE/KEY`` names. Without a ``default_key`` the key must be there."""
    agent_type, slash, key = text.partition("/")
    if not slash:
        if default_key is None:
            raise CommandFailed(f"{text!r} is no agent: give it as TYPE/KEY", Exit.USAGE)
        key = default_key
    try:
        return AgentId(agent_type, key)
    except ValueError as error:
        raise CommandFailed(f"{text!r} is no agent: {error}", Exit.USAGE) from None


def refuse_unknown(view: View, agent_type: str) -> None:
    """Raises `UnknownAgentType`."""
    if not view.is_known(agent_type):
        raise UnknownAgentType(agent_type, agent_type, sorted({*view.hosts, *view.known}))
