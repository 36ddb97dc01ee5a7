"""The task that the present code handles, and how far it says it is: `natsrt.progress`."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

tells_progress: ContextVar[Callable[[float | None, str | None], None] | None] = ContextVar(
    "natsrt_progress", default=None
)
"""Tells how far the present task is; None if there is none."""


def progress(fraction: float | None = None, text: str | None = None) -> bool:
    """Say how far the task is that the present handler handles, for `Ticket.status` and for those that iterate over its
    ticket. Also in tasks of asyncio that the handler started.

    Args:
        fraction: How much is done, from 0 to 1. None: not known.
        text: What is being done. Only its first 500 characters are told. None: nothing is said of that.

    Returns:
        False if no task is being handled: the same handler may handle ordinary calls too.

    Raises:
        ValueError: ``fraction`` is not a number from 0 to 1.
        TypeError: ``text`` is not a text.
    """
    if fraction is not None and (
        isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1
    ):
        raise ValueError(f"fraction must be a number from 0 to 1, not {fraction!r:.60}")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"text must be a text, not {type(text).__name__}")
    tell = tells_progress.get()
    if tell is None:
        return False
    tell(None if fraction is None else float(fraction), text)
    return True
