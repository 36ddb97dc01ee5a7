"""Durations and times on the command line."""

from __future__ import annotations

from datetime import datetime

import click
from pydantic import TypeAdapter, ValidationError

from natsrt.options.values import Seconds


def seconds(option: str, text: str) -> float:
    """The seconds of a duration. Raises ``click.UsageError``, which names the option."""
    try:
        return TypeAdapter[float](Seconds).validate_python(text)
    except ValidationError:
        raise click.UsageError(f"{option}: {text!r} is not a duration such as 60, 90s or 5m") from None


def time(option: str, text: str) -> datetime:
    """A time with its zone. Raises ``click.UsageError``, which names the option."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(f"{option}: {text!r} is not a time such as 2030-01-31T09:00:00Z") from None
    if found.utcoffset() is None:
        raise click.UsageError(f"{option}: {text!r} has no time zone: add Z, or an offset such as +02:00")
    return found
