"""Checks of arguments that several of these modules have."""

from __future__ import annotations

from typing import Any, Final

_LONGEST: Final = 1e9
"""Seconds of the longest time limit; those beyond, infinity too, are taken for this one."""


def checked_retries(retries: Any) -> int:
    """``retries``, if it is how often something may be tried again. Raises ValueError."""
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ValueError(f"retries must be a whole number of at least 0, not {retries!r:.60}")
    return retries


def checked_timeout(timeout: Any) -> float:
    """``timeout``, if it is a number of seconds above 0, infinity included. Raises ValueError."""
    if isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout > 0:
        return float(min(timeout, _LONGEST))
    raise ValueError(f"timeout must be a number of seconds above 0, not {timeout!r:.60}")
