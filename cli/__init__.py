"""The command line of natsrt: one module per command group."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from natsrt.version import VERSION

from .agents import agents
from .demo import demo
from .doctor import doctor
from .exits import MEANINGS, Exit
from .messages import publish, send, tail
from .server import server
from .worker import worker

__all__ = ["main"]

_EXIT_CODES = "\n".join(f"{code:>3}  {code.name.lower()}: {meaning}" for code, meaning in MEANINGS.items())


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog=f"\b\nExit codes:\n{_EXIT_CODES}",
)
@click.version_option(VERSION, prog_name="natsrt")
def natsrt() -> None:
    """AutoGen agents across processes and machines, with NATS in between.

    Connection options, the NATS_* variables of the nats CLI, NATSRT_<SETTING> for every other setting, and settings
    files work with every command that connects.
    """


for _command in (worker, server, agents, send, publish, tail, doctor, demo):
    natsrt.add_command(_command)


def main() -> NoReturn:
    """The entry point of the command ``natsrt``."""
    try:
        code = natsrt.main(prog_name="natsrt", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = Exit.INTERRUPTED
    sys.exit(code or Exit.OK)
