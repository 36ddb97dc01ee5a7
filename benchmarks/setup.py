"""Settings of the processes of one peer: plain values, which the driver sends to every process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ECHO = "echo"
"""The first agent type. The others are ``echo1``, ``echo2``, …"""
TOPIC = "events"
"""The topic type of all events."""
KEY = "0"
"""The key of the first agent of a type, and the source of all topics."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings of one peer. ``Setup()`` means one worker process with one agent.

    Args:
        workers: Number of worker processes. All host the same agent types.
        agent: Name of the agents' class in `benchmarks.measured_agents`.
        agent_types: Number of agent types that each worker hosts. Calls go to all of them in turn.
        live_agents: Number of agents of each type that are live from the start. Calls go to all of them in turn.
        subscribers: Number of agent types that are subscribed to the topic of the events.
        subscriptions: Number of subscriptions of the first agent type, including the topic of the events.
        publishers: Number of connections that publish events, all in the caller's process.
        idle_workers: Number of additional workers that host another agent type, all in one process.
        work_ms: CPU time that a call's handler uses, in milliseconds.
        sampled: Share of traces that are sampled and exported, from 0 to 1. None: no tracing.
        trace_memory: Whether to count the memory of Python objects in all processes. This slows them down.
        options: Additional settings of the peer's runtime, as pairs of name and value.
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
        """The agent types that each worker hosts."""
        return [ECHO, *(f"{ECHO}{number}" for number in range(1, self.agent_types))]

    @property
    def keys(self) -> list[str]:
        """The keys of the live agents of each type."""
        return [str(number) for number in range(self.live_agents)]


@dataclass(frozen=True, kw_only=True)
class Place:
    """How the processes of one peer find each other.

    Args:
        address: Address of the NATS server, or of the peer's host process.
        namespace: Separates the peers that share a NATS server.
    """

    address: str
    namespace: str
