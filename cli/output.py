"""What commands print: data to standard output, as a table or as JSON, and all else to standard error."""

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


class OutputClosed(Exception):
    """Who read standard output has gone, as ``head`` does."""


def line(text: str = "") -> None:
    """A line of data.

    Raises:
        OutputClosed: Nobody reads any more.
    """
    try:
        click.echo(text)
    except BrokenPipeError:
        # Python flushes standard output once more at its end; that must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputClosed from None


def note(text: str) -> None:
    """A line beside the data, on standard error."""
    click.echo(text, err=True)


def as_json(value: Any) -> None:
    """A value as indented JSON."""
    line(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], styles: dict[str, str] | None = None) -> None:
    """A table as wide as the terminal. Numbers stand to the right; ``styles`` colours cells by their text."""
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
    """``text`` without what could control a terminal: names and messages come from anybody."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option ``--json``, passed on as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)
