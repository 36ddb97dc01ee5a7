"""Times and durations on the command line."""

from __future__ import annotations

import datetime
import re
import time
from typing import Any

import click

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


class Moment(click.ParamType[float]):
    """A moment in the past: how long ago it was (``90s``, ``1h30m``, ``7d``), or a time of ISO 8601. A time without a
    zone is local time. Its value is in seconds since the epoch."""

    name = "DURATION|TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        parts = _PART.findall(value)
        if parts and "".join(number + unit for number, unit in parts) == value:
            return time.time() - sum(float(number) * _UNITS[unit] for number, unit in parts)
        try:
            return datetime.datetime.fromisoformat(value).timestamp()
        except (ValueError, OverflowError, OSError):
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
