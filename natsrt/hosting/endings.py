"""What follows from the end of an attempt to handle an event of a durable topic: the only place that decides it.

Pure values: no I/O. `natsrt.hosting.durable_settlement` and `natsrt.hosting.feeder` find out how an attempt ended, ask
here, and do what is decided. The decisions, of which the first one counts that applies:

========================================================  ============================================================
how it ended                                              what follows
========================================================  ============================================================
before it began: it has become a dead letter before       acknowledged
before it began: its attempts are used up                 a dead letter: none of them came to its end
its handler returned, or it is for no agent of the type   acknowledged
it is for no agent, as far as an incomplete view says     given back: no attempt
nobody tried: its worker stops, its owner is busy         given back: no attempt
its publisher has cancelled it                            acknowledged
`Reject`                                                  a dead letter
it can never be read                                      a dead letter
the last attempt failed                                   a dead letter
the stream discards it before the next attempt            a dead letter
the next attempt is more than a minute away               tried again, and stored for that moment if that is possible
everything else                                           tried again, in its place
========================================================  ============================================================
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Final

from natsrt.errors import BlobDamaged, BlobLost, CannotDecode, MessageTooLarge, NotSettled, Reject, Retry
from natsrt.retry_types import RetryOptions
from natsrt.wire.exception_parts import carried, class_name, read

LONGEST_IN_PLACE: Final = 60.0
"""Seconds for which an event waits in its place for its next attempt, if it can wait elsewhere. In its place it counts
among the events of its consumer that are not acknowledged, of which there may be 10,000."""
_SOON: Final = 0.05
"""Seconds after which another worker gets an event that was given back because its worker stops."""
_UNREADABLE: Final = (CannotDecode, BlobLost, BlobDamaged, MessageTooLarge)
"""What is raised, before its handler starts, for an event that no attempt will ever read."""


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """The event needs nothing more."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """The event is delivered again ``after`` so many seconds. What ended was no attempt."""

    after: float


@dataclass(frozen=True, slots=True)
class TryAgain:
    """The event is tried again ``after`` so many seconds, because an attempt has failed with this ``error``.

    ``elsewhere``: until then it waits where it holds no place in its consumer.
    """

    error: BaseException
    after: float
    elsewhere: bool = False


@dataclass(frozen=True, slots=True)
class Bury:
    """The event becomes a dead letter with this ``error``. ``reason`` says why it is not tried again."""

    error: BaseException
    reason: str
    attempts: int


Fate = Acknowledge | GiveBack | TryAgain | Bury


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an attempt ended.

    ``error``: what was raised; None: nothing was. ``name``: the name of its class, if it was raised on another worker;
    None: it is that of ``error``. ``attempts``: how many were used up, with this one. ``begun``: if a
    handler was called; None: another worker knows that. ``unknown``: it is for no agent, according to a view of the
    registry that is not complete. ``refused``: nobody tried to handle it. ``at_once``: if it was refused, another
    worker can have it at once. ``cancelled``: its publisher has cancelled it. ``left``: seconds until its stream
    discards it; None: it does not. ``can_wait``: it can wait for its next attempt without holding a place.
    """

    attempts: int
    error: BaseException | None = None
    name: str | None = None
    begun: bool | None = True
    unknown: bool = False
    refused: bool = False
    at_once: bool = False
    cancelled: bool = False
    left: float | None = None
    can_wait: bool = False


def before_it_begins(
    retries: RetryOptions, stream: str, sequence: int, *, attempts: int, given_up: bool
) -> Acknowledge | Bury | None:
    """What happens to an event whose next attempt is about to begin; None: the attempt begins.

    ``attempts`` were used up before. ``given_up``: it has become a dead letter, and only its end was lost.
    """
    if given_up:
        return Acknowledge()
    if attempts >= retries.max_deliver:
        error = NotSettled(stream, sequence, attempts)
        return Bury(error, str(error), attempts)
    return None


def fate(retries: RetryOptions, ending: Ending) -> Fate:
    """What happens to an event after an attempt has ended."""
    error = ending.error
    if ending.refused:
        return GiveBack(_SOON if ending.at_once else retries.retry_delay)
    if error is None:
        return GiveBack(retries.retry_delay) if ending.unknown else Acknowledge()
    if ending.cancelled and isinstance(error, asyncio.CancelledError):
        return Acknowledge()
    name = ending.name or class_name(type(error))
    if isinstance(error, Reject):
        return Bury(error, _reason(error) or name, ending.attempts)
    if _is_unreadable(ending, error):
        return Bury(error, str(error), ending.attempts)
    if ending.attempts >= retries.max_deliver:
        reason = f"{name} in the last of {ending.attempts} attempts"
        return Bury(error, reason, ending.attempts)
    after = _after(error)
    if after is None:
        after = retries.delay(ending.attempts)
    if ending.left is not None and ending.left <= after:
        reason = f"its stream discards it before the next attempt, which is {after:g} s away: {name}"
        return Bury(error, reason, ending.attempts)
    return TryAgain(error, after, elsewhere=ending.can_wait and after > LONGEST_IN_PLACE)


def _reason(error: Reject) -> str:
    """The reason of a handler; its text if it has none. Empty if it has no text either."""
    reason = read(lambda: error.reason, None)
    return read(lambda: carried(str(error if reason in (None, "") else reason)), "")


def _after(error: BaseException) -> float | None:
    """The seconds that a handler has asked for; None: it has not. A class derived from `Retry` may have any attribute,
    and so may an error from the wire."""
    after = read(lambda: error.after, None) if isinstance(error, Retry) else None
    if isinstance(after, bool) or not isinstance(after, int | float) or not 0 <= after < math.inf:
        return None
    return after


def _is_unreadable(ending: Ending, error: BaseException) -> bool:
    if ending.begun is None:  # what its handler does may fail because a payload is lost
        return isinstance(error, CannotDecode)
    return not ending.begun and isinstance(error, _UNREADABLE)
