"""Times as NATS servers write them (RFC 3339), and in seconds since the epoch. Pure values: no I/O."""

from __future__ import annotations

import datetime


def utc(seconds: float) -> datetime.datetime:
    """A time in seconds since the epoch, with the zone UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def rfc3339(time: datetime.datetime, timespec: str = "auto") -> str:
    """A time as servers read it, in UTC. One without a zone is local time. ``timespec``: as in `datetime.isoformat`."""
    return time.astimezone(datetime.UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def seconds_of(text: str) -> float:
    """A time that a server wrote, in seconds since the epoch. Raises ValueError."""
    return datetime.datetime.fromisoformat(text).timestamp()
