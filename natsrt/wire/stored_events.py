"""Where an event is stored: its stream and sequence, as the attributes of its envelope say it.

The worker that takes events from a stream for a keyed type sends each one to the owner of its agent with these
attributes. The owner keeps the last handled sequence of each stream beside the agent's state, so that it handles each
event once, however often the event arrives.

A stream is named by its *id*: its name, ``@``, and the time when it was made, in microseconds since the epoch. So a
stream that was deleted and made again, or one of the same name in another system, is another stream: its sequences have
nothing to do with those of the former one.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from natsrt.errors import CannotDecode
from natsrt.wire.envelope import Envelope

STREAM: Final = "natsstream"
SEQUENCE: Final = "natssequence"
ATTEMPT: Final = "natsattempt"
STORED: Final = "natsstored"

_LONGEST_ID: Final = 300
"""Maximum length of a stream's id in characters: the server allows names of 255."""
_MOST: Final = 2**63 - 1
_MICROSECONDS: Final = 1e6


class StoredEvent(NamedTuple):
    """One event in a stream.

    ``stream`` is the stream's id (`stream_id`). ``attempt`` is the number of this attempt to handle the event, from 1.
    ``stored_at`` is when the stream stored it, in seconds since the epoch; None if that is not known.
    """

    stream: str
    sequence: int
    attempt: int = 1
    stored_at: float | None = None

    @property
    def stream_name(self) -> str:
        """The name of the stream."""
        return self.stream.rpartition("@")[0] or self.stream

    @property
    def attributes(self) -> dict[str, str]:
        """The attributes of an envelope that say where its event is stored."""
        attributes = {STREAM: self.stream, SEQUENCE: str(self.sequence), ATTEMPT: str(self.attempt)}
        if self.stored_at is not None:
            attributes[STORED] = str(round(self.stored_at * _MICROSECONDS))
        return attributes


def stream_id(name: str, made_at: float) -> str:
    """The id of the stream ``name`` that was made at ``made_at``, in seconds since the epoch."""
    return f"{name}@{round(made_at * _MICROSECONDS)}"


def stored_event(body: Envelope) -> StoredEvent | None:
    """Where the event in ``body`` is stored; None if its attributes do not say that. Raises `CannotDecode`."""
    stream = body.text(STREAM)
    if stream is None:
        return None
    if not 0 < len(stream) <= _LONGEST_ID:
        raise CannotDecode("an envelope", f"its {STREAM} must have 1 to {_LONGEST_ID} characters, not {len(stream)}")
    body.required(SEQUENCE)
    stored = _number(body, STORED)
    return StoredEvent(
        stream,
        _number(body, SEQUENCE) or 0,
        _number(body, ATTEMPT) or 1,
        None if stored is None else stored / _MICROSECONDS,
    )


def _number(body: Envelope, name: str) -> int | None:
    """The attribute ``name`` as a number from 1; None if it is absent. Raises `CannotDecode`."""
    text = body.text(name)
    if text is None:
        return None
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 19 else 0
    if not 0 < number <= _MOST:
        raise CannotDecode("an envelope", f"its {name} must be a number from 1 to {_MOST}, in decimal digits")
    return number
