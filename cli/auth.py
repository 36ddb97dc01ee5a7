"""``natsrt auth``: the least permissions of the users of a system."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from natsrt.errors import ConfigurationError

from .connecting import basics
from .declaration import EXAMPLE, Declaration, parse
from .exits import Exit
from .output import as_json as print_json
from .output import json_option, line, table
from .permission_texts import conf, nsc
from .permissions import grants
from .recording import record
from .suggesting import Commands


@click.group(cls=Commands)
def auth() -> None:
    """Make the least permissions of each user from a declaration of what the users do.

    A declaration is a TOML file: `natsrt auth example` prints one, docs/permissions.md explains it.
    """


auth.add_command(record)


def _declares(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument FILE and the option --namespace. The command gets a `Declaration` as its first argument."""

    @functools.wraps(command)
    def run(file: str | None, namespace: str | None, log_level: str, log_format: str, **parameters: Any) -> Any:
        return command(read(file, namespace), **parameters)

    decorated = basics()(run)
    decorated = click.option("--namespace", metavar="NAME", help="natsrt namespace, in place of the declared one.")(
        decorated
    )
    return click.argument("file", metavar="[FILE]", required=False)(decorated)


def read(file: str | None, namespace: str | None = None) -> Declaration:
    """The declaration in a file; None: that of ``natsrt auth example``. ``namespace`` replaces the declared one.

    Raises ConfigurationError.
    """
    if file is None:
        return parse(EXAMPLE, "the example", namespace)
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(file, f"it cannot be read: {reason}") from None
    return parse(text, file, namespace)


@auth.command("example")
@basics()
def example(log_level: str, log_format: str) -> int:
    """Print a declaration to start from: that of the four users in docs/permissions.md."""
    line(EXAMPLE.rstrip())
    return Exit.OK


@auth.command("conf")
@_declares
def conf_(declaration: Declaration) -> int:
    """Print the block `authorization` of a nats-server's configuration file, or `accounts` where the buckets have one.

    Without FILE, that of the example. Passwords come from the server's environment: WORKER_PASSWORD for the user
    `worker`.
    """
    line(conf(declaration).rstrip())
    return Exit.OK


@auth.command("nsc")
@click.option("--account", metavar="NAME", help="Account of the users; nsc's current one if it is not given.")
@_declares
def nsc_(declaration: Declaration, account: str | None) -> int:
    """Print the commands of nsc that add the users, with the permissions as claims in their JWTs."""
    line(nsc(declaration, account).rstrip())
    return Exit.OK


@auth.command("table")
@json_option
@_declares
def table_(declaration: Declaration, as_json: bool) -> int:
    """List every permission, and what it is for."""
    found = [(user.name, grant) for user in declaration.users.values() for grant in grants(declaration, user)]
    if as_json:
        print_json([{"user": name, **asdict(grant)} for name, grant in found])
    else:
        table(("USER", "MAY", "SUBJECT", "FOR"), [(name, g.operation, g.subject, g.why) for name, g in found])
    return Exit.OK
