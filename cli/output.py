"""What commands print: data to standard output, as a table or as JSON; everything else to standard error."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
import orjson

_WIDTH_OF_PIPES = 160
"""Width of tables, in characters, where standard output is not a terminal: wide, so that few cells are folded."""


class OutputClosed(Exception):
    """The reader of standard output has closed it, as ``head`` does."""


def line(text: str = "") -> None:
    """Print a line of data.

    Raises:
        OutputClosed: The reader has closed standard output.
    """
    try:
        click.echo(text)
    except BrokenPipeError:
        # Python flushes standard output again when it exits; that must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputClosed from None


def note(text: str) -> None:
    """Print a line that is not data, on standard error."""
    click.echo(text, err=True)


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
