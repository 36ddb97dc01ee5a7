"""Converts payloads to the data of NATS messages, and back. No other module does this.

An outgoing payload is put into its envelope, if it has one. The size is checked, because the server closes a connection
that sends a message over its limit. If payloads that are too large for one message are ever sent by reference, that
belongs here too.
"""

from __future__ import annotations

from collections.abc import Callable

from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope


class Bodies:
    """Packs and unpacks the bodies of one runtime."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.unpack: Callable[[bytes], Envelope | None] = envelope.decode
        """Return the envelope in a message's data; None for a plain body. Raises `CannotDecode` if it is malformed."""

    def pack(
        self,
        kind: str,
        attributes: str,
        payload: bytes,
        content_type: str = envelope.JSON_CONTENT,
        *,
        headers: dict[str, str] | None = None,
    ) -> bytes:
        """Return a body of ``kind`` with ``attributes`` (JSON text, see `natsrt.wire.envelope.encode`) and a payload.

        ``headers`` are the headers with which the body will be sent; None for none. Raises `MessageTooLarge`.
        """
        body = envelope.encode(kind, attributes, payload, content_type)
        if headers is not None or len(body) > self._connection.max_payload:
            self._connection.check_size(body, headers)
        return body

    def pack_plain(self, payload: bytes, headers: dict[str, str] | None = None) -> bytes:
        """Return a payload without an envelope, for a plain NATS client. Raises `MessageTooLarge`."""
        self._connection.check_size(payload, headers)
        return payload

    def repack(self, body: Envelope, **changes: str | None) -> bytes:
        """Return the body of a message that is forwarded, with changed attributes. The value None removes an attribute.

        Raises `MessageTooLarge`.
        """
        changed = envelope.rewrite(body, **changes)
        self._connection.check_size(changed)
        return changed
