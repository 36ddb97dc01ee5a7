"""Message schedules of nats-server: when a stream publishes a stored message. Pure values: no I/O.

A schedule is a message of the stream with the headers below. The server publishes its data, and its other headers, on
the target, a subject of the same stream. A subject has one schedule at most: the last message on it.
"""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass
from typing import Final

from natsrt.wire.times import LAST, known, rfc3339

SCHEDULE: Final = "Nats-Schedule"
"""Header with the time, or the times, at which the message is published."""
TARGET: Final = "Nats-Schedule-Target"
"""Header with the subject on which it is published."""
TIME_ZONE: Final = "Nats-Schedule-Time-Zone"
"""Header with the IANA name of the time zone of a cron line. UTC without it."""
_TTL: Final = "Nats-TTL"
"""Header without which the stream's ``max_age`` deletes a schedule before its time."""

LEAST_EVERY: Final = 1.0
"""The server's shortest interval, in seconds."""
_CRON_FIELDS: Final = 6
_AT: Final = "@at "
_LINE: Final = re.compile(r"[\x20-\x7E]+")
_LAST_TEXT: Final = rfc3339(LAST)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the server publishes a message.

    ``text`` is as the server has it: ``@at`` and a time, ``@every`` and an interval, or a cron line of six fields.
    ``timezone`` is the zone of a cron line; None: UTC.
    """

    text: str
    timezone: str | None = None

    def headers(self, target: str) -> dict[str, str]:
        """The headers of a message that the server publishes on ``target``."""
        headers = {SCHEDULE: self.text, TARGET: target, _TTL: "never"}
        return headers if self.timezone is None else headers | {TIME_ZONE: self.timezone}

    @property
    def last(self) -> datetime.datetime | None:
        """The last time at which it is published; None: there is none."""
        at = self.text.removeprefix(_AT)
        return None if at == self.text else datetime.datetime.fromisoformat(at)


def once(due: datetime.datetime) -> Schedule:
    """The schedule of a message that is published once. ``due`` has a time zone. After the last time that servers know,
    it is published then."""
    return Schedule(_AT + rfc3339(known(due), "microseconds"))


def due_time(delay: float | None, at: datetime.datetime | None) -> datetime.datetime | None:
    """When a message is due; None if neither is given.

    ``delay`` is in seconds, from now on. At most one of the two is given. Raises ValueError for others, and for a time
    after the last one that servers know.
    """
    if delay is not None and at is not None:
        raise ValueError("give delay or at, not both")
    if at is not None:
        return _checked_time(at)
    if delay is None:
        return None
    if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay < math.inf:
        raise ValueError(f"delay must be a number of seconds of at least 0, not {delay!r:.60}")
    return _after("delay", delay)


def is_due(due: datetime.datetime) -> bool:
    """True if this time has come."""
    return due <= datetime.datetime.now(datetime.UTC)


def of_reminder(every: float | None, cron: str | None, timezone: str | None, at: datetime.datetime | None) -> Schedule:
    """The schedule of a reminder. One of ``every`` (in seconds), ``cron`` and ``at`` is given.

    Raises ValueError for others. The server checks the fields of the cron line, and the name of the time zone.
    """
    if sum(value is not None for value in (every, cron, at)) != 1:
        raise ValueError("give one of every, cron and at")
    if timezone is not None and cron is None:
        raise ValueError("timezone is for cron only: a time has its own zone, and an interval has none")
    if every is not None:
        if isinstance(every, bool) or not isinstance(every, int | float) or not LEAST_EVERY <= every < math.inf:
            raise ValueError(f"every must be a number of seconds of at least {LEAST_EVERY:g}, not {every!r:.60}")
        _after("every", every)
        return Schedule(f"@every {f'{every:.6f}'.rstrip('0').rstrip('.')}s")
    if at is not None:
        return once(_checked_time(at))
    assert cron is not None
    fields = cron.split() if isinstance(cron, str) and _LINE.fullmatch(cron) else []
    if len(fields) != _CRON_FIELDS:
        hint = f": write {'0 ' + cron!r}" if len(fields) == _CRON_FIELDS - 1 else ""
        raise ValueError(
            f"cron must have six fields (second, minute, hour, day of month, month, day of week), not {cron!r}{hint}"
        )
    if timezone is not None and not (isinstance(timezone, str) and _LINE.fullmatch(timezone)):
        raise ValueError(f"timezone must be the name of a time zone, such as 'Europe/Berlin', not {timezone!r}")
    return Schedule(" ".join(fields), timezone)


def _checked_time(at: datetime.datetime) -> datetime.datetime:
    if not isinstance(at, datetime.datetime):
        raise ValueError(f"at must be a datetime, not {at!r}")
    if at.utcoffset() is None:
        raise ValueError(
            f"at must have a time zone, and {at.isoformat()} has none: use datetime.now(UTC), or at.astimezone() for "
            "the local time"
        )
    if at > LAST:
        raise ValueError(
            f"at must be {_LAST_TEXT} at the latest, the last time that servers know, not {at.isoformat()}"
        )
    return at


def _after(name: str, seconds: float) -> datetime.datetime:
    """The time so many seconds from now. Raises ValueError, with the argument's name, if servers do not know it."""
    now = datetime.datetime.now(datetime.UTC)
    if seconds > (LAST - now).total_seconds():
        raise ValueError(
            f"{name} must end by {_LAST_TEXT}, the last time that servers know, and {seconds!r:.60} s end later"
        )
    return now + datetime.timedelta(seconds=seconds)
