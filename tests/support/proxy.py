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
        self._port = 0  # any, until one is chosen
        self._frozen: list[asyncio.Event] = []
        self._muted: set[asyncio.StreamReader] = set()
        self._servers: set[asyncio.StreamReader] = set()
        self._flowing = self._new_flow()
        self.accepted = 0
        """Connections that were passed on."""

    @staticmethod
    def _new_flow() -> asyncio.Event:
        flow = asyncio.Event()
        flow.set()
        return flow

    async def __aenter__(self) -> Proxy:
        await self.restore()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Break all links, and refuse new ones until `restore`."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for writer in self._links:
            writer.transport.abort()

    async def restore(self) -> None:
        """Let new links through."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._listener.sockets[0].getsockname()[1]

    def freeze(self) -> None:
        """Pass nothing on over the present links, in either direction; they stay open. New links work."""
        self._flowing.clear()
        self._frozen.append(self._flowing)
        self._flowing = self._new_flow()

    def thaw(self) -> None:
        """Pass everything on again, what came meanwhile too."""
        for flow in self._frozen:
            flow.set()
        self._frozen.clear()

    def mute(self) -> None:
        """Throw away what the server sends over the present links; what clients send arrives."""
        self._muted |= self._servers

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self.accepted += 1
        self._servers.add(server_reader)
        for source, destination in ((reader, server_writer), (server_reader, writer)):
            self._links.add(destination)
            task = asyncio.create_task(self._forward(source, destination, self._flowing))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(
        self, source: asyncio.StreamReader, destination: asyncio.StreamWriter, flowing: asyncio.Event
    ) -> None:
        try:
            while data := await source.read(65536):
                await flowing.wait()
                if source in self._muted:
                    continue
                destination.write(data)
                await destination.drain()
        except OSError:
            pass
        finally:
            destination.close()
            self._links.discard(destination)
            self._servers.discard(source)
            self._muted.discard(source)
