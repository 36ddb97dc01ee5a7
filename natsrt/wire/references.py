"""References: what an envelope has in place of ``data`` if its payload is stored as a blob. Pure values: no I/O."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final, NamedTuple

from natsrt.errors import CannotDecode

DATA_REF: Final = "dataref"
"""The attribute of an envelope that names the blob, from the CloudEvents extension of that name (claim check)."""
TEXTS: Final = frozenset((DATA_REF, "blobsize", "blobchunks", "blobsha256"))
"""The attributes of a reference. All are strings."""

_SCHEME: Final = "natsrt:"
_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")
_OF_EVENT = re.compile(r"[0-9a-f]{32}-([0-9a-f]{8})-([0-9a-f]{1,12})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_NUMBER: Final = 15


class Reference(NamedTuple):
    """A blob: ``size`` bytes in ``chunks`` messages. ``sha256`` is in lower-case hex digits, of the whole payload."""

    blob_id: str
    size: int
    chunks: int
    sha256: str

    @property
    def attributes(self) -> str:
        """The envelope attributes, as JSON text."""
        return (
            f'"{DATA_REF}":"{_SCHEME}{self.blob_id}","blobsize":"{self.size}","blobchunks":"{self.chunks}",'
            f'"blobsha256":"{self.sha256}"'
        )


class OfEvent(NamedTuple):
    """What the id of an event's payload says of the event.

    ``mark`` is that of the stream: see `stream_mark`. ``settled_at``, in whole seconds since the epoch, is a time after
    which the stream has stored the event, if it ever does.
    """

    mark: str
    settled_at: int


def new_blob_id(of_event: OfEvent | None = None) -> str:
    """A new id, with 128 random bits. ``of_event``: the event whose payload it is; None: that of another message."""
    random = secrets.token_hex(16)
    return random if of_event is None else f"{random}-{of_event.mark}-{of_event.settled_at:x}"


def stream_mark(stream: str) -> str:
    """Eight hex digits for a stream, in the ids of its events' payloads."""
    return sha256(stream.encode()).hexdigest()[:8]


def event_of(blob_id: str) -> OfEvent | None:
    """What an id of `new_blob_id` says of its event; None for an id of another kind."""
    found = _OF_EVENT.fullmatch(blob_id)
    return None if found is None else OfEvent(found[1], int(found[2], 16))


def is_blob_id(text: object) -> bool:
    """True for an id of 16 to 64 characters of ``[A-Za-z0-9_-]``, which is one token of a subject."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def is_number(text: str) -> bool:
    """True for a number in decimal digits, 15 at most."""
    return len(text) <= _LONGEST_NUMBER and text.isascii() and text.isdecimal()


def reference_in(attributes: Mapping[str, Any], body: bytes) -> Reference:
    """The reference in the attributes of an envelope, ``body``, which has ``dataref``. Raises `CannotDecode`."""
    named = attributes[DATA_REF]
    blob_id = named.removeprefix(_SCHEME) if isinstance(named, str) else ""
    if not is_blob_id(blob_id) or blob_id == named:
        raise CannotDecode("an envelope", f"its {DATA_REF} must be {_SCHEME} and the id of a blob", body)
    size, chunks = _number(attributes, "blobsize", body), _number(attributes, "blobchunks", body)
    if chunks > size:
        raise CannotDecode("an envelope", "its blobchunks is more than its blobsize", body)
    sha256 = attributes.get("blobsha256")
    if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
        raise CannotDecode("an envelope", "its blobsha256 must be 64 hex digits in lower case", body)
    return Reference(blob_id, size, chunks, sha256)


def _number(attributes: Mapping[str, Any], name: str, body: bytes) -> int:
    value = attributes.get(name)
    if not isinstance(value, str) or not is_number(value) or not int(value):
        raise CannotDecode("an envelope", f"its {name} must be a number above 0, in decimal digits", body)
    return int(value)
