"""Times as NATS servers write them (RFC 3339), and in seconds since the epoch. Pure values: no I/O.

Servers count nanoseconds since 1970 in 64 bits with a sign. They take a later time than they can count for a past one,
and an earlier one for a time of their range. So no time reaches a server that is not between `FIRST` and `LAST`.
"""

from __future__ import annotations

import datetime
import time
from typing import Final

FIRST: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
"""The first time that a server is asked for. Nothing was stored before."""
LAST: Final = datetime.datetime(2262, 4, 11, tzinfo=datetime.UTC)
"""The last time that a server is given. It can count until the evening of that day, and adds to some times."""


def utc(seconds: float) -> datetime.datetime:
    """A time in seconds since the epoch, with the zone UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def known(moment: datetime.datetime) -> datetime.datetime:
    """The time from `FIRST` to `LAST` that is next to ``moment``, in UTC. One without a zone is local time."""
    if FIRST.year < moment.year < LAST.year:
        return moment.astimezone(datetime.UTC)
    # Python cannot convert local times near the ends of its calendar.
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)
    return min(max(aware, FIRST), LAST).astimezone(datetime.UTC)


def known_seconds(seconds: float) -> float:
    """As `known`, of a time in seconds since the epoch."""
    return min(max(seconds, FIRST.timestamp()), LAST.timestamp())


def known_delay(seconds: float) -> float:
    """A delay that begins now, cut so that it ends at `LAST`."""
    return min(seconds, LAST.timestamp() - time.time())


def rfc3339(moment: datetime.datetime, timespec: str = "auto") -> str:
    """A time as servers read it, in UTC. One without a zone is local time. ``timespec``: as in `datetime.isoformat`."""
    return moment.astimezone(datetime.UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def seconds_of(text: str) -> float:
    """A time that a server wrote, in seconds since the epoch. Raises ValueError."""
    return datetime.datetime.fromisoformat(text).timestamp()
