"""The numbers that settings can have, and what is said of others. Pure values: no I/O.

Servers keep durations in nanoseconds, and sizes and counts of messages, in 64 bits with a sign.
"""

from __future__ import annotations

from typing import Final

LONGEST: Final = (2**63 - 1) // 10**9
"""Seconds of the longest duration that a server can count, which is 292 years."""
LARGEST: Final = 2**63 - 1
"""The greatest whole number that a server can count."""


def seconds_text(least: float = 0, most: float = LONGEST) -> str:
    """Which numbers of seconds can be, in words. ``least`` 0: all above 0."""
    return f"a number of seconds {f'from {least:g} to' if least else 'greater than 0 and at most'} {most:,}"


def whole_text(least: int = 1, most: int = LARGEST) -> str:
    """Which whole numbers can be, in words."""
    return f"a whole number from {least:,} to {most:,}"


def seconds_problem(value: object, least: float = 0, *, or_none: bool = False) -> str:
    """Why ``value`` cannot be a number of seconds, as words that follow its name; empty if it can. ``least`` 0: it must
    be above 0. ``or_none``: it may be None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    can_be = is_number and least <= value <= LONGEST and value > 0  # type: ignore[operator]
    return _problem(value, can_be, seconds_text(least), or_none)


def whole_problem(value: object, most: int = LARGEST, *, or_none: bool = False) -> str:
    """Why ``value`` cannot be a whole number from 1 on, as words that follow its name; empty if it can. ``or_none``: it
    may be None."""
    can_be = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
    return _problem(value, can_be, whole_text(1, most), or_none)


def _problem(value: object, can_be: bool, text: str, or_none: bool) -> str:
    if can_be or (or_none and value is None):
        return ""
    return f"must be {text}{' or none' if or_none else ''}, not {value!r:.60}"
