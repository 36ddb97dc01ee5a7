"""Calling agents so that what they raise ends what they do, and not the worker."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def contained(work: Awaitable[T]) -> T:
    """Await ``work``, which is an agent's code, and return its result.

    An event loop ends if a task raises SystemExit or KeyboardInterrupt. Here they become a RuntimeError. Other
    exceptions, and cancellations, are raised as they are.
    """
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"an agent raised {type(error).__name__}") from error
