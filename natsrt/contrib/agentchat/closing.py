"""Closes agents that may not want to close."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from autogen_agentchat.base import ChatAgent

logger: logging.Logger = logging.getLogger("natsrt.agentchat")

CLOSE_WITHIN: Final = 5.0
"""Seconds that an agent has to close. It is left alone then, so that its session and the worker go on."""


async def close_agent(agent: ChatAgent, called: str) -> None:
    """Close an agent within `CLOSE_WITHIN`. What goes wrong is a warning in the log, which names it as ``called``."""
    closing = asyncio.ensure_future(agent.close())
    try:
        done, _ = await asyncio.wait({closing}, timeout=CLOSE_WITHIN)
    finally:
        closing.cancel()
    if not done:
        logger.warning("%s did not close within %g s", called, CLOSE_WITHIN)
    elif not closing.cancelled() and (error := closing.exception()) is not None:
        logger.warning("%s could not be closed: %s", called, type(error).__name__)
