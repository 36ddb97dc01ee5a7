"""The health of a runtime: what probes decide by, and what an operator looks at first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """A runtime at one moment: the answer of `NatsAgentRuntime.health`.

    Counts are since the start of the runtime, where nothing else is said.
    """

    live: bool
    """Whether it is started. A live runtime recovers by itself: restarting its process does not help."""
    ready: bool
    """Whether it is started, connected and in step with the registry, and not draining."""
    reasons: tuple[str, ...] = ()
    """Why it is not live, or not ready: a sentence each. Empty for a ready runtime."""
    worker_id: str | None = None
    """The id of this start; None while stopped."""
    uptime_seconds: float = 0.0
    """Seconds since it was started."""
    draining: bool = False
    """Whether it is stopping: it takes no new messages, and finishes those that it took."""

    server: str | None = None
    """The connected server as host and port; None without one."""
    connected: bool = False
    """Whether there is a connection. A server that hangs is found out within some seconds."""
    reconnects: int = 0
    """How often the connection was lost and came back. If it grows, the network is bad or the program too slow."""
    in_step: bool = False
    """Whether the view of the registry is complete and everything that this runtime hosts is stored there."""
    workers: int = 0
    """Live workers that the registry lists, this one included."""

    agents: Mapping[str, int] = field(default_factory=dict)
    """The agent types that it hosts, and how many live agents each has here."""
    messages_handled: int = 0
    """Calls and events that were handled here, including those that failed, since their types were registered."""
    messages_failed: int = 0
    """How many of these ended in an error. Which types: ``natsrt agents stats``."""
    handlers_running: int = 0
    """Handlers that run, or wait for their agent to be made."""
    messages_queued: int = 0
    """Messages that were received and whose handlers have not started."""
    pending_bytes: int = 0
    """Bytes of the messages whose handlers have not started; they are queued, or wait for their agent."""
    max_pending_bytes: int = 0
    """Bytes from which on calls are answered busy and events are dropped: the setting of this name."""
    dropped_events: int = 0
    """Events that were dropped because `max_pending_bytes` was reached."""
    undelivered_events: int = 0
    """Events for keyed agents that this runtime sent and for which no owner could be found."""
    undecodable: int = 0
    """Messages that could not be read."""
    unknown_payloads: int = 0
    """Messages of a type that this process does not know."""

    refused_replies: int = 0
    """Calls whose reply subject lies where no reply may be sent: `docs/permissions.md`."""
    state_conflicts: int = 0
    """Instances of keyed agents that were dropped because their stored records were changed elsewhere."""

    calls_pending: int = 0
    """Calls that were sent from here and wait for their end."""
    sends_under_way: int = 0
    """Calls and events from here that have not come to their end, those that wait for the connection included."""

    @classmethod
    def stopped(cls, reason: str) -> Health:
        """The health of a runtime that is not started, for ``reason``."""
        return cls(live=False, ready=False, reasons=(reason,))
