"""Everything that a runtime counts, in one object. Health, services and metrics read it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class TypeCounters:
    """What one agent type did in this process since it was registered. Times are in nanoseconds."""

    messages: int = 0
    """Calls and events that were handled, those that failed included."""
    errors: int = 0
    """How many of them failed, and events that were dropped because the intake was full."""
    busy_ns: int = 0
    """Time from the start of each message's task to the end of its handler, added up."""
    last_error: str = ""
    """The class of the last error; empty if there was none."""

    def record(self, began_ns: int, error: BaseException | None) -> None:
        """Count a message whose task began at ``began_ns`` of `time.perf_counter_ns`; ``error`` None: it succeeded."""
        self.messages += 1
        self.busy_ns += time.perf_counter_ns() - began_ns
        if error is not None:
            self.errors += 1
            self.last_error = type(error).__qualname__

    def record_drop(self) -> None:
        """Count an event that was not handled because the intake was full."""
        self.errors += 1
        self.last_error = "dropped: the intake is full"


@dataclass(slots=True)
class Counters:
    """The counts of one start of a runtime. ``types``: the counters of each hosted agent type, kept between starts."""

    types: Mapping[str, TypeCounters]
    sent: int = 0
    """Messages sent: calls, events, and questions about agents."""
    taken_in: int = 0
    """Messages taken into the intake."""
    dropped_events: int = 0
    """Events dropped because the intake was full."""
    undelivered_events: int = 0
    """Events for keyed agents that were sent from here and for which no owner could be found."""
    undecodable: int = 0
    """Messages that could not be decoded."""
    unknown_payloads: int = 0
    """Messages of a type that is unknown in this process."""
    refused_replies: int = 0
    """Calls with a reply subject to which no reply may be sent."""
    state_conflicts: int = 0
    """Instances of keyed agents that were dropped because their records were changed elsewhere."""

    @property
    def messages_handled(self) -> int:
        """Calls and events handled since their types were registered, those that failed included."""
        return sum(counters.messages for counters in self.types.values())

    @property
    def messages_failed(self) -> int:
        """How many of them failed."""
        return sum(counters.errors for counters in self.types.values())
