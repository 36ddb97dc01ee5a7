"""Events for agents that do not exist: their type has registered instances only, none of which has the event's key.

No worker subscribes to such events, so only the publisher can notice. `SingleThreadedAgentRuntime` notices when it
looks up the agent.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from autogen_core import AgentId, TopicId

from natsrt.errors import UnknownAgent
from natsrt.jetstream.registry.registry import Registry
from natsrt.observe.event_errors import EventErrors
from natsrt.observe.first import FirstIsWarning
from natsrt.observe.metrics import Counters

logger: logging.Logger = logging.getLogger("natsrt.sending")

_SHOWN = 20
"""Maximum number of instances that an error names."""


class MissingInstances:
    """Counts and reports the events of one runtime that no instance takes."""

    def __init__(self, registry: Registry, counters: Counters, errors: EventErrors) -> None:
        self._registry = registry
        self._counters = counters
        self._errors = errors
        self._first = FirstIsWarning()

    def check(self, agent_types: Sequence[str], topic: TopicId, sender: AgentId | None) -> None:
        """An event is published, and these types take it, which have registered instances only."""
        for agent_type in agent_types:
            agent = AgentId(agent_type, topic.source)
            if agent == sender or self._registry.has_instance(agent_type, topic.source):
                continue
            self._counters.undelivered_events += 1
            known = [f"{agent_type}/{key}" for key in self._registry.instance_keys(agent_type)[:_SHOWN]]
            error = UnknownAgent(str(agent), known)
            logger.log(
                self._first.level(topic.type, agent_type),
                "an event of topic %s is not delivered: %s",
                topic.type,
                error,
            )
            self._errors.record(error)
