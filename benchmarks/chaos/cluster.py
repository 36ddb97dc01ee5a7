"""A cluster of several nats-servers, for chaos scenarios and tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import socket
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from natsrt.embedded import EmbeddedServer
from natsrt.errors import EmbeddedServerError

_POLL_SECONDS = 0.05
_ASK_SECONDS = 2.0
_PORTS = range(15_000, 30_000)
"""Below the ports of outgoing connections: such a connection could take the port of a killed server."""


class Cluster:
    """A cluster of servers with JetStream on 127.0.0.1. Use it with ``async with``. Servers are numbered from 0.

    Args:
        size: Number of servers.
        ready_timeout: Seconds within which the servers must connect to each other and elect JetStream's leader.
        advertise: Whether the servers tell clients about each other. Without, clients connect to the given URLs only.
    """

    def __init__(self, size: int = 3, *, ready_timeout: float = 30.0, advertise: bool = True) -> None:
        self._ready_timeout = ready_timeout
        self._directory = tempfile.TemporaryDirectory(prefix="natsrt-cluster-", ignore_cleanup_errors=True)
        name = f"natsrt-{secrets.token_hex(4)}"
        ports = _free_ports(2 * size)
        routes = [f"nats://127.0.0.1:{port}" for port in ports[size:]]
        quiet = [] if advertise else ["--no_advertise"]
        self.servers = [
            EmbeddedServer(
                name=f"{name}-{number}",
                port=ports[number],
                data_dir=Path(self._directory.name) / str(number),
                http_port=-1,
                extra_args=["--cluster_name", name, "--cluster", route, "--routes", ",".join(routes), *quiet],
            )
            for number, route in enumerate(routes)
        ]
        self._frozen: set[int] = set()

    async def __aenter__(self) -> Cluster:
        try:
            await asyncio.gather(*(server.start() for server in self.servers))
            await self.until_healthy()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self.servers))
        self._directory.cleanup()

    @property
    def urls(self) -> list[str]:
        """The URL of each server, for clients."""
        return [server.url for server in self.servers]

    async def kill(self, number: int) -> None:
        """Kill a server with SIGKILL."""
        await self.servers[number].kill()

    async def start(self, number: int) -> None:
        """Restart a killed server on its previous port with its previous data. It becomes healthy some time later."""
        await self.servers[number].start()

    def freeze(self, number: int) -> None:
        """Freeze a server with SIGSTOP."""
        self.servers[number].pause()
        self._frozen.add(number)

    def resume(self, number: int) -> None:
        """Resume a frozen server with SIGCONT."""
        self.servers[number].resume()
        self._frozen.discard(number)

    @property
    def answering(self) -> list[int]:
        """The numbers of the servers that are neither killed nor frozen."""
        return [n for n, server in enumerate(self.servers) if server.pid is not None and n not in self._frozen]

    async def until_healthy(self) -> None:
        """Return when every answering server reports that its JetStream works.

        Raises:
            EmbeddedServerError: A server did not within ``ready_timeout``.
        """
        deadline = time.monotonic() + self._ready_timeout
        for number in self.answering:
            while (health := await self._page(number, "healthz")).get("status") != "ok":
                if time.monotonic() > deadline:
                    raise EmbeddedServerError(
                        f"server {number} of the cluster is not healthy: {health}\n{self.servers[number].last_output()}"
                    )
                await asyncio.sleep(_POLL_SECONDS)

    async def leader_of(self, stream: str) -> int | None:
        """Return the number of the server that leads a stream; None if the answering servers report no leader."""
        names = [server.name for server in self.servers]
        for number in self.answering:
            page = await self._page(number, "jsz?accounts=true&streams=true")
            for account in page.get("account_details", ()):
                for detail in account.get("stream_detail", ()):
                    if detail["name"] == stream and (leader := detail.get("cluster", {}).get("leader")):
                        return names.index(leader)
        return None

    def number_of(self, address: str) -> int:
        """Return the number of the server at ``host:port``."""
        return [url.removeprefix("nats://") for url in self.urls].index(address)

    async def totals(self) -> dict[str, int]:
        """Return the number of clients and of JetStream consumers, of all answering servers together."""
        clients, consumers = 0, set[tuple[str, str]]()
        for number in self.answering:
            clients += (await self._page(number, "connz")).get("num_connections", 0)
            page = await self._page(number, "jsz?accounts=true&streams=true&consumers=true")
            for account in page.get("account_details", ()):
                for detail in account.get("stream_detail", ()):
                    consumers |= {(detail["name"], one["name"]) for one in detail.get("consumer_detail") or ()}
        return {"clients": clients, "consumers": len(consumers)}

    async def _page(self, number: int, page: str) -> dict[str, Any]:
        """Return a page of a server's monitoring endpoint; empty if the server does not answer."""

        def read() -> dict[str, Any]:
            try:
                with urllib.request.urlopen(f"{self.servers[number].monitor_url}/{page}", timeout=_ASK_SECONDS) as body:
                    return dict(json.load(body))
            except urllib.error.HTTPError as error:  # an unhealthy server sends the reason
                return dict(json.load(error))
            except OSError:
                return {}

        return await asyncio.to_thread(read)


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        port = random.choice(_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)
