"""Takes messages while there is no connection and no client that could reconnect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nats.aio.client import DEFAULT_PENDING_SIZE

from natsrt.transport.client import ClientReports, NatsClient
from natsrt.transport.stall_watch import StallWatch


class KeepingClient(NatsClient):
    """A client that never connects. It keeps what is published, as nats-py's client does while it reconnects.

    Like there, ``publish`` raises nats-py's ``OutboundBufferLimitError`` beyond ``DEFAULT_PENDING_SIZE`` bytes.

    Args:
        reports: As for `NatsClient`.
        stall_watch: As for `NatsClient`.
        max_payload: Maximum size of a message in bytes.
    """

    def __init__(self, reports: ClientReports, stall_watch: StallWatch, max_payload: int) -> None:
        super().__init__(reports, stall_watch)
        self._max_payload = max_payload
        self._max_pending_size = DEFAULT_PENDING_SIZE
        self._skip_subject_validation = True

    def keep(self, messages: Sequence[bytes]) -> None:
        """Take messages that `take_unsent` of another client has returned. They are older than those kept here."""
        self._pending[:0] = messages
        self._pending_data_size += sum(map(len, messages))

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """Do nothing: nothing is written."""
