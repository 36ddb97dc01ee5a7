"""A TCP proxy between a client and its server, whose links can be cut and frozen."""

from __future__ import annotations

import asyncio
from types import TracebackType
from urllib.parse import urlsplit


class Proxy:
    """Forwards connections on a free port to ``url``. Use it with ``async with``."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        assert target.hostname is not None and target.port is not None
        self._target = (target.hostname, target.port)
        self._listener: asyncio.Server | None = None
        self._links: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = True
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.accepted = 0
        """Connections that were passed on."""

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._listener is not None
        self._listener.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """Where clients connect."""
        assert self._listener is not None
        return "nats://{}:{}".format(*self._listener.sockets[0].getsockname()[:2])

    def cut(self) -> None:
        """Break all links, and refuse new ones until `restore`."""
        self._open = False
        for writer in self._links:
            writer.transport.abort()

    def restore(self) -> None:
        """Let new links through again."""
        self._open = True

    def freeze(self) -> None:
        """Pass nothing on, in either direction; the links stay open."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Pass everything on again, what came meanwhile too."""
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self.accepted += 1
        for source, destination in ((reader, server_writer), (server_reader, writer)):
            self._links.add(destination)
            task = asyncio.create_task(self._forward(source, destination))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, source: asyncio.StreamReader, destination: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._flowing.wait()
                destination.write(data)
                await destination.drain()
        except OSError:
            pass
        finally:
            destination.close()
            self._links.discard(destination)
