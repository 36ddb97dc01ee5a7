"""Bodies that are ready when they come, from the command line, as messages."""

from __future__ import annotations

import orjson

from natsrt.wire.serialization import Encoded
from natsrt.wire.serializers import BYTES, JSON


def ready_message(body: bytes, type_name: str) -> Encoded:
    """A JSON body as a message of the type ``type_name``, which may also be the full name of a class."""
    return Encoded(type_name.rpartition(".")[2], JSON, body, type_name if "." in type_name else None)


def checked_json(body: bytes) -> bytes:
    """A body that is JSON, as it is. Raises ValueError if it is not: it would spoil the envelope around it."""
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    return body


def untyped_message(body: bytes) -> Encoded:
    """A body as a message whose type its agent finds out."""
    try:
        return Encoded("", JSON, checked_json(body), None)
    except ValueError:
        return Encoded("", BYTES, body, None)
