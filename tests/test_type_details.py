"""What workers say about their agent types in the registry, for programs that know what to make of it."""

from __future__ import annotations

from typing import Any

import pytest
from autogen_core import AgentType, MessageContext, RoutedAgent, message_handler

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.registry.entries import TypeEntry, decode_entry, encode_entry
from tests.support.processes import eventually


class Echo(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("echoes")

    @message_handler
    async def echo(self, message: str, ctx: MessageContext) -> str:
        return message


DETAILS = {"app": {"description": "Echo? Écho!", "numbers": [1, 2.5, None, True]}}


async def test_every_runtime_reads_what_a_worker_says(server: EmbeddedServer, namespace: str) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        assert caller.type_details("echo") is None
        async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
            await natsrt.register(worker, Echo, "echo", Echo, details=DETAILS)
            await worker.register_factory("silent", Echo)
            await caller.wait_for("echo")
            await caller.wait_for("silent")
            assert caller.type_details("echo") == worker.type_details(AgentType("echo")) == DETAILS
            assert caller.type_details("silent") == {}
            await worker.unregister("echo")
            await eventually(lambda: caller.type_details("echo") is None)
        await eventually(lambda: caller.type_details("silent") is None)


async def test_details_that_were_given_before_the_start_are_announced(server: EmbeddedServer, namespace: str) -> None:
    worker = NatsAgentRuntime(server.url, namespace=namespace)
    await worker.register_factory("echo", Echo, details=DETAILS)
    async with worker, NatsAgentRuntime(server.url, namespace=namespace) as caller:
        assert caller.type_details("echo") == DETAILS


async def test_of_workers_that_differ_the_last_one_counts_while_it_stays(
    server: EmbeddedServer, namespace: str
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        old, new = (NatsAgentRuntime(server.url, namespace=namespace) for _ in range(2))
        async with old:
            await natsrt.register(old, Echo, "echo", Echo, details={"version": 1})
            async with new:
                await natsrt.register(new, Echo, "echo", Echo, details={"version": 2})
                await eventually(lambda: caller.type_details("echo") == {"version": 2})
            await eventually(lambda: caller.type_details("echo") == {"version": 1})


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ([], "must be a dict of JSON values"),
        ({1: "x"}, "must be a dict of JSON values: .*str"),
        ({"x": (1, 2)}, "must be a dict of JSON values"),
        ({"x": float("nan")}, "must be a dict of JSON values"),
        ({"x": object()}, "must be a dict of JSON values: .*object"),
        ({"x": "y" * 20_000}, "have 20,008 bytes as JSON, and may have 16,384"),
    ],
)
async def test_details_that_the_registry_cannot_keep_are_refused(details: Any, text: str) -> None:
    runtime = NatsAgentRuntime()
    with pytest.raises(ValueError, match=text):
        await natsrt.register(runtime, Echo, "echo", Echo, details=details)
    await natsrt.register(runtime, Echo, "echo", Echo)  # nothing was left behind


async def test_details_need_a_started_runtime_and_an_agent_type(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    with pytest.raises(RuntimeError, match="not started"):
        runtime.type_details("echo")
    async with runtime:
        with pytest.raises(ValueError, match="must be an agent type"):
            runtime.type_details("no type")


def test_an_entry_without_details_is_written_as_before() -> None:
    entry = TypeEntry("echo", "w-1", handles=("str",))
    assert b"details" not in encode_entry(entry)
    assert decode_entry(entry.key, encode_entry(entry)) == entry
    said = TypeEntry("echo", "w-1", details=DETAILS)
    assert decode_entry(said.key, encode_entry(said)) == said


async def test_register_makes_a_type_keyed(server: EmbeddedServer, namespace: str) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        await natsrt.register(runtime, Echo, "echo", Echo, keyed=True)
        with pytest.raises(ValueError, match="keyed"):
            async with NatsAgentRuntime(server.url, namespace=namespace) as other:
                await natsrt.register(other, Echo, "echo", Echo)
