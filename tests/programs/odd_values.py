"""Gives one value to every option and argument of every command that takes a number, a duration or a time.

``python -m tests.programs.odd_values VALUE`` prints a line of JSON for each: the command line, the exit code, what the
command has printed, and the exception that has left it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner
from natsrt_cli import natsrt

_OTHERS = ("text", "boolean", "choice", "path", "directory", "filename", "TYPE", "PREFIX")
"""The kinds of values that are none of these, as click names their types."""
_ACCEPTED = {
    "-1": ("--port", "--http-port", "--health-port"),  # a free port
    "99999999999999999999": ("--speed", "ID", "[ID]..."),  # at once; an id that no dead letter has
}
"""What can have a value, which would be done."""
_GIVEN = {
    "agent": "writer/ada",
    "agents": "writer/ada",
    "agent_type": "writer",
    "task_ids": "writer/ada/one",
    "task_id": "writer/ada/one",
    "target": "collections:Counter",
    "file": "states",
    "sequence": "1",
    "sequences": "1",
    "since": "1h",
}
"""What required parameters get, by name; the others get a text."""
_NEEDED = ("sequences", "since")
"""Parameters that some commands need, although they are not required."""


def commands(command: click.Command, path: list[str]) -> Iterator[tuple[list[str], click.Command]]:
    """The command if it is none of a group, or those of the group, each with its words."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from commands(found, [*path, name])


def wants_number(parameter: click.Parameter) -> bool:
    return "--timeout" in parameter.opts or parameter.type.name not in _OTHERS


def name_of(parameter: click.Parameter) -> str:
    return parameter.opts[0] if isinstance(parameter, click.Option) else str(parameter.metavar)


def lines(value: str) -> Iterator[list[str]]:
    """The command lines."""
    for path, command in commands(natsrt, []):
        for parameter in command.params:
            hidden = isinstance(parameter, click.Option) and parameter.hidden
            if hidden or not wants_number(parameter) or name_of(parameter) in _ACCEPTED.get(value, ()):
                continue
            options: list[str] = []
            arguments: list[str] = []
            for other in command.params:
                name = other.name or ""
                if other is not parameter and not other.required and name not in _NEEDED:
                    continue
                given = value if other is parameter else _GIVEN.get(name, "x")
                if isinstance(other, click.Option):
                    options += [other.opts[0], given]
                else:
                    arguments.append(given)
            yield [*path, *options, "--", *arguments]


def main(value: str) -> None:
    runner = CliRunner(env={"NATS_URL": "nats://127.0.0.1:1"})
    with runner.isolated_filesystem():
        Path("states").write_text('{"type": "writer", "key": "ada", "state": {}}')
        results = [(line, runner.invoke(natsrt, line)) for line in lines(value)]
    for line, result in results:
        raised = None if isinstance(result.exception, SystemExit | None) else repr(result.exception)
        click.echo(json.dumps({"line": line, "code": result.exit_code, "printed": result.output, "raised": raised}))


if __name__ == "__main__":
    main(sys.argv[1])
