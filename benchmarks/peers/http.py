"""The HTTP runtime (package ``autogen-http-runtime``): a host process between worker and caller."""

from __future__ import annotations

from typing import Any, cast

from autogen_core import AgentRuntime
from autogen_http_runtime.runtimes.http import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
    HttpAgentServer,
    HttpWorkerAgentRuntime,
)

from benchmarks.autogen_roles import RuntimeCaller, RuntimeRole, RuntimeWorker
from benchmarks.roles import Role, free_address, until_listening


class _Http(RuntimeRole):
    async def open(self) -> AgentRuntime:
        runtime: Any = HttpWorkerAgentRuntime(f"http://{self.place.address}")
        await runtime.start()
        return cast(AgentRuntime, runtime)

    async def close(self, runtime: Any) -> None:
        await runtime.stop()


class HttpHost(Role):
    async def start(self) -> None:
        self.address = free_address()
        host, port = self.address.split(":")
        self._server = HttpAgentServer(host, int(port))
        self._server.start()
        await until_listening(self.address)

    async def stop(self) -> None:
        await self._server.stop()


class HttpWorker(_Http, RuntimeWorker):
    pass


class HttpCaller(_Http, RuntimeCaller):
    pass


ROLES: dict[str, type[Role]] = {"host": HttpHost, "worker": HttpWorker, "caller": HttpCaller}
