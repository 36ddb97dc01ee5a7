"""Payloads that are sent by reference: who must be able to read them, and for how long streams need them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from autogen_core import TopicId

from natsrt.errors import MessageTooLarge
from natsrt.jetstream.registry.registry import Registry
from natsrt.options import Options
from natsrt.transport.bodies import Bodies
from natsrt.transport.connection import Connection
from natsrt.transport.headers import headers_size
from natsrt.wire import envelope
from natsrt.wire.references import OfEvent, stream_mark
from natsrt.wire.serialization import Encoded

_ADDED_LATER: Final = 1024
"""Bytes, beside the topic, that a stored event may grow by: the attributes for the owner of a keyed agent, and the
headers of a dead letter or of an event that is stored once more."""
_LONGEST_TTL: Final = 100 * 365 * 86400.0
"""Seconds of the longest time to live that is written as such. The server adds it to the time in 64 bits of
nanoseconds."""


class Referring:
    """What holds for all payloads that one runtime sends by reference."""

    def __init__(self, connection: Connection, registry: Registry, options: Options, bodies: Bodies) -> None:
        self._connection = connection
        self._bodies = bodies
        self._registry = registry
        self._blob_ttl = options.blob_ttl
        self._publish_timeout = options.publish_timeout

    def require_readers(self, workers: Iterable[str], size: int) -> None:
        """Raise `MessageTooLarge` if one of these workers cannot read a payload, of ``size`` bytes, by reference."""
        for worker_id in workers:
            if not self._registry.view.understands(worker_id, envelope.BLOBS_FEATURE):
                raise MessageTooLarge(
                    size,
                    self._connection.max_payload,
                    f"but one message may have {self._connection.max_payload:,}, and the worker {worker_id} has an "
                    "older version, which cannot read payloads that are sent by reference: update it",
                )

    def stored_whole(self, attributes: str, encoded: Encoded, headers: dict[str, str], topic: TopicId) -> bool:
        """True if an event with ``headers`` is stored in one message, and can be passed on in one later."""
        if len(encoded.payload) <= self._bodies.surely_fits:
            return True
        more = headers_size(headers)
        if self._registry.reads_bucket:  # others may not be able to send it by reference
            more += _ADDED_LATER + 4 * len(str(topic).encode())
        return self._bodies.fits(envelope.EVENT, attributes, encoded.payload, encoded.content_type, more)

    def event_in(self, stream: str) -> OfEvent:
        """What the id of a payload says of an event that is published now on a topic of ``stream``."""
        settled_at = math.ceil(time.time() + 2 * self._publish_timeout + self._blob_ttl)  # it may wait twice
        return OfEvent(stream_mark(stream), settled_at)

    def kept_for(self, stream: str, due: datetime | None) -> float:
        """Seconds for which the payload of an event is needed that ``stream`` stores; infinity: for ever.

        It is stored before the event, and loaded after the event was read, so it outlives the event by ``blob_ttl``.
        """
        max_age = self._registry.view.durable[stream].topics.max_age
        if max_age is None:
            return math.inf
        wait = 0.0 if due is None else max(0.0, (due - datetime.now(UTC)).total_seconds())
        seconds = wait + max_age + self._blob_ttl
        return seconds if seconds < _LONGEST_TTL else math.inf
