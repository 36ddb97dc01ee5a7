"""The command line of natsrt: one module per command group."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import NoReturn

import click

from natsrt.version import VERSION

from .exits import MEANINGS, Exit
from .output import note, open_closed_streams, written_to_the_end
from .suggesting import Commands

__all__ = ["main"]

_EXIT_CODES = "\n".join(f"{code:>3}  {code.name.lower()}: {meaning}" for code, meaning in MEANINGS.items())

_MODULES: Mapping[str, str] = {
    "agents": "agents",
    "auth": "auth",
    "demo": "demo",
    "dlq": "dlq",
    "doctor": "doctor",
    "publish": "messages",
    "record": "recorder",
    "reminders": "reminders",
    "replay": "replay",
    "send": "messages",
    "server": "server",
    "state": "state",
    "submit": "submit",
    "tail": "tail",
    "tasks": "tasks",
    "topics": "topics",
    "worker": "worker",
}
"""Every command, and the module that defines it under the same name."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of writing to a disk that is full or broken."""


class _Commands(Commands):
    """Imports the module of a command only when that command is used, so that each one starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        command: click.Command = getattr(import_module(f".{_MODULES[cmd_name]}", __name__), cmd_name)
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog=f"\b\nExit codes:\n{_EXIT_CODES}",
)
@click.version_option(VERSION, prog_name="natsrt")
def natsrt() -> None:
    """AutoGen agents across processes and machines, with NATS in between.

    Every command that connects takes the connection options, the NATS_* variables of the nats CLI, NATSRT_<SETTING> for
    every setting, and settings files.
    """


def main() -> NoReturn:
    """The entry point of the command ``natsrt``."""
    open_closed_streams()
    try:
        code = natsrt.main(prog_name="natsrt", standalone_mode=False) or Exit.OK
    except click.ClickException as error:
        error.show(text := io.StringIO())
        note(text.getvalue().rstrip(), "error")
        code = error.exit_code
    except click.Abort:
        code = Exit.INTERRUPTED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        written_to_the_end()
        note(f"natsrt: the output cannot be written: {error.strerror}", "error")
        code = Exit.FAILED
    if not written_to_the_end() and code == Exit.OK:
        code = Exit.FAILED
    sys.exit(code)
