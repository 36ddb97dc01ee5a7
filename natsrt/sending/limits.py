"""How long a caller waits for the result of a call."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import Any, NamedTuple

from autogen_core import AgentId

from natsrt.errors import CallTimeout


class Limit(NamedTuple):
    """For how long a caller waits, in seconds, and the name of what says so. None: without a limit."""

    seconds: float | None
    name: str

    @classmethod
    def of_argument(cls, timeout: float) -> Limit:
        """The limit of the argument ``timeout``, which may be infinite. Raises ValueError."""
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds above 0, or math.inf for no limit, not {timeout!r}")
        return cls(None if timeout == math.inf else timeout, "timeout")

    def deadline(self) -> float | None:
        """When a caller that begins now stops waiting, by the event loop's clock. None: never."""
        return None if self.seconds is None else asyncio.get_running_loop().time() + self.seconds

    def within(self, recipient: AgentId, sending: Awaitable[Any]) -> Awaitable[Any]:
        """``sending``, which raises `CallTimeout` when the limit has passed."""
        return sending if self.seconds is None else self._limited(self.seconds, recipient, sending)

    async def _limited(self, seconds: float, recipient: AgentId, sending: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(seconds) as deadline:
                return await sending
        except TimeoutError:
            if not deadline.expired():
                raise
            raise CallTimeout(str(recipient), seconds, self.name) from None
