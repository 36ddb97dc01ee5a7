"""Reminders: messages that an agent gets at times that were set before, also after restarts of everything.

A reminder is an event on a durable topic of its own, ``natsrt.reminder.<agent type>:<name>``, whose source is the
agent's key. So it is stored, handled at least once, tried again, and kept as a dead letter, as other durable events.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Final

from autogen_core import AgentId, TopicId

from natsrt.durable_types import DurableTopics

_TOPICS: Final = "natsrt.reminder."
REMINDER_TOPICS: Final = DurableTopics(_TOPICS, name="reminders")
"""The topics of all reminders."""


@dataclass(frozen=True, slots=True)
class Reminder:
    """A reminder that is set.

    ``agent`` gets it, and ``name`` is its name for this agent. ``schedule`` says when: ``@at`` and a time, ``@every``
    and an interval, or a cron line. ``timezone`` is the zone of the cron line; None: UTC. ``message_type`` is the name
    of the message's type; None if whoever set it did not say. ``set_at`` is when it was set.
    """

    agent: AgentId
    name: str
    schedule: str
    timezone: str | None
    message_type: str | None
    set_at: datetime.datetime


def reminder_prefix(agent_type: str) -> str:
    """The start of the topic types of all reminders of an agent type."""
    return f"{_TOPICS}{agent_type}:"


def reminder_topic(agent: AgentId, name: str) -> TopicId:
    """The topic of a reminder. Raises ValueError for a name that no topic can have."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a reminder must be a text, not {name!r}")
    try:
        return TopicId(f"{reminder_prefix(agent.type)}{name}", agent.key)
    except ValueError:
        raise ValueError(
            f"the name of a reminder must consist of letters, digits and _ - . : =, not {name[:80]!r}"
        ) from None


def reminder_of(topic_type: str, source: str) -> tuple[AgentId, str] | None:
    """The agent and the name of the reminder with this topic; None if it is none."""
    if not topic_type.startswith(_TOPICS):
        return None
    agent_type, colon, name = topic_type.removeprefix(_TOPICS).partition(":")
    try:
        return (AgentId(agent_type, source), name) if colon and name else None
    except ValueError:
        return None
