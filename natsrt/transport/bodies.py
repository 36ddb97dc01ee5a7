"""Converts payloads to the data of NATS messages, and back. No other module does this.

An outgoing payload is put into its envelope, if it has one. The size is checked, because the server closes a connection
that sends a message over its limit. A payload that does not fit into one message is stored first, and its envelope has
a reference in its place. Whether it fits is decided here: see `Bodies.surely_fits` and `Bodies.fits`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import NO_DATA, Envelope
from natsrt.wire.references import OfEvent, Reference

_ROOM = 2
"""A payload of up to this part of the server's max_payload fits with the attributes that messages usually have, also in
base64."""


class BlobStore(Protocol):
    """Where payloads are stored that are sent by reference. See `natsrt.jetstream.blobs`."""

    async def store(self, payload: bytes, ttl: float | None = None, of_event: OfEvent | None = None) -> Reference:
        """Store a payload for ``ttl`` seconds; None: for ``blob_ttl``; infinity: until it is deleted.

        ``of_event``: what its id is to say of the event whose payload it is; None: nothing. Returns when all of it is
        stored.
        """

    async def load(self, reference: Reference) -> bytes:
        """Return a payload."""

    async def keep(self, reference: Reference, seconds: float) -> None:
        """Have a payload live for ``seconds`` from now at least; infinity: until it is deleted."""

    def delete(self, blob_id: str) -> None:
        """Delete a payload in the background."""


class Bodies:
    """Packs and unpacks the bodies of one runtime. A connection `Listener`."""

    def __init__(self, connection: Connection, options: Options, blobs: BlobStore) -> None:
        self._connection = connection
        self._blobs = blobs
        self._threshold = options.blob_threshold or sys.maxsize
        self.unpack: Callable[[bytes], Envelope | None] = envelope.decode
        """Return the envelope in a message's data; None for a plain body. Raises `CannotDecode` if it is malformed."""
        self.surely_fits: int = 0
        """A payload of up to this many bytes is never sent by reference. For a larger one, `fits` decides."""
        connection.add_listener(self)

    def connection_made(self) -> None:
        """Part of `Listener`."""
        self.surely_fits = min(self._threshold, self._connection.max_payload // _ROOM)

    def connection_lost(self) -> None:
        """Part of `Listener`."""

    @property
    def max_payload(self) -> int:
        """Maximum size of one message in bytes."""
        return self._connection.max_payload

    def fits(self, kind: str, attributes: str, payload: bytes, content_type: str, more: int = 0) -> bool:
        """True if a payload is sent in its message, with up to ``more`` bytes of further attributes.

        Call it only for a payload that is larger than `surely_fits`.
        """
        limit = self._connection.max_payload
        return len(payload) <= min(self._threshold, limit) and (
            envelope.encoded_size(kind, attributes, payload, content_type) + more <= limit
        )

    def pack(
        self,
        kind: str,
        attributes: str,
        payload: bytes,
        content_type: str = envelope.JSON_CONTENT,
        *,
        headers: dict[str, str] | None = None,
        more: int = 0,
    ) -> bytes:
        """Return a body of ``kind`` with ``attributes`` (JSON text, see `natsrt.wire.envelope.encode`) and a payload.

        ``headers`` are the headers with which the body will be sent; None for none. ``more``: bytes of further headers
        that it may get. Raises `MessageTooLarge`.
        """
        body = envelope.encode(kind, attributes, payload, content_type)
        if headers is not None or len(body) + more > self._connection.max_payload:
            self._check(body, headers, more)
        return body

    def pack_plain(self, payload: bytes, headers: dict[str, str] | None = None, more: int = 0) -> bytes:
        """Return a payload without an envelope, for a plain NATS client. ``more`` as in `pack`. Raises
        `MessageTooLarge`.
        """
        self._check(payload, headers, more)
        return payload

    def _check(self, body: bytes, headers: dict[str, str] | None, more: int) -> None:
        self._connection.check_length(self._connection.check_size(body, headers) + more)

    def repack(self, body: Envelope, **changes: str | None) -> bytes:
        """Return the body of a message that is forwarded, with changed attributes. The value None removes an attribute.

        A reference is passed on unchanged. Raises `MessageTooLarge`.
        """
        changed = envelope.rewrite(body, **changes)
        self._connection.check_size(changed)
        return changed

    # -- by reference --------------------------------------------------------------------------------------------

    async def store(self, payload: bytes, ttl: float | None = None, of_event: OfEvent | None = None) -> Reference:
        """Store a payload that does not fit, for ``ttl`` seconds; None: for ``blob_ttl``; infinity: until deleted.

        ``of_event``: what its id is to say of the event whose payload it is; None: nothing.
        Raises `MessageTooLarge`, and errors that say why JetStream cannot store it.
        """
        return await self._blobs.store(payload, ttl, of_event)

    def pack_reference(self, kind: str, attributes: str, reference: Reference, content_type: str) -> bytes:
        """Return a body with a reference in place of the payload. Raises `MessageTooLarge`."""
        return self.pack(kind, f"{attributes},{reference.attributes}", NO_DATA, content_type)

    async def load(self, body: Envelope) -> None:
        """Put the payload into an envelope that has a reference. Raises `BlobLost`, `BlobDamaged` and others."""
        if body.reference is not None:
            body.payload = await self._blobs.load(body.reference)

    async def keep(self, reference: Reference, seconds: float) -> None:
        """Have a payload live for ``seconds`` from now at least; infinity: until it is deleted.

        Raises `BlobLost`, and as `store`.
        """
        await self._blobs.keep(reference, seconds)

    def discard(self, reference: Reference) -> None:
        """Delete a payload that nobody needs any more, in the background."""
        self._blobs.delete(reference.blob_id)
