"""``natsrt doctor``: checks an installation and suggests what to do.

It changes nothing and disturbs no agent. A message that is published to test a permission is not delivered
(``Nats-Trace-Only``), or the stream refuses it (an impossible expected sequence).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict

import click

from natsrt.errors import NatsrtError, PermissionDenied
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects

from .auth import read
from .check_connection import (
    check_clock,
    check_connection,
    check_payload,
    check_permissions,
    check_role,
    check_server_settings,
    check_versions,
)
from .check_jetstream import check_jetstream
from .check_registry import check_registry
from .connecting import Connecting, connects
from .declaration import ROLES, of_role
from .exits import CommandFailed, Exit, answered
from .health import judge
from .output import as_json as print_json
from .output import json_option, line, table
from .patient import Finding, Patient
from .role_check import RoleCheck

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}


@click.command()
@click.option(
    "--monitor-url", metavar="URL", help="URL of the server's monitoring pages, such as http://127.0.0.1:8222."
)
@click.option(
    "--health-url",
    "health_urls",
    metavar="URL",
    multiple=True,
    help="URL of a worker's --health-port, such as http://127.0.0.1:8080. May be given several times.",
)
@click.option(
    "--as", "role", metavar="ROLE|USER", help="Check the permissions of a role, or of a user of the --declaration."
)
@click.option("--declaration", metavar="FILE", help="Declaration of the users, as for natsrt auth.")
@json_option
@connects("error")
def doctor(
    connecting: Connecting,
    monitor_url: str | None,
    health_urls: tuple[str, ...],
    role: str | None,
    declaration: str | None,
    as_json: bool,
) -> int:
    """Check the installation and suggest fixes.

    Checks the connection, versions, JetStream, permissions, the clock, the registry, keyed agents, server settings, and
    the health that workers report.

    With --as, it checks instead of the permissions of every program that this user has all permissions of a role, and
    none that would make it more: worker, caller, publisher, client, operator or tool.

    Exits with 7 if there is a problem, and with 0 if there are only warnings.
    """
    for name in ("natsrt.connection", "natsrt.agents"):  # the findings have their warnings
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = connecting.options()
    check = None if role is None else _role_check(role, declaration, options)
    findings = asyncio.run(examine(options, monitor_url, health_urls, check))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        rows = [(f.check, f.level, f.text + (f"\n→ {f.advice}" if f.advice else "")) for f in findings]
        table(("CHECK", "RESULT", "FINDING"), rows, _STYLES)
        problems = sum(finding.level == "problem" for finding in findings)
        line("\nno problems" if not problems else f"\n{problems} problem{'s' if problems > 1 else ''}")
    return Exit.PROBLEMS if any(finding.level == "problem" for finding in findings) else Exit.OK


def _role_check(role: str, file: str | None, options: Options) -> RoleCheck:
    """Raises `CommandFailed` if there is no such role or user."""
    if file is None:
        if role not in ROLES:
            raise CommandFailed(f"--as: there is no role {role!r}, but {', '.join(ROLES)}", Exit.USAGE)
        declaration = of_role(role, options.namespace, options.inbox_prefix)
    else:
        declaration = read(file)
        if role not in declaration.users:
            users = ", ".join(declaration.users)
            raise CommandFailed(f"--as: {file} declares no user {role!r}, but {users}", Exit.USAGE)
    return RoleCheck(declaration, declaration.users[role])


async def examine(
    options: Options, monitor_url: str | None, health_urls: Sequence[str], role: RoleCheck | None = None
) -> list[Finding]:
    """Run all checks. After a failed check, those that depend on it are skipped. ``role`` None: that of any program."""
    connection = Connection(options, client_name="natsrt doctor")
    patient = Patient(connection, options, Subjects(options.namespace), role)
    connection.on_denied(patient.deny)
    for url in health_urls:  # they need no server
        for level, text, advice in await asyncio.to_thread(judge, url):
            patient.found("health", level, text, advice)
    try:
        await connection.open()
    except PermissionDenied as error:
        patient.found(
            "connection", "problem", answered(error), "check --creds, --user and --password, --token or --nkey"
        )
        return patient.findings
    except NatsrtError as error:
        patient.found("connection", "problem", answered(error))
        return patient.findings
    try:
        await check_connection(patient)
        check_versions(patient)
        check_payload(patient)
        await check_clock(patient)
        if role is None:
            await check_permissions(patient)
        if await check_jetstream(patient):
            await check_registry(patient)
        if role is not None:
            await check_role(patient, role)
        await check_server_settings(patient, monitor_url)
        if (said := connection.server_error) is not None and not said.lower().startswith("permissions violation"):
            patient.found("server", "problem", f"it says {said!r}", "see the limits in docs/operations.md")
    finally:
        await connection.close()
    return patient.findings
