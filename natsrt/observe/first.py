"""Log lines that would be repeated with every message: the first of each kind is a warning."""

from __future__ import annotations

import logging
from collections.abc import Hashable

_REMEMBERED = 10_000
"""Kinds that are remembered at most. When there are more, all are forgotten."""


class FirstIsWarning:
    """Chooses the level of log lines: WARNING for the first line about a subject, DEBUG for further ones."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()

    def level(self, *subject: Hashable) -> int:
        """Return the level for a line about ``subject``."""
        if subject in self._seen:
            return logging.DEBUG
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen.add(subject)
        return logging.WARNING
