"""The health of a runtime, for probes and operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict


class Counts(TypedDict, total=False):
    """What a runtime has counted since its start. The names are those of `Health`."""

    reconnects: int
    messages_handled: int
    messages_failed: int
    dropped_events: int
    undelivered_events: int
    undecodable: int
    unknown_payloads: int
    refused_replies: int
    state_conflicts: int
    redelivered: int
    dead_letters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The health of a runtime at one moment: the result of `NatsAgentRuntime.health`.

    Counts are since the last start of the runtime, unless noted; a stopped runtime has those of its last run.
    """

    live: bool
    """True if it is started. A live runtime recovers from errors itself, so restarting its process does not help."""
    ready: bool
    """True if it is started, connected, in step with the registry, and not draining."""
    reasons: tuple[str, ...] = ()
    """Why it is not live or not ready, one sentence per reason. Empty for a ready runtime."""
    worker_id: str | None = None
    """The id of this start; None while stopped."""
    uptime_seconds: float = 0.0
    """Seconds since it was started."""
    draining: bool = False
    """True if it is stopping: it accepts no new messages, and finishes those that it has accepted."""

    server: str | None = None
    """Host and port of the server to which it is connected; None if it is not connected."""
    connected: bool = False
    """True if it is connected. If a server hangs, this becomes False within some seconds."""
    reconnects: int = 0
    """How often the connection was lost and restored. A growing count means a bad network or too slow a program."""
    server_error: str | None = None
    """The last error that the server sent, as its text; None if it sent none since the runtime was last connected."""
    jetstream_full: str | None = None
    """The text of the last `JetStreamFull` within a minute; None if JetStream refused nothing because of a limit."""
    jetstream_usage: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """What is used of each limit of the account and of natsrt's buckets, and the limit. Measured by workers only."""
    in_step: bool = False
    """True if the view of the registry is complete and everything that this runtime hosts is stored there."""
    workers: int = 0
    """Number of live workers in the registry, including this one."""
    foreign_registry: str | None = None
    """When another registry of the namespace was made, and its domain; None if none was heard of lately."""
    agents: Mapping[str, int] = field(default_factory=dict)
    """The agent types that it hosts, and how many live agents each has here."""
    messages_handled: int = 0
    """Calls and events handled here since their types were registered, including those that failed."""
    messages_failed: int = 0
    """How many of these failed, plus the events that were dropped. ``natsrt agents stats`` shows them by type."""
    handlers_running: int = 0
    """Handlers that are running, or waiting for their agent to be created."""
    messages_queued: int = 0
    """Messages that were received and whose handlers have not started."""
    pending_bytes: int = 0
    """Bytes of the messages whose handlers have not started. They are queued, or waiting for their agent."""
    max_pending_bytes: int = 0
    """The setting ``max_pending_bytes``. Above this number of bytes, calls are answered busy and events are dropped."""
    dropped_events: int = 0
    """Events that were dropped because `max_pending_bytes` was reached."""
    undelivered_events: int = 0
    """Events for keyed agents that were sent from here and for which no owner could be found."""
    undecodable: int = 0
    """Messages that could not be read."""
    unknown_payloads: int = 0
    """Messages of a type without a serializer in this process."""

    refused_replies: int = 0
    """Calls whose reply subject is not allowed: see ``docs/permissions.md``."""
    state_conflicts: int = 0
    """Instances of keyed agents that were dropped because their stored records were changed elsewhere."""
    redelivered: int = 0
    """Deliveries of events of durable topics to this runtime that were not the first ones of their events."""
    dead_letters: int = 0
    """Events of durable topics that this runtime has made dead letters: see ``docs/durable.md``."""
    retries_waiting: int | None = None
    """Events that are tried again more than a minute after they failed, counted every 30 s; None if not known."""
    tasks_waiting: int | None = None
    """Tasks of the hosted agent types that no worker holds, counted every 30 s; None if there are none to take."""
    dead_letters_kept: int | None = None
    """Dead letters of the whole namespace, counted every 30 s; None if this runtime handles no durable topics."""

    calls_pending: int = 0
    """Calls that were sent from here and have not completed."""
    sends_under_way: int = 0
    """Calls and events from here that have not completed, including those that wait for the connection."""

    @classmethod
    def stopped(cls, reason: str, counts: Counts) -> Health:
        """Return the health of a runtime that is not started.

        ``reason`` says why, and ``counts`` are those of its last run; empty if there was none.
        """
        return cls(live=False, ready=False, reasons=(reason,), **counts)
