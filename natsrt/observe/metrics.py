"""The counters of a runtime, in one object. Health, services and metrics read it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from natsrt.wire.exception_parts import class_name


@dataclass(slots=True)
class TypeCounters:
    """The counters of one agent type in this process since it was registered."""

    messages: int = 0
    """Calls and events that were handled, including those that failed."""
    errors: int = 0
    """How many of them failed, plus the events that were dropped because the intake was full."""
    busy_ns: int = 0
    """Nanoseconds from the start of a message's task to the end of its handler, summed over all messages."""
    last_error: str = ""
    """The class of the last error; empty if there was none."""

    def record(self, began_ns: int, error: BaseException | None) -> None:
        """Count a message.

        ``began_ns`` is when its task began, by `time.perf_counter_ns`. ``error`` is None if its handler succeeded.
        """
        self.messages += 1
        self.busy_ns += time.perf_counter_ns() - began_ns
        if error is not None:
            self.errors += 1
            self.last_error = class_name(type(error))

    def record_drop(self) -> None:
        """Count an event that was not handled because the intake was full."""
        self.errors += 1
        self.last_error = "dropped: the intake is full"


@dataclass(slots=True)
class Counters:
    """The counters of a runtime since its last start.

    ``types`` are the counters of each hosted agent type. They are kept when the runtime is stopped and started again.
    """

    types: Mapping[str, TypeCounters]
    sent: int = 0
    """Messages sent: calls, events, and questions about agents."""
    taken_in: int = 0
    """Messages accepted into the intake."""
    dropped_events: int = 0
    """Events dropped because the intake was full."""
    undelivered_events: int = 0
    """Events for keyed agents that were sent from here and for which no owner could be found."""
    undecodable: int = 0
    """Messages that could not be decoded."""
    unknown_payloads: int = 0
    """Messages of a type without a serializer in this process."""
    refused_replies: int = 0
    """Calls whose reply subject is not allowed."""
    state_conflicts: int = 0
    """Instances of keyed agents that were dropped because their records were changed elsewhere."""
    redelivered: int = 0
    """Deliveries of events of durable topics that were not the first ones of their events."""
    dead_letters: int = 0
    """Events of durable topics that became dead letters here."""

    @property
    def messages_handled(self) -> int:
        """Calls and events handled since their types were registered, including those that failed."""
        return sum(counters.messages for counters in self.types.values())

    @property
    def messages_failed(self) -> int:
        """How many of them failed, plus the events that were dropped because the intake was full."""
        return sum(counters.errors for counters in self.types.values())
