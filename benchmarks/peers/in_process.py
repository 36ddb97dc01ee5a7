"""AutoGen's `SingleThreadedAgentRuntime`: caller and agents in one process, without serialization."""

from __future__ import annotations

from typing import Any

from autogen_core import AgentRuntime, SingleThreadedAgentRuntime

from benchmarks.autogen_roles import RuntimeCaller, RuntimeWorker, host_echoes
from benchmarks.roles import Role


class InProcess(RuntimeCaller, RuntimeWorker):
    """Caller and worker in one role."""

    _shared: SingleThreadedAgentRuntime | None = None

    async def open(self) -> AgentRuntime:
        """Return the only runtime. All publishers share it, because there are no connections."""
        if self._shared is None:
            self._shared = SingleThreadedAgentRuntime()
            self._shared.start()
        return self._shared

    async def close(self, runtime: Any) -> None:
        if self._shared is not None:
            shared, self._shared = self._shared, None
            await shared.stop()

    async def start(self) -> None:
        await super().start()
        await host_echoes(self.runtime, self.setup)


ROLES: dict[str, type[Role]] = {"caller": InProcess}
