"""What commands print: data to standard output, as a table or as JSON; everything else to standard error.

Rules:

1. Data that cannot be written ends the command: quietly if the reader has closed the output, as ``head`` does, and else
   with an error.
2. Announcements and notes do not. A worker goes on serving calls if nobody reads what it says, or if the disk is full.
   `written_to_the_end` then decides how the command exits.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

import click
import orjson

_WIDTH_OF_PIPES = 160
"""Width of tables, in characters, where standard output is not a terminal: wide, so that few cells are folded."""


class OutputClosed(Exception):
    """The reader of standard output has closed it, as ``head`` does."""


class OutputFailed(Exception):
    """A line could not be written, as on a full disk. Its text is shown to the user."""


_failures: list[OutputFailed] = []
"""Why announcements and notes could not be written."""


def line(text: str = "") -> None:
    """Print a line of data.

    Raises:
        OutputClosed: The reader has closed standard output.
        OutputFailed: Standard output cannot be written.
    """
    try:
        click.echo(text)
    except BrokenPipeError:
        _discard(sys.stdout)
        raise OutputClosed from None
    except OSError as error:
        raise OutputFailed(f"standard output cannot be written: {error.strerror}") from None


def announce(text: str) -> None:
    """Print a line on standard output for whoever started this process. If it cannot be written, go on."""
    try:
        line(text)
    except OutputClosed:
        pass
    except OutputFailed as failure:
        _failures.append(failure)
        note(f"natsrt: {failure}", "error")


def note(text: str, level: str = "info") -> None:
    """Print a line that is not data, on standard error. If it cannot be written, go on.

    ``level`` is that of the line if the log is JSON.
    """
    write_to_stderr(text if _notes is None else _notes(text, level))


def prompt(text: str) -> None:
    """Print the beginning of a line, which a person completes, on standard error. If it cannot be written, go on."""
    write_to_stderr(text, end="")


def write_to_stderr(text: str, end: str = "\n") -> None:
    """Write a line as it is to standard error. If it cannot be written, go on."""
    try:
        click.echo(f"{text}{end}", err=True, nl=False)
    except OSError as error:
        _discard(sys.stderr)
        if not isinstance(error, BrokenPipeError):
            _failures.append(OutputFailed(f"standard error cannot be written: {error.strerror}"))


_notes: Callable[[str, str], str] | None = None
"""Makes the line of a note from its text and level; None: the line is the text."""


def shape_notes(shape: Callable[[str, str], str]) -> None:
    """From now on, write each note as ``shape`` makes it from its text and level."""
    global _notes
    _notes = shape


def open_closed_streams() -> None:
    """Open /dev/null for each standard stream that is closed, as standard output is after ``>&-``."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def written_to_the_end() -> bool:
    """Write what is left in the buffers. False if not everything that this command printed could be written.

    Output that a reader closed counts as written.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            _discard(stream)
            if not isinstance(error, BrokenPipeError):
                _failures.append(OutputFailed(f"{stream.name} cannot be written: {error}"))
    return not _failures


def _discard(stream: TextIO) -> None:
    """Send all further output of ``stream`` nowhere. Python flushes it at its exit; that must not fail as well."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def begin_again(first: bool) -> None:
    """Before what replaces former output: clear the terminal. Into a pipe, print an empty line, unless ``first``."""
    if sys.stdout.isatty():
        click.clear()
    elif not first:
        line()


def as_json(value: Any) -> None:
    """Print a value as indented JSON."""
    line(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], styles: dict[str, str] | None = None) -> None:
    """Print a table as wide as the terminal. Numbers are aligned to the right; ``styles``: style by text of a cell."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        shown.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        cells = [printable(_cell(value)) for value in row]
        shown.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in cells))
    text = io.StringIO()
    width = shutil.get_terminal_size(fallback=(_WIDTH_OF_PIPES, 24)).columns
    Console(file=text, width=width, force_terminal=sys.stdout.isatty()).print(shown)
    line("\n".join(part.rstrip() for part in text.getvalue().splitlines()).strip("\n"))


def _cell(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """``text`` with control characters escaped, since a name or a message from anyone could control the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option ``--json``, passed to the command as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)
