"""Times and durations on the command line."""

from __future__ import annotations

import datetime
import re
import time
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from natsrt.options.values import Seconds
from natsrt.wire.ranges import seconds_text
from natsrt.wire.schedules import due_time
from natsrt.wire.times import known, known_seconds

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def _in_parts(text: str) -> float | None:
    """The seconds of a text such as ``1h30m`` or ``7d``; None if it is none."""
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


class Duration(click.ParamType[float]):
    """A number of seconds, as text with or without units. ``least``: the least one, in seconds; 0: all above 0."""

    name = "DURATION"

    def __init__(self, least: float = 0) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        given = _in_parts(value) if isinstance(value, str) else None
        try:
            seconds = TypeAdapter[float](Seconds).validate_python(value if given is None else given)
        except ValidationError:
            seconds = -1.0
        if seconds < self._least or seconds <= 0:
            can_be = seconds_text(self._least)
            self.fail(f"{value!r} is not a duration such as 60, 90s or 5m, {can_be}", param, ctx)
        return seconds


class Time(click.ParamType[datetime.datetime]):
    """A time of ISO 8601 with its zone."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime.datetime:
        try:
            found = datetime.datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a time such as 2030-01-31T09:00:00Z", param, ctx)
        if found.utcoffset() is None:
            self.fail(f"{value!r} has no time zone: add Z, or an offset such as +02:00", param, ctx)
        return found


def due(delay: float | None, at: datetime.datetime | None) -> datetime.datetime | None:
    """When something is due, as ``--delay`` and ``--at`` say; None if neither is given. Raises ``click.UsageError``."""
    if delay is not None and at is not None:
        raise click.UsageError("give --delay or --at, not both")
    try:
        return due_time(delay, at)
    except ValueError as error:
        raise click.UsageError(f"--{error}") from None


class Moment(click.ParamType[float]):
    """A moment in the past: how long ago it was (``90s``, ``1h30m``, ``7d``), or a time of ISO 8601. A time without a
    zone is local time. Its value is in seconds since the epoch, cut to the times that servers know."""

    name = "DURATION|TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        if (ago := _in_parts(value)) is not None:
            return known_seconds(time.time() - ago)
        try:
            return known(datetime.datetime.fromisoformat(value)).timestamp()
        except ValueError:
            self.fail(
                f"{value!r} is neither a duration such as 1h30m or 7d, nor a time such as 2030-01-31T12:00", param, ctx
            )


def shown(seconds: float) -> str:
    """A moment, in local time and to the second."""
    return f"{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def iso(seconds: float) -> str:
    """A moment as JSON has it: in UTC, to the millisecond."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def span(seconds: float | None) -> str:
    """A number of seconds in the largest unit that shows it exactly. None: no limit."""
    if seconds is None:
        return "none"
    unit = next((unit for unit in ("d", "h", "m") if seconds >= _UNITS[unit] and not seconds % _UNITS[unit]), "s")
    return f"{seconds / _UNITS[unit]:g}{unit}"
