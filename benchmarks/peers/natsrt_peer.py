"""The peer natsrt."""

from __future__ import annotations

import asyncio
import time
from functools import cached_property
from typing import Any

from autogen_core import AgentRuntime
from opentelemetry.trace import TracerProvider

from benchmarks.autogen_roles import RuntimeCaller, RuntimeRole, RuntimeWorker, host_echoes
from benchmarks.measured_agents import Echo
from benchmarks.roles import Role
from natsrt import NatsAgentRuntime


class _Natsrt(RuntimeRole):
    def make(self) -> NatsAgentRuntime:
        return NatsAgentRuntime(
            self.place.address,
            namespace=self.place.namespace,
            tracer_provider=self._provider,
            **dict(self.setup.options),
        )

    @cached_property
    def _provider(self) -> TracerProvider | None:
        if self.setup.sampled is None:
            return None
        # Imported here because natsrt itself does not import it, and the start is measured too.
        from benchmarks.peers.tracing import discarding_provider

        return discarding_provider(self.setup.sampled)

    async def open(self) -> AgentRuntime:
        runtime = self.make()
        await runtime.start()
        return runtime

    async def close(self, runtime: Any) -> None:
        await runtime.close()


class NatsrtWorker(_Natsrt, RuntimeWorker):
    async def start(self) -> None:
        runtime = self.make()
        await host_echoes(runtime, self.setup)
        await runtime.start()
        self.runtime = runtime

    async def register_and_start(self, count: int) -> float:
        """Register ``count`` agent types with a new runtime, then start it. Returns the seconds."""
        began = time.perf_counter()
        runtime = self.make()
        for number in range(count):
            await Echo.register(runtime, f"registered{number}", lambda: Echo())
        await runtime.start()
        took = time.perf_counter() - began
        await runtime.close()
        return took


class NatsrtCaller(_Natsrt, RuntimeCaller):
    pass


class NatsrtIdle(_Natsrt):
    """Starts ``Setup.idle_workers`` runtimes. Each hosts an agent type that is never called."""

    async def start(self) -> None:
        self._runtimes = [self.make() for _ in range(self.setup.idle_workers)]
        for runtime in self._runtimes:
            await Echo.register(runtime, "idle", lambda: Echo())
            await runtime.start()

    async def stop(self) -> None:
        await asyncio.gather(*(self.close(runtime) for runtime in self._runtimes))


ROLES: dict[str, type[Role]] = {"worker": NatsrtWorker, "caller": NatsrtCaller, "idle": NatsrtIdle}
