"""AutoGen's gRPC runtime: a host process between worker and caller."""

from __future__ import annotations

from typing import Any

from autogen_core import AgentRuntime
from autogen_ext.runtimes.grpc import GrpcWorkerAgentRuntime, GrpcWorkerAgentRuntimeHost

from benchmarks.autogen_roles import RuntimeCaller, RuntimeRole, RuntimeWorker
from benchmarks.roles import Role, free_address, until_listening


class _Grpc(RuntimeRole):
    async def open(self) -> AgentRuntime:
        runtime = GrpcWorkerAgentRuntime(self.place.address)
        await runtime.start()
        return runtime

    async def close(self, runtime: Any) -> None:
        await runtime.stop()


class GrpcHost(Role):
    async def start(self) -> None:
        self.address = free_address()
        self._host = GrpcWorkerAgentRuntimeHost(self.address)
        self._host.start()
        await until_listening(self.address)

    async def stop(self) -> None:
        await self._host.stop(grace=1)


class GrpcWorker(_Grpc, RuntimeWorker):
    pass


class GrpcCaller(_Grpc, RuntimeCaller):
    pass


ROLES: dict[str, type[Role]] = {"host": GrpcHost, "worker": GrpcWorker, "caller": GrpcCaller}
