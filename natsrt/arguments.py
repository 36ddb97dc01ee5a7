"""Checks of arguments that users confuse most often."""

from __future__ import annotations

from typing import Any

from autogen_core import AgentId, AgentType, TopicId


def checked_agent(agent: Any, name: str) -> AgentId:
    """``agent``, if it is an agent's id. ``name`` is that of the argument. Raises ValueError."""
    if not isinstance(agent, AgentId):
        raise ValueError(f"{name} must be an AgentId, such as AgentId('writer', 'ada'), not {agent!r:.80}")
    return agent


def checked_topic(topic: Any, name: str) -> TopicId:
    """``topic``, if it is a topic's id. ``name`` is that of the argument. Raises ValueError."""
    if not isinstance(topic, TopicId):
        raise ValueError(f"{name} must be a TopicId, such as TopicId('orders', 'eu'), not {topic!r:.80}")
    return topic


def checked_type(agent_type: Any, name: str) -> str:
    """The agent type that ``agent_type`` is or names. ``name`` is that of the argument. Raises ValueError."""
    text = agent_type.type if isinstance(agent_type, AgentType) else agent_type
    try:
        if isinstance(text, str):
            return AgentId(text, "any").type
    except ValueError:
        pass
    raise ValueError(f"{name} must be an agent type, such as 'writer', not {agent_type!r:.80}")


def checked_message_id(message_id: Any) -> str:
    """``message_id``, if it is a text. Raises ValueError."""
    if not isinstance(message_id, str):
        raise ValueError(f"message_id must be a text, not {message_id!r:.80}")
    return message_id
