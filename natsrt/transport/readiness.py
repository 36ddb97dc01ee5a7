"""Tells whether messages may be sent: the start of the runtime has succeeded, and it is connected."""

from __future__ import annotations

import asyncio

from natsrt.options import Options
from natsrt.transport.connection import Connection


class Readiness:
    """The outcome of one start of a runtime. Sends wait for it."""

    def __init__(self, connection: Connection, options: Options) -> None:
        self._connection = connection
        self._offline_timeout = options.offline_timeout
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started: bool = False
        """True if the start has succeeded, and the parts have not been stopped since."""

    @property
    def is_ready(self) -> bool:
        """True if a message can be sent without waiting."""
        return self.started and self._connection.connected

    def succeed(self) -> None:
        """Record that the start has succeeded, and end every wait for it."""
        self.started = True
        self._outcome.set_result(None)

    def fail(self, error: Exception) -> None:
        """Record that the start has failed: every wait for it raises ``error``."""
        self._outcome.set_exception(error)
        self._outcome.exception()  # so that asyncio does not log it if nothing waits for it

    async def wait_started(self) -> None:
        """Wait until the start has succeeded. Raises the error of a failed start."""
        if not self.started:
            await asyncio.shield(self._outcome)

    async def wait(self, begun: float) -> None:
        """Wait until the runtime has started and is connected.

        ``begun`` is when the send began, in seconds by the event loop's clock. Raises the error of a failed start, and
        `ServerUnreachable` ``offline_timeout`` seconds after ``begun``. So the time that the message spent in a queue
        counts too.
        """
        await asyncio.shield(self._outcome)
        await self._connection.wait_connected(self._offline_timeout, begun)
