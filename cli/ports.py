"""Ports on the command line."""

from __future__ import annotations

from typing import Any

import click

FREE = -1
"""Stands for a free port that is chosen at the start."""


class _Port(click.IntRange):
    """A TCP port from 1 to 65535. 0 and -1 stand for a free one, and are converted to `FREE`."""

    name = "port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            port = int(value)
        except ValueError:
            port = FREE - 1
        if not FREE <= port <= 65535:
            self.fail(f"{value!r} is not a port: give a number from 1 to 65535, or -1 for a free port", param, ctx)
        return port or FREE


PORT = _Port(FREE, 65535)
