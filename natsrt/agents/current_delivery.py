"""The delivery of a durable event that the present code handles: `natsrt.current_delivery`."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from natsrt.jetstream.delivery import Delivery
from natsrt.wire.stored_events import StoredEvent

handled_delivery: ContextVar[Delivery | StoredEvent | None] = ContextVar("natsrt_delivery", default=None)
"""The delivery that the current code handles, or the place of the event that a keyed agent handles; None if there is no
event of a durable topic."""


@dataclass(frozen=True, slots=True)
class DeliveryInfo:
    """What a handler may know of the delivery of an event of a durable topic.

    ``stream`` and ``sequence`` name the event: they are the same in each attempt, and for all agent types. ``attempt``
    counts the deliveries of the event to the agent type, from 1. ``stored_at`` is when the stream stored the event, in
    seconds since the epoch.
    """

    stream: str
    sequence: int
    attempt: int
    stored_at: float


def current_delivery() -> DeliveryInfo | None:
    """Return the delivery of the event that the present handler handles, also in tasks that it started.

    None outside of handlers, and for calls and for events of topics that are not durable.
    """
    delivery = handled_delivery.get()
    if delivery is None:
        return None
    if isinstance(delivery, StoredEvent):
        return DeliveryInfo(delivery.stream_name, delivery.sequence, delivery.attempt, delivery.stored_at or 0.0)
    return DeliveryInfo(delivery.stream, delivery.first_sequence, delivery.attempt, delivery.stored_at)
