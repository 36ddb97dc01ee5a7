"""The command line of explorers, which try random schedules, such as ``python -m tests.support.call_schedules``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NoReturn

import click


def explores(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of an explorer to a function. It gets them as ``seconds``, ``seed`` and ``schedules``, which are
    for `explore`."""
    for option in reversed(
        (
            click.option("--seconds", default=60.0, show_default=True, help="How long to try."),
            click.option("--seed", default=0, show_default=True, help="The first seed."),
            click.option("--schedules", type=int, help="How many to try at most; 1 replays a seed."),
        )
    ):
        command = option(command)
    return command


def explore(
    try_one: Callable[[int], None], *, seconds: float, seed: int, schedules: int | None, replay: str = ""
) -> NoReturn:
    """Try the schedules from ``seed`` on, and print those in which ``try_one`` raises AssertionError.

    Ends the process, with the exit code 1 if there are any. ``schedules``: how many at most; None: until the time is
    over. ``replay`` is the module that replays one; empty: nothing is said of it.
    """
    until, first, wrong = time.monotonic() + seconds, seed, 0
    while time.monotonic() < until and (schedules is None or seed - first < schedules):
        try:
            try_one(seed)
        except AssertionError as error:
            wrong += 1
            click.echo(f"seed {seed}: {error}")
        seed += 1
    click.echo(f"{seed - first} schedules, {wrong} of them wrong")
    if wrong and replay:
        click.echo(f"replay one with: python -m {replay} --schedules 1 --seed SEED")
    raise SystemExit(1 if wrong else 0)
