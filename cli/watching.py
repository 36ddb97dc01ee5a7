"""The files whose changes restart the workers of ``--reload``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

import click

from .exits import CommandFailed, Exit


@dataclass(frozen=True, slots=True)
class Watched:
    """The Python files below a directory, and those that match a pattern.

    A pattern is compared with the name of a file, with its path from ``directory``, and with the paths of the
    directories that it is in. ``*`` matches ``/`` too. Changes in ``.git``, ``.venv``, ``__pycache__`` and the like do
    not count.
    """

    directory: Path
    patterns: Sequence[str] = ()

    async def changes(self, stop: asyncio.Event) -> AsyncIterator[list[str]]:
        """Each time that files change, their names in alphabetical order, until ``stop`` is set."""
        from watchfiles import Change, DefaultFilter, PythonFilter, awatch

        python, other = PythonFilter(), DefaultFilter()

        def counts(change: Change, path: str) -> bool:
            return python(change, path) or (other(change, path) and self._includes(path))

        async for changes in awatch(self.directory, watch_filter=counts, stop_event=stop):
            yield sorted({Path(path).name for _, path in changes})

    def _includes(self, path: str) -> bool:
        try:
            relative = PurePath(path).relative_to(self.directory.resolve())
        except ValueError:
            return False
        candidates = [relative.name, *(str(part) for part in (relative, *relative.parents) if part.name)]
        return any(fnmatchcase(candidate, pattern) for candidate in candidates for pattern in self.patterns)


def checked_patterns(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> tuple[str, ...]:
    """The patterns, without ``./`` at the start and ``/`` at the end. Refuses those that no file can match."""
    patterns = []
    for text in given:
        pattern = text.removeprefix("./").rstrip("/")
        if not pattern or pattern.startswith("/") or ".." in pattern.split("/"):
            problem = f"{text!r} must be a pattern for files below --app-dir, such as '*.yaml' or 'prompts/*'"
            raise click.BadParameter(problem, ctx, param)
        patterns.append(pattern)
    return tuple(patterns)


def require_watchfiles() -> None:
    """Raise `CommandFailed` if the package that watches files is missing."""
    try:
        import watchfiles  # noqa: F401
    except ImportError:
        missing = "--reload needs the package watchfiles: pip install 'natsrt[reload]'"
        raise CommandFailed(missing, Exit.USAGE) from None
