"""``natsrt agents ls --watch``: a list that is shown again each time that it changes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from natsrt.background import end_tasks
from natsrt.errors import NatsrtError
from natsrt.jetstream.registry.registry import RegistryListener
from natsrt.runtime import NatsAgentRuntime

from .connecting import Connecting
from .exits import Exit, exit_code
from .output import note

_SETTLE_SECONDS = 0.2
"""Seconds from a change until the list is read: a worker that starts makes many changes at once."""
_LOOK_SECONDS = 3.0
"""Seconds between two looks at what no change in the registry announces: the records of keyed agents, or a list that
could not be read."""

Rows = list[dict[str, Any]]


class _Changes(RegistryListener):
    """Remembers that the registry has changed."""

    def __init__(self) -> None:
        self.seen = asyncio.Event()

    def view_changed(self) -> None:
        self.seen.set()


async def watch_rows(
    connecting: Connecting,
    read: Callable[[NatsAgentRuntime], Awaitable[Rows]],
    show: Callable[[Rows, bool], None],
) -> None:
    """Show what ``read`` returns, and again each time that it differs, until SIGINT or SIGTERM.

    ``show`` gets True with the first rows. While the server cannot be reached, the last list stays, and a note says so.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    watching, stopped = asyncio.create_task(_watch(connecting, read, show)), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({watching, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
    finally:
        await end_tasks(watching, stopped)


async def _watch(
    connecting: Connecting,
    read: Callable[[NatsAgentRuntime], Awaitable[Rows]],
    show: Callable[[Rows, bool], None],
) -> None:
    changes = _Changes()
    shown: Rows | None = None
    noted = ""
    async with connecting.runtime() as runtime:
        runtime.running.registry.add_listener(changes)
        while True:
            changes.seen.clear()
            try:
                rows = await read(runtime)
            except NatsrtError as error:
                if exit_code(error) is not Exit.NOT_CONNECTED:
                    raise
                looks = True
                if str(error) != noted:
                    noted = str(error)
                    note(f"natsrt: {noted}; the list is shown again when it can be read", "warning")
            else:
                noted = ""
                looks = any(row.get("records") is not None or row.get("kind") == "keyed" for row in rows)
                if rows != shown:
                    show(rows, shown is None)
                    shown = rows
            await _either(changes.seen, _LOOK_SECONDS if looks else None)
            await asyncio.sleep(_SETTLE_SECONDS)


async def _either(event: asyncio.Event, seconds: float | None) -> None:
    """Wait until ``event`` is set, for ``seconds`` at most; None: without a limit."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
