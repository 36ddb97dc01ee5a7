"""Converts payloads to the data of NATS messages, and back. This is the only place that does so.

An outgoing body is put into its envelope, if it has one, and its size is checked, because the server closes a
connection that sends too large a message. Payloads by reference, for those too large for one message, belong here too.
"""

from __future__ import annotations

from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope


class Bodies:
    """Packs and unpacks the bodies of one runtime."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def pack(
        self,
        kind: str,
        attributes: str,
        payload: bytes,
        content_type: str = envelope.JSON_CONTENT,
        *,
        headers: dict[str, str] | None = None,
    ) -> bytes:
        """A body of ``kind`` with ``attributes`` (JSON text, see `natsrt.wire.envelope.encode`) and a payload.

        ``headers`` are those that the message will have. Raises `MessageTooLarge`.
        """
        body = envelope.encode(kind, attributes, payload, content_type)
        if headers is not None or len(body) > self._connection.max_payload:
            self._connection.check_size(body, headers)
        return body

    def pack_plain(self, payload: bytes, headers: dict[str, str] | None = None) -> bytes:
        """A payload without an envelope, for a plain NATS client. Raises `MessageTooLarge`."""
        self._connection.check_size(payload, headers)
        return payload

    def repack(self, body: Envelope, **changes: str | None) -> bytes:
        """The body of a message that is forwarded, with changed attributes; None removes one.

        Raises `MessageTooLarge`.
        """
        changed = envelope.rewrite(body, **changes)
        self._connection.check_size(changed)
        return changed

    unpack = staticmethod(envelope.decode)
    """The envelope in the data of a message; None for a plain body. Raises `CannotDecode` for a broken envelope."""
