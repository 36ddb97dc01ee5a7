"""Reads what a team says as soon as it says it, so that its end is known although its reader is slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final

_END: Final = object()


class Ahead:
    """The items of a generator, read ahead of their reader without a limit: AutoGen's teams keep them so too."""

    def __init__(self, items: AsyncGenerator[Any, None]) -> None:
        self._source = items
        self.ended: asyncio.Event = asyncio.Event()
        """Set when the generator has ended, or failed."""

    async def items(self) -> AsyncGenerator[Any, None]:
        """The items, once. Raises what the generator raises, after what it gave before."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        reading = asyncio.create_task(self._read(queue))
        try:
            while (item := await queue.get()) is not _END:
                yield item
            await reading
        finally:
            reading.cancel()
            await asyncio.wait({reading})
            if not reading.cancelled():
                reading.exception()  # it was raised above, or nobody wants it

    async def _read(self, queue: asyncio.Queue[Any]) -> None:
        try:
            async for item in self._source:
                queue.put_nowait(item)
        finally:
            try:
                await self._source.aclose()
            finally:
                self.ended.set()
                queue.put_nowait(_END)
