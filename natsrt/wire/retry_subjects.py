"""Subjects of events that are stored once more, for one agent type and one reason, and of the counts of their attempts.

Each of these subjects is for one message only, ever. So it can be found out whether the message was stored before,
however long ago, for as long as the stream keeps it.
"""

from __future__ import annotations

from typing import Final

from natsrt.wire.subjects import Subjects, encode_token

_RETRY: Final = "retry"
_REDRIVE: Final = "redrive"
_MICROSECONDS: Final = 1e6
_DIGITS: Final = 18
"""Digits of a number that fits into 64 bits."""


def stored_again(subjects: Subjects, stream: str, agent_type: str) -> tuple[str, str]:
    """The filters of all events that are stored once more for an agent type: those of replays, and those of one message
    each."""
    again, token = subjects.again(stream), encode_token(agent_type)
    return f"{again}.{token}", f"{again}.*.{token}.*.*"


def redriven(subjects: Subjects, stream: str, agent_type: str, dead_letter: int, kept_at: float) -> str:
    """The subject on which the event of a dead letter is stored once more for its agent type.

    ``dead_letter`` is the dead letter's number. ``kept_at``, in seconds since the epoch, is when it was stored: a
    stream of dead letters that was made anew counts from 1 again.
    """
    own = f"{dead_letter}.{round(kept_at * _MICROSECONDS)}"
    return f"{subjects.again(stream)}.{_REDRIVE}.{encode_token(agent_type)}.{own}"


def retried(subjects: Subjects, stream: str, agent_type: str, sequence: int, attempts: int) -> tuple[str, str]:
    """Two subjects for the attempt to handle an event that follows after ``attempts`` others.

    The event waits on the first one, and is published on the second one when it is due.
    """
    own = f"{_RETRY}.{encode_token(agent_type)}.{sequence}.{attempts}"
    return f"{subjects.later(stream)}.{own}", f"{subjects.again(stream)}.{own}"


def retries_of(subjects: Subjects, stream: str, agent_type: str, sequence: int) -> str:
    """The filter that matches both subjects of all such attempts to handle an event."""
    return f"{subjects.own('*', stream)}.{_RETRY}.{encode_token(agent_type)}.{sequence}.*"


def waiting_retries(subjects: Subjects, stream: str, agent_type: str | None = None) -> str:
    """The filter of the events that wait for such an attempt: of one agent type, or of all."""
    token = "*" if agent_type is None else encode_token(agent_type)
    return f"{subjects.later(stream)}.{_RETRY}.{token}.*.*"


def retry_of(subjects: Subjects, stream: str, subject: str) -> tuple[int, int] | None:
    """The sequence of the event and the number of its attempts, if ``subject`` is the second one of `retried`."""
    start = f"{subjects.again(stream)}.{_RETRY}."
    if not subject.startswith(start):
        return None
    _, _, own = subject.removeprefix(start).partition(".")
    sequence, _, attempts = own.partition(".")
    numbers = number(sequence), number(attempts)
    return None if None in numbers else numbers  # type: ignore[return-value]


def number(text: str) -> int | None:
    """A number of at most 64 bits in decimal digits; None if ``text`` is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS else None


def attempts_of(subjects: Subjects, agent_type: str, stream: str, sequence: int, stored_at: float) -> str:
    """The subject on which the attempts of an agent type to handle an event are counted.

    ``stored_at``, in seconds since the epoch, is when the event was stored: a stream that was made anew counts its
    sequences from 1 again.
    """
    own = f"{encode_token(agent_type)}.{stream}.{sequence}.{round(stored_at * _MICROSECONDS)}"
    return f"{subjects.attempts}.{own}"
