"""The runtimes that the conformance tests run over.

A test takes ``world`` (or ``make_world``, to choose settings): agents live in ``world.host``, messages come from
``world.caller``. It runs with one natsrt runtime that is both, with two natsrt runtimes that share nothing but the
server, and with AutoGen's `SingleThreadedAgentRuntime`, whose behaviour natsrt's must equal. ``natsrt_only`` and
``two_runtimes`` leave out those for which a test makes no sense.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import nats
import pytest
from autogen_core import AgentRuntime, SingleThreadedAgentRuntime
from nats.aio.client import Client

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer

ONE = "natsrt"
TWO = "natsrt, two runtimes"
IN_PROCESS = "in process"

natsrt_only = pytest.mark.parametrize("flavour", [ONE, TWO], indirect=True)
one_runtime = pytest.mark.parametrize("flavour", [ONE], indirect=True)
two_runtimes = pytest.mark.parametrize("flavour", [TWO], indirect=True)

_ROUNDS = 3


@dataclass
class World:
    """A runtime that hosts agents and one that sends to them, perhaps the same."""

    host: Any
    caller: Any

    @property
    def is_natsrt(self) -> bool:
        return isinstance(self.host, NatsAgentRuntime)

    @property
    def is_remote(self) -> bool:
        return self.host is not self.caller

    async def idle(self) -> None:
        """Return when all that was sent is handled, and what the handlers sent too."""
        if not self.is_natsrt:
            await self.host.stop_when_idle()
            self.host.start()
            return
        for _ in range(_ROUNDS):  # a handler in one runtime may have sent something to the other
            for runtime in (self.caller, self.host):
                await runtime.running.wait_idle()


MakeWorld = Callable[..., Awaitable[World]]
MakeRuntime = Callable[..., NatsAgentRuntime]


@pytest.fixture(params=[ONE, TWO, IN_PROCESS])
def flavour(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def make_runtime(server: EmbeddedServer, namespace: str) -> AsyncIterator[MakeRuntime]:
    """Makes natsrt runtimes of one namespace, not started. All of them are closed at the end."""
    made: list[NatsAgentRuntime] = []

    def make(**settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(server.url, namespace=namespace, **{"drain_timeout": 5.0, **settings})
        made.append(runtime)
        return runtime

    yield make
    for runtime in reversed(made):
        await runtime.close()


@pytest.fixture
async def make_world(flavour: str, make_runtime: MakeRuntime) -> AsyncIterator[MakeWorld]:
    """Makes a world with settings of its own. ``intervention_handlers`` are the caller's."""
    in_process: list[SingleThreadedAgentRuntime] = []

    async def make(*, intervention_handlers: list[Any] | None = None, **settings: Any) -> World:
        if flavour == IN_PROCESS:
            local = SingleThreadedAgentRuntime(intervention_handlers=intervention_handlers, **settings)
            in_process.append(local)
            local.start()
            return World(local, local)
        caller = make_runtime(intervention_handlers=intervention_handlers, **settings)
        host = make_runtime(**settings) if flavour == TWO else caller
        await caller.start()
        if host is not caller:
            await host.start()
        return World(host, caller)

    yield make
    for runtime in in_process:
        await runtime.close()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    return await make_world()


async def register(runtime: AgentRuntime, cls: type[Any], agent_type: str, factory: Callable[[], Any]) -> None:
    """Register a type whose handlers AutoGen's own ``register`` may refuse."""
    if isinstance(runtime, NatsAgentRuntime):
        await natsrt.register(runtime, cls, agent_type, factory)
    else:
        await runtime.register_factory(agent_type, factory, expected_class=cls)


@asynccontextmanager
async def plain_client(server: EmbeddedServer) -> AsyncIterator[Client]:
    """A client of nats-py, as a participant without natsrt uses it."""
    client = await nats.connect(server.url)
    try:
        yield client
    finally:
        await client.close()
