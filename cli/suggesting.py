"""Groups of commands that say which command was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import click

_CLOSE = 0.6
"""How alike two names are, from 0 to 1, if one may be meant by the other."""


class Commands(click.Group):
    """A group of commands. The error for an unknown command names the most similar ones, or the group that has it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = f"options stand after the command: {ctx.command_path} COMMAND {error.option_name} …"
            raise click.UsageError(f"{error.message.rstrip('.')}; {hint}", ctx) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(f"No such command {args[0]!r}.{self._hint(ctx, args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def _hint(self, ctx: click.Context, name: str) -> str:
        paths = dict(_paths(self, ctx, ctx.command_path))
        own = difflib.get_close_matches(name.lower(), self.list_commands(ctx), 3, _CLOSE)
        near = [f"{ctx.command_path} {other}" for other in own]
        near = near or [path for path, last in paths.items() if last == name.lower()]
        return f" Did you mean {' or '.join(repr(path) for path in near)}?" if near else ""


def _paths(group: click.Group, ctx: click.Context, path: str) -> Iterator[tuple[str, str]]:
    """All commands below ``group``: how each is written, and its last word."""
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        yield f"{path} {name}", name
        if isinstance(command, click.Group):
            yield from _paths(command, ctx, f"{path} {name}")
