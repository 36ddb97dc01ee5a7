"""The header block of a NATS message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final


def header_block(headers: Mapping[str, str]) -> bytes:
    """Headers as they are sent. They must contain no line ends, which this function does not check."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"NATS/1.0\r\n{lines}\r\n".encode()


HEADER_OVERHEAD: int = len(header_block({}))
"""Bytes of a header block without headers: ``NATS/1.0`` and the line ends around it."""


def headers_size(headers: Mapping[str, str]) -> int:
    """Bytes of a header block, which the server counts towards ``max_payload``."""
    return len(header_block(headers))


MAX_STORED_HEADERS: Final = 65_535
"""The longest header block of a message in a stream, in bytes. JetStream writes the length as 16 bits, and refuses a
longer one. A message of core NATS has no such limit."""
