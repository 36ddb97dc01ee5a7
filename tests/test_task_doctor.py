"""What `natsrt doctor` says of tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import nats
import pytest
import pytest_asyncio
from autogen_core import AgentId, MessageContext, RoutedAgent, rpc
from nats.js import api

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.support import cli
from tests.support.processes import eventually

pytestmark = pytest.mark.timeout(120)

GONE = "tasks wait for agent types that no live worker hosts"


class Works(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("works")

    @rpc
    async def on_job(self, message: str, ctx: MessageContext) -> str:
        return message.upper()


class Place:
    """A namespace on a server."""

    def __init__(self, server: EmbeddedServer, namespace: str, stack: AsyncExitStack) -> None:
        self.server, self.namespace, self._stack = server, namespace, stack

    async def runtime(self) -> NatsAgentRuntime:
        return await self._stack.enter_async_context(NatsAgentRuntime(self.server.url, namespace=self.namespace))

    async def found(self, check: str) -> dict[str, str]:
        """What the doctor says, by level."""
        ended = await cli.natsrt("doctor", "--json", "--server", self.server.url, "--namespace", self.namespace)
        return {one["level"]: one["text"] for one in ended.json if one["check"] == check}


@pytest_asyncio.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(server, namespace, stack)


async def test_doctor_says_nothing_of_tasks_where_there_are_none(place: Place) -> None:
    runtime = await place.runtime()
    await natsrt.register(runtime, Works, "jobs", Works)
    assert await place.found("tasks") == {}


async def test_doctor_warns_of_tasks_of_types_that_no_worker_has_ever_hosted(place: Place) -> None:
    caller = await place.runtime()
    for number in range(3):
        await caller.submit_message(str(number), AgentId("never", "k"))
    await caller.submit_message("later", AgentId("delayed", "k"), delay=3600)
    found = await place.found("tasks")
    assert found["warning"] == f"{GONE}: never (3)"
    assert "problem" not in found
    assert (await place.found("durable topics")).keys() == {"ok"}


async def test_doctor_warns_of_tasks_of_a_type_whose_workers_have_gone(place: Place) -> None:
    caller, worker = await place.runtime(), await place.runtime()
    await natsrt.register(worker, Works, "jobs", Works)
    ticket = await caller.submit_message("a", AgentId("jobs", "k"))
    assert await ticket.result(10) == "A"
    assert "warning" not in await place.found("tasks")
    await worker.unregister("jobs")
    for number in range(2):
        await caller.submit_message(str(number), AgentId("jobs", "k"))

    async def warns() -> bool:
        return (await place.found("tasks")).get("warning") == f"{GONE}: jobs (2)"

    await eventually(warns, 20.0)
    assert "warning" not in await place.found("durable topics")
    await natsrt.register(worker, Works, "jobs", Works)

    async def is_well() -> bool:
        return "warning" not in await place.found("tasks")

    await eventually(is_well, 20.0)


@pytest.mark.parametrize(
    ("stream", "check", "wrong", "text"),
    [
        ("natsrt_events_tasks", "durable topics", {"max_age": 3600}, "max_age is 3600s and must be 0"),
        ("natsrt_results", "tasks", {"republish": None}, "republish is absent"),
        ("natsrt_results", "tasks", {"discard": api.DiscardPolicy.NEW}, "discard is new and must be old"),
    ],
)
async def test_doctor_finds_wrong_settings_of_the_streams_of_tasks(
    place: Place, stream: str, check: str, wrong: dict[str, object], text: str
) -> None:
    worker = await place.runtime()
    await natsrt.register(worker, Works, "jobs", Works)
    await worker.take_tasks("jobs")
    assert (await place.found(check)).keys() == {"ok"}
    async with await nats.connect(place.server.url) as client:
        js = client.jetstream()
        config = (await js.stream_info(f"{place.namespace}_{stream}")).config
        await js.update_stream(config.evolve(**wrong))
    assert text in (await place.found(check))["problem"]


async def test_doctor_finds_a_stream_of_events_that_lacks_topics_and_none_that_has_more(place: Place) -> None:
    async with NatsAgentRuntime(place.server.url, namespace=place.namespace, durable=["orders.", "audit."]):
        assert (await place.found("durable topics")).keys() == {"ok"}
        async with await nats.connect(place.server.url) as client:
            js = client.jetstream()
            config = (await js.stream_info(f"{place.namespace}_natsrt_events")).config
            more = [*(config.subjects or []), f"{place.namespace}.topic.more.*"]
            await js.update_stream(config.evolve(subjects=more))
            assert (await place.found("durable topics")).keys() == {"ok"}
            fewer = [subject for subject in more if ".orders." not in subject]
            await js.update_stream(config.evolve(subjects=fewer))
        assert "subjects is" in (await place.found("durable topics"))["problem"]
