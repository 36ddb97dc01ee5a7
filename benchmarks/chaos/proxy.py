"""A TCP proxy between a client and its server, whose links can be slow, cut and frozen."""

from __future__ import annotations

import asyncio
import socket
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
        self._place = socket.socket()
        """Keeps the port while nothing listens there."""
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._place.bind(("127.0.0.1", 0))
        self._port = self._place.getsockname()[1]
        self._frozen: list[asyncio.Event] = []
        self._muted: set[asyncio.StreamReader] = set()
        self._servers: set[asyncio.StreamReader] = set()
        self._flowing = self._new_flow()
        self.accepted = 0
        """Connections that were passed on."""
        self.delay = 0.0
        """Seconds that everything takes, each way."""
        self._held_until = 0.0
        """Nothing is passed on before that time of the event loop."""

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
        self._place.close()
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
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self._port, reuse_port=True)

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

    def spike(self, seconds: float) -> None:
        """Pass nothing on for some time, in either direction; then everything, in order."""
        self._held_until = asyncio.get_running_loop().time() + seconds

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
        travelling: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        reading = asyncio.create_task(self._read(source, travelling))
        loop = asyncio.get_running_loop()
        try:
            while True:
                at, data = await travelling.get()
                while (wait := max(at, self._held_until) - loop.time()) > 0:  # noqa: ASYNC110
                    await asyncio.sleep(wait)
                if not data:
                    break
                await flowing.wait()
                if source in self._muted:
                    continue
                destination.write(data)
                await destination.drain()
        except OSError:
            pass
        finally:
            reading.cancel()
            destination.close()
            self._links.discard(destination)
            self._servers.discard(source)
            self._muted.discard(source)

    async def _read(self, source: asyncio.StreamReader, travelling: asyncio.Queue[tuple[float, bytes]]) -> None:
        """Put what arrives into ``travelling``, with the time at which it is due at the other end; nothing at the
        end."""
        data = b"any"
        while data:
            try:
                data = await source.read(65536)
            except OSError:
                data = b""
            travelling.put_nowait((asyncio.get_running_loop().time() + self.delay, data))
