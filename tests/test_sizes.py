"""Every kind of message at 0.9, 1 and 50 times the server's max_payload: it arrives equal, and leaves nothing behind.

The names of the tests say what is left of payloads: nothing, or what expires. Reminders are in
tests/test_large_reminders.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
import nats.js.errors
import pytest
import pytest_asyncio
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, event, rpc
from nats.js import JetStreamContext

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.support.processes import REPOSITORY, Processes, eventually

MAX_PAYLOAD = 16 * 1024
LARGE = pytest.mark.parametrize("part", [0.9, 1, 50])
AGENT = AgentId("echo", "ada")
KEPT = AgentId("kept", "ada")
CORE = TopicId("news.core", "ada")
DURABLE = TopicId("work.jobs", "ada")


@dataclass
class Text:
    text: str


@dataclass
class Small:
    size: int


@dataclass
class Fail:
    text: str


@dataclass
class Seen:
    texts: list[str] = field(default_factory=list)
    fails: bool = False


def text(part: float) -> str:
    """A text whose message has the size of max_payload times ``part``, without its envelope, and no two equal parts."""
    size = int(part * MAX_PAYLOAD) - len('{"text":""}')
    return "".join(f"{number:08x}" for number in range(size // 8 + 1))[:size]


class Echo(RoutedAgent):
    def __init__(self, seen: Seen) -> None:
        super().__init__("echo")
        self._seen = seen
        self._state: dict[str, Any] = {}

    @rpc
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        self._state = {"text": message.text}
        return message

    @rpc
    async def on_small(self, message: Small, ctx: MessageContext) -> Small:
        return Small(len(self._state.get("text", "")))

    @rpc
    async def on_fail(self, message: Fail, ctx: MessageContext) -> Text:
        raise ValueError(message.text)

    @event
    async def on_event(self, message: Text, ctx: MessageContext) -> None:
        if self._seen.fails:
            raise ValueError("not now")
        self._seen.texts.append(message.text)

    async def save_state(self) -> Mapping[str, Any]:
        return self._state

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._state = dict(state)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    """A server with a small max_payload."""
    folder = tmp_path_factory.mktemp("server")
    config = folder / "nats.conf"
    config.write_text(f"max_payload: {MAX_PAYLOAD}\njetstream {{ store_dir: '{folder / 'js'}' }}\n")
    async with EmbeddedServer(config=config, port=-1) as shared:
        yield shared


class Place:
    """A worker and a caller in one namespace. Payloads that expire do so after a second."""

    def __init__(self, url: str, namespace: str, stack: AsyncExitStack, js: JetStreamContext) -> None:
        self.url, self.namespace, self._stack, self._js = url, namespace, stack, js
        self.seen = Seen()

    async def runtime(self, **settings: Any) -> NatsAgentRuntime:
        settings = self._settings() | settings
        return await self._stack.enter_async_context(NatsAgentRuntime(self.url, **settings))

    async def worker(self, **settings: Any) -> NatsAgentRuntime:
        """A worker of ``echo`` and of ``kept``, which is keyed."""
        runtime = NatsAgentRuntime(self.url, **(self._settings() | {"keyed": ["kept"]} | settings))
        for agent_type in ("echo", "kept"):
            await natsrt.register(runtime, Echo, agent_type, lambda: Echo(self.seen))
        return await self._stack.enter_async_context(runtime)

    def _settings(self) -> dict[str, Any]:
        return {"namespace": self.namespace, "durable": ["work."], "publish_timeout": 1, "retry_delay": 0.05}

    async def ttls(self) -> list[str]:
        """The times to live of the payloads that are stored."""
        stream = f"{self.namespace}_natsrt_blobs"
        try:
            info = await self._js.stream_info(stream, subjects_filter=f"{self.namespace}.natsrt.blob.*.0")
        except nats.js.errors.NotFoundError:
            return []
        found = []
        for subject in info.state.subjects or {}:
            try:
                chunk = await self._js.get_last_msg(stream, subject)
            except nats.js.errors.NotFoundError:  # it was deleted at this moment
                continue
            found.append((chunk.headers or {})["Nats-TTL"])
        return found

    async def is_empty(self) -> None:
        async def is_empty() -> bool:
            return not await self.ttls()

        await eventually(is_empty, 30.0)

    async def purge(self, stream: str) -> None:
        await self._js.purge_stream(f"{self.namespace}_{stream}")


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        client = await nats.connect(server.url)
        stack.push_async_callback(client.close)
        yield Place(server.url, namespace, stack, client.jetstream())


async def handled(place: Place, *texts: str) -> None:
    await eventually(lambda: len(place.seen.texts) >= len(texts), 30.0)
    assert place.seen.texts == list(texts)


def swept_soon(worker: NatsAgentRuntime) -> None:
    """Let the sweep not wait for `blob_ttl` any more."""
    sweep = worker.running.incoming.durable._parts.payloads
    sweep._grace = 0.0


# -- calls -------------------------------------------------------------------------------------------------------------


@LARGE
@pytest.mark.parametrize("agent", [AGENT, KEPT], ids=["plain", "keyed"])
async def test_a_call_and_its_reply_leave_nothing(place: Place, part: float, agent: AgentId) -> None:
    await place.worker()
    caller = await place.runtime()
    assert await caller.send_message(Text(text(part)), agent) == Text(text(part))
    await place.is_empty()


@LARGE
async def test_an_error_with_a_long_text_keeps_its_type_and_says_what_is_left_out(place: Place, part: float) -> None:
    await place.worker()
    caller = await place.runtime()
    with pytest.raises(ValueError) as caught:
        await caller.send_message(Fail(text(part)), AGENT)
    said = str(caught.value)
    assert said == text(part) or (said.startswith(text(part)[:500]) and len(said) < len(text(part)))
    await place.is_empty()


# -- tasks -------------------------------------------------------------------------------------------------------------


@LARGE
@pytest.mark.parametrize("agent", [AGENT, KEPT], ids=["plain", "keyed"])
async def test_a_task_leaves_nothing_and_its_result_expires(place: Place, part: float, agent: AgentId) -> None:
    await place.worker(blob_ttl=5)
    submitter = await place.runtime(blob_ttl=5)
    ticket = await submitter.submit_message(Text(text(part)), agent, result_ttl=5)
    assert await ticket.result(30) == Text(text(part))
    assert set(await place.ttls()) <= {"10s"}  # that of the result
    await place.is_empty()


# -- events ------------------------------------------------------------------------------------------------------------


@LARGE
@pytest.mark.parametrize("agent_type", ["echo", "kept"])
async def test_the_payload_of_a_core_event_expires(place: Place, part: float, agent_type: str) -> None:
    worker = await place.worker(blob_ttl=2)
    await worker.add_subscription(TypeSubscription(CORE.type, agent_type))
    publisher = await place.runtime(blob_ttl=2)
    await publisher.publish_message(Text(text(part)), CORE)
    assert await place.ttls() in ([], ["2s"])
    await handled(place, text(part))
    await place.is_empty()


@LARGE
@pytest.mark.parametrize("delay", [None, 0.5], ids=["now", "later"])
@pytest.mark.parametrize("agent_type", ["echo", "kept"])
async def test_the_payload_of_a_durable_event_is_there_as_long_as_its_stream_has_the_event(
    place: Place, part: float, agent_type: str, delay: float | None
) -> None:
    worker = await place.worker(blob_ttl=1)
    await worker.add_subscription(TypeSubscription(DURABLE.type, agent_type))
    publisher = await place.runtime(blob_ttl=1)
    await publisher.publish_message(Text(text(part)), DURABLE, delay=delay)
    await handled(place, text(part))
    seconds = [int(one.removesuffix("s")) for one in await place.ttls()]
    assert len(seconds) == (part > 0.9) and all(abs(one - 30 * 86400) < 10 for one in seconds)
    if delay is None:  # those of delayed events expire
        await place.purge("natsrt_events")
        await place.is_empty()


@LARGE
@pytest.mark.parametrize("agent_type", ["echo", "kept"])
async def test_a_dead_letter_is_given_to_its_agent_again(place: Place, part: float, agent_type: str) -> None:
    worker = await place.worker(max_deliver=1, blob_ttl=1)
    await worker.add_subscription(TypeSubscription(DURABLE.type, agent_type))
    place.seen.fails = True
    await worker.publish_message(Text(text(part)), DURABLE)
    await eventually(lambda: worker.health().dead_letters)
    place.seen.fails = False
    operator = await place.runtime()
    (letter,) = [letter async for letter in operator.dead_letters()]
    await operator.redrive(letter)
    await handled(place, text(part))
    await place.purge("natsrt_events")
    await place.is_empty()


# -- tasks -------------------------------------------------------------------------------------------------------------


@LARGE
@pytest.mark.parametrize("agent", [AGENT, KEPT], ids=["plain", "keyed"])
async def test_only_the_result_of_a_task_is_left_and_it_expires(place: Place, part: float, agent: AgentId) -> None:
    await place.worker(blob_ttl=1)
    submitter = await place.runtime(blob_ttl=1)
    ticket = await submitter.submit_message(Text(text(part)), agent, result_ttl=4)
    assert await ticket.result(timeout=30) == Text(text(part))

    async def one_is_left() -> bool:
        return await place.ttls() == ["5s"] * (part > 0.9)

    await eventually(one_is_left)
    await place.is_empty()


# -- states ------------------------------------------------------------------------------------------------------------


@LARGE
async def test_the_state_of_a_keyed_agent_is_kept_and_needs_no_payloads(place: Place, part: float) -> None:
    first = NatsAgentRuntime(place.url, namespace=place.namespace, keyed=["kept"])
    await natsrt.register(first, Echo, "kept", lambda: Echo(place.seen))
    caller = await place.runtime()
    async with first:
        assert await caller.send_message(Text(text(part)), KEPT) == Text(text(part))
    await place.worker()
    assert await caller.send_message(Small(0), KEPT) == Small(len(text(part)))
    assert await caller.agent_save_state(KEPT) == {"text": text(part)}
    await place.is_empty()


@LARGE
@pytest.mark.parametrize("agent", [AGENT, KEPT], ids=["plain", "keyed"])
async def test_states_are_read_and_loaded_from_any_runtime_and_leave_nothing(
    place: Place, part: float, agent: AgentId
) -> None:
    await place.worker()
    caller = await place.runtime()
    await caller.agent_load_state(agent, {"text": text(part)})
    assert await caller.agent_save_state(agent) == {"text": text(part)}
    assert await caller.send_message(Small(0), agent) == Small(len(text(part)))
    await place.is_empty()


@LARGE
async def test_a_state_is_loaded_through_another_worker_than_the_owner(place: Place, part: float) -> None:
    await place.worker()
    caller = await place.runtime()
    await caller.send_message(Small(0), KEPT)
    await place.worker()
    for _ in range(4):  # either worker may get the message
        await caller.agent_load_state(KEPT, {"text": text(part)})
        assert await caller.agent_save_state(KEPT) == {"text": text(part)}
    await place.is_empty()


# -- records -----------------------------------------------------------------------------------------------------------


@LARGE
async def test_what_passes_is_recorded_and_read_back(place: Place, part: float, processes: Processes) -> None:
    worker = await place.worker(blob_ttl=1)
    await worker.add_subscription(TypeSubscription(CORE.type, "echo"))
    stream = f"rec_{place.namespace}"
    recorder = processes.natsrt("record", "--to", stream, "--server", place.url, "--namespace", place.namespace)
    await recorder.wait_for_line("recording to", 30.0)
    caller = await place.runtime(blob_ttl=1)
    assert await caller.send_message(Text(text(part)), AGENT) == Text(text(part))
    await caller.publish_message(Text(text(part)), CORE)
    await handled(place, text(part))
    await place.is_empty()
    recorder.interrupt()
    await recorder.wait(30.0)
    entries = [entry async for entry in worker.recorded(stream)]
    assert [entry.message for entry in entries if entry.message is not None] == [Text(text(part))] * 3


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says how much memory a process has had")
async def test_a_large_call_takes_the_memory_of_its_message_its_json_and_what_reading_that_needs(
    own_server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    program = REPOSITORY / "tests" / "programs" / "large_messages.py"
    worker = processes.python(program, "worker", own_server.url, namespace)
    await worker.wait_for_line("ready", 30.0)
    caller = processes.python(program, "caller", own_server.url, namespace, "100000000")
    assert await caller.wait(120.0) == 0, caller.describe()
    sender, receiver = map(float, caller.stdout.split())
    # The message and its JSON; and at the receiver a second copy of the JSON while that is read. Chunks are the rest.
    assert 2.0 <= sender < 2.5
    assert 3.0 <= receiver < 3.5
