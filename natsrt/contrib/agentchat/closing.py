"""Agents and teams with what closes them. They may not want to close."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from autogen_agentchat.base import ChatAgent, Team

logger: logging.Logger = logging.getLogger("natsrt.agentchat")

CLOSE_WITHIN: Final = 5.0
"""Seconds that an agent has to close. It is left alone then, so that its session and the worker go on."""

Hosted = TypeVar("Hosted", bound="ChatAgent | Team", covariant=True)


@dataclass(frozen=True, slots=True)
class Live(Generic[Hosted]):
    """A live agent or team."""

    one: Hosted
    end: Callable[[], Awaitable[None]] | None
    """Closes it; None: it is a team without an end of its own."""

    async def close(self, called: str) -> None:
        """Close it within `CLOSE_WITHIN`. What goes wrong is a warning in the log, which names it as ``called``."""
        if self.end is None:
            return
        closing = asyncio.ensure_future(self.end())
        try:
            done, _ = await asyncio.wait({closing}, timeout=CLOSE_WITHIN)
        finally:
            closing.cancel()
        if not done:
            logger.warning("%s did not close within %g s", called, CLOSE_WITHIN)
        elif not closing.cancelled() and (error := closing.exception()) is not None:
            logger.warning("%s could not be closed: %s", called, type(error).__name__)


async def entered(manager: AbstractAsyncContextManager[Any]) -> tuple[Any, Callable[[], Awaitable[None]]]:
    """Enter a context manager. Returns what it gives, and what leaves it again.

    It is entered and left in one task, because some can only be left where they were entered. Raises what it raises.
    """
    given: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    left = asyncio.Event()

    async def hold() -> None:
        async with manager as one:
            given.set_result(one)
            await left.wait()

    holding = asyncio.create_task(hold())
    try:
        await asyncio.wait({holding, given}, return_when=asyncio.FIRST_COMPLETED)
    except BaseException:
        holding.cancel()
        raise
    if not given.done():
        await holding

    async def leave() -> None:
        left.set()
        await holding

    return given.result(), leave
