"""Ports on the command line."""

from __future__ import annotations

from typing import Any

import click

_FREE = -1
"""Stands for a free port that is chosen at the start."""


class _Port(click.IntRange):
    """A TCP port from 1 to 65535, or -1 for a free one."""

    name = "port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            port = int(value)
        except ValueError:
            port = 0
        if port != _FREE and not 1 <= port <= 65535:
            self.fail(f"{value!r} is not a port: give a number from 1 to 65535, or -1 for a free port", param, ctx)
        return port


PORT = _Port(_FREE, 65535)
