"""Checks of arguments that several of these modules have."""

from __future__ import annotations

from typing import Any


def checked_retries(retries: Any) -> int:
    """``retries``, if it is how often something may be tried again. Raises ValueError."""
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ValueError(f"retries must be a whole number of at least 0, not {retries!r:.60}")
    return retries
