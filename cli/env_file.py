"""``--env-file``: environment variables from a file, in the format of dotenv files.

Rules:

- A line is ``NAME=value``, ``export NAME=value``, empty, or a comment that starts with ``#``. Blanks around the
  name and the value do not count.
- A value in single quotes is taken as it is. In double quotes, ``\\n``, ``\\r``, ``\\t``, ``\\"``, ``\\$`` and
  ``\\\\`` are escapes. Both may span lines. Without quotes, the value ends before `` #``.
- ``$`` has no meaning: nothing is substituted.
- Everything else is an error that names the file and the line, and never a value, which may be a secret.
- Variables that the process has already keep their values, even if these are empty.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import click

_NAME = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=[ \t]*")
_SINGLE = re.compile(r"'([^']*)'")
_DOUBLE = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_BARE = re.compile(r"[^\n]*")
_LINE_END = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|$)")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\n": ""}


class WrongEnvFile(Exception):
    """The file cannot be read, or a line of it. Its text names both."""


def read_env_file(path: Path) -> dict[str, tuple[str, int]]:
    """The variables in a file: value and line of each, the last one where a name is given several times.

    Raises:
        WrongEnvFile: The file cannot be read, or a line has another form.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise WrongEnvFile(f"{path} is not UTF-8 text") from None
    except FileNotFoundError:
        raise WrongEnvFile(f"there is no file {path}") from None
    except OSError as error:
        raise WrongEnvFile(f"{path} cannot be read: {error.strerror}") from None
    found: dict[str, tuple[str, int]] = {}
    position = 0
    while position < len(text):
        blank = _LINE_END.match(text, position)
        if blank is not None:
            position = blank.end()
            continue
        line = text.count("\n", 0, position) + 1
        try:
            name, value, position = _assignment(text, position)
        except ValueError as error:
            raise WrongEnvFile(f"{path}, line {line}: {error}") from None
        found[name] = (value, line)
    return found


def _assignment(text: str, position: int) -> tuple[str, str, int]:
    """Name and value of the assignment at ``position``, and where the next line begins."""
    name = _NAME.match(text, position)
    if name is None:
        raise ValueError("must be NAME=value, export NAME=value, or a comment that starts with #")
    value, end = _value(name[1], text, name.end())
    if "\0" in value:
        raise ValueError(f"the value of {name[1]} contains a NUL character")
    rest = _LINE_END.match(text, end)
    if rest is None:
        raise ValueError(f"there is text after the closing quote of {name[1]}")
    return name[1], value, rest.end()


def _value(name: str, text: str, start: int) -> tuple[str, int]:
    """The value that begins at ``start``, and where it ends."""
    quote = text[start : start + 1]
    if quote == "'" or quote == '"':
        quoted = (_SINGLE if quote == "'" else _DOUBLE).match(text, start)
        if quoted is None:
            raise ValueError(f"the value of {name} has no closing {quote}")
        plain = quoted[1] if quote == "'" else _ESCAPE.sub(lambda escape: _unescaped(escape[1]), quoted[1])
        return plain, quoted.end()
    bare = _BARE.match(text, start)
    assert bare is not None
    return re.split(r"(?:^|[ \t])#", bare[0], maxsplit=1)[0].strip(), bare.end()


def _unescaped(character: str) -> str:
    return _ESCAPED.get(character, character if character in "\"'$`\\" else f"\\{character}")


def add_to(environ: MutableMapping[str, str], paths: tuple[Path, ...]) -> dict[str, str]:
    """Add the variables of files to ``environ``; a later file overrides an earlier one.

    Returns where each variable stands that was added, as ``FILE, line N``, by its name.

    Raises:
        WrongEnvFile: As for `read_env_file`. Nothing was added then.
    """
    found = {
        name: (value, f"{path}, line {line}") for path in paths for name, (value, line) in read_env_file(path).items()
    }
    added = {name: given for name, given in found.items() if name not in environ}
    environ.update({name: value for name, (value, _) in added.items()})
    return {name: place for name, (_, place) in added.items()}


def env_file_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--env-file``. Its variables are in the environment before other options look there.

    The command gets, as ``env_files``, where each variable stands that was added, by its name.
    """

    def add(ctx: click.Context, param: click.Parameter, paths: tuple[Path, ...]) -> Mapping[str, str]:
        try:
            return add_to(os.environ, paths)
        except WrongEnvFile as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return click.option(
        "--env-file",
        "env_files",
        type=click.Path(path_type=Path),
        metavar="FILE",
        multiple=True,
        is_eager=True,
        callback=add,
        help="Add the environment variables in a file of lines NAME=value. Those that are set already stay.",
    )(command)
