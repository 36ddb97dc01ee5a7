"""The attributes of an envelope that only tasks have."""

from __future__ import annotations

import math
from typing import Final

from natsrt.wire.envelope import Envelope, attribute

_RESULT_TTL: Final = "resultttl"
"""For how many seconds the result is kept."""
_ATTEMPTS: Final = "maxdeliver"
"""How often the task is tried; absent: as often as events of its agent type."""
_CHOSEN: Final = "chosenid"
"""``1`` if the submitter has chosen the message id: there may have been a task with this id before."""
MOST: Final = 10**9
"""The greatest number of seconds, and of attempts. The server counts in nanoseconds from 1970 with 64 bits, so a result
with a time to live of more than some 230 years would expire at once."""
_LONGEST: Final = 100
"""Digits of a number that is read."""


def task_attributes(key: str, cancel_id: str, result_ttl: float, attempts: int | None, *, chosen: bool = False) -> str:
    """The attributes that a task has beside those of every message, with a leading comma.

    ``key`` is the encoded key of its agent. ``result_ttl`` is in seconds. ``attempts`` is how often it is tried; None:
    as often as events of its agent type. ``chosen``: True if its submitter has chosen the message id.
    """
    text = (
        f",{attribute('subject', key)},{attribute('cancelid', cancel_id)},"
        f"{attribute(_RESULT_TTL, str(math.ceil(result_ttl)))}"
    )
    if attempts is not None:
        text += f",{attribute(_ATTEMPTS, str(attempts))}"
    return f"{text},{attribute(_CHOSEN, '1')}" if chosen else text


def result_ttl_of(body: Envelope) -> float | None:
    """Seconds for which the result of a task is kept, at most `MOST`; None if it does not say so in a way that can be
    read."""
    return _number(body, _RESULT_TTL)


def attempts_of(body: Envelope) -> int | None:
    """How often a task is tried, at most `MOST`; None if it does not say so in a way that can be read."""
    return _number(body, _ATTEMPTS)


def has_chosen_id(body: Envelope) -> bool:
    """True if the submitter of a task has chosen its message id."""
    return body.attributes.get(_CHOSEN) == "1"


def _number(body: Envelope, name: str) -> int | None:
    text = body.attributes.get(name)
    if not (isinstance(text, str) and text.isascii() and text.isdecimal() and text.strip("0")):
        return None
    return min(int(text), MOST) if len(text) <= _LONGEST else None
