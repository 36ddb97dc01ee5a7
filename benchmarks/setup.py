"""What the processes of one peer are started with. Plain values, known to the driver and to every process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ECHO = "echo"
"""The first agent type; further ones are ``echo1``, ``echo2``, …"""
TOPIC = "events"
"""The topic type of all events."""
KEY = "0"
"""The key of the first agent of a type, and the source of all topics."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How one peer is set up. ``Setup()`` is one worker process with one agent.

    Args:
        workers: Worker processes, all hosting the same agent types.
        agent: The agents' class, one of `benchmarks.measured_agents`.
        agent_types: Agent types that each worker hosts. Calls go to all of them in turn.
        live_agents: Agents of each type that live before anything is measured. Calls go to all of them in turn.
        subscribers: Of the agent types, those that are subscribed to the topic of the events.
        subscriptions: Subscriptions of the first agent type, the topic of the events included.
        publishers: Connections that publish events, all in the caller's process.
        idle_workers: Further workers that host another agent type, all in one process.
        work_ms: Milliseconds of CPU time that a handler uses.
        sampled: Share of traces that are sampled and exported. None: no tracing.
        trace_memory: Count the memory of Python objects in the workers; slows them down.
        options: Further settings of a peer's runtime, as pairs of name and value.
    """

    workers: int = 1
    agent: str = "Echo"
    agent_types: int = 1
    live_agents: int = 1
    subscribers: int = 1
    subscriptions: int = 1
    publishers: int = 1
    idle_workers: int = 0
    work_ms: float = 0
    sampled: float | None = None
    trace_memory: bool = False
    options: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def type_names(self) -> list[str]:
        """The agent types of each worker."""
        return [ECHO, *(f"{ECHO}{number}" for number in range(1, self.agent_types))]

    @property
    def keys(self) -> list[str]:
        """The keys of the live agents of each type."""
        return [str(number) for number in range(self.live_agents)]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the processes of one peer meet.

    Args:
        address: Of the NATS server, or of the peer's own host process. Empty for that host itself.
        namespace: Keeps peers on one NATS server apart.
    """

    address: str
    namespace: str
