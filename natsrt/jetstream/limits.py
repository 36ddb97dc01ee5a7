"""What JetStream's errors say about its limits. Pure values: no I/O."""

from __future__ import annotations

from typing import Final, NamedTuple

import nats.js.errors

DISK: Final = "disk"
"""The name of the limit that is the server's disk itself."""
CONSUMERS: Final = "max_consumers"
"""The name of the limit of consumers. Consumers that read a bucket live for a moment only, so this failure may pass."""

MESSAGE_SIZE: Final = "max_msg_size"
"""The name of the limit of one message's size: more room does not help."""


class Limit(NamedTuple):
    """A limit that is reached: its ``name`` in the server's configuration, and ``text``: what to do."""

    name: str
    text: str


_ACCOUNT = Limit("max_file", "the account's storage is full: free some, or raise max_file (max_mem) of the account")
_SERVER = Limit(
    "max_file_store",
    "the server's storage is full: free some, or raise max_file_store (max_memory_store) in its jetstream block",
)
_BUCKET = Limit("max_bytes", "it is full: free some, or raise its max_bytes (nats stream edit --max-bytes)")
_MESSAGES = Limit("max_msgs", "it is full: raise its max_msgs (nats stream edit --max-msgs)")
_DISK = Limit(
    DISK, "the server cannot write to its disk any more: free some space, and restart the server, which then recovers"
)

_BY_CODE: Final[dict[int, Limit]] = {
    10002: _ACCOUNT,
    10023: _SERVER,
    10026: Limit(CONSUMERS, "the limit of consumers is reached: raise max_consumers of the account, or of the stream"),
    10027: Limit("max_streams", "the account allows no more streams: raise max_streams of the account"),
    10028: _SERVER,
    10047: _SERVER,
    10054: Limit(
        MESSAGE_SIZE,
        "it takes no message of this size: raise its max_msg_size (nats stream edit --max-msg-size)",
    ),
    10113: Limit(
        "max_bytes_required",
        "the account requires a max_bytes of each stream: make the buckets yourself with one, as docs/operations.md "
        "(Buckets) shows, or drop max_bytes_required",
    ),
    10122: Limit("max_stream_bytes", "the bucket is larger than the account allows: raise max_stream_bytes"),
}
"""The limits by JetStream's error codes."""
_BY_WORDS: Final[dict[str, Limit]] = {
    "maximum bytes exceeded": _BUCKET,
    "maximum messages exceeded": _MESSAGES,
    "no space left on device": _DISK,
    "disk quota exceeded": _DISK,
    "read-only file system": _DISK,
    "input/output error": _DISK,
    "insufficient storage": _SERVER,
}
"""The limits by words in the error's text: JetStream has one code for whatever keeps it from storing a message."""


def explained(limit: Limit, error: nats.js.errors.APIError) -> str:
    """What to do about a limit that is reached, and what the server says."""
    return f"{limit.text} (the server says {error.description!r})"


def limit_reached(error: nats.js.errors.APIError) -> Limit | None:
    """The limit because of which JetStream refused a request; None if it has another reason."""
    if (found := _BY_CODE.get(error.err_code or 0)) is not None:
        return found
    said = (error.description or "").lower()
    return next((limit for words, limit in _BY_WORDS.items() if words in said), None)
