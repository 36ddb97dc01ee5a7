"""Leaves what an agent or team says, in the middle of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from autogen_core import CancellationToken

logger: logging.Logger = logging.getLogger("natsrt.agentchat")


@asynccontextmanager
async def left(items: AsyncGenerator[Any, None], token: CancellationToken) -> AsyncIterator[None]:
    """Close ``items`` at the end of the block, after cancelling the token if the block is left in the middle."""
    try:
        yield
    except BaseException:
        token.cancel()
        try:
            await items.aclose()
        except asyncio.CancelledError:  # of what the token has cancelled, unless this task is cancelled too
            if is_cancelled():
                raise
        except Exception as error:
            logger.debug("closing what was left raised %s", type(error).__name__)
        raise
    await items.aclose()


def is_cancelled() -> bool:
    """Whether somebody has cancelled this task."""
    return (task := asyncio.current_task()) is not None and task.cancelling() > 0
