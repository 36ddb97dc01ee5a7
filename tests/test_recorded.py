"""``natsrt record``: what passes is stored in a stream, and nothing is answered or changed by that."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import (
    AgentId,
    CancellationToken,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypePrefixSubscription,
    event,
    rpc,
)

import natsrt
from natsrt import NatsAgentRuntime, RecordedEntry, StreamUnavailable
from natsrt.embedded import EmbeddedServer
from natsrt.errors import ConfigurationError, UnknownAgentType
from tests.support.processes import REPOSITORY, Process, Processes, eventually

ASK = AgentId("shop", "default")


@dataclass
class Order:
    number: int
    text: str = ""


@dataclass
class Done:
    number: int
    text: str = ""


class Shop(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("shop")
        self.events: list[Order] = []

        self.waiting: list[int] = []

    @rpc
    async def on_order(self, message: Order, ctx: MessageContext) -> Done:
        if message.text == "fail":
            raise ValueError(f"no {message.number}")
        if message.text == "wait":
            self.waiting.append(message.number)
            await asyncio.sleep(60)
        return Done(message.number, message.text)


class Listens(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("listens")

    @event
    async def on_event(self, message: Order, ctx: MessageContext) -> None:
        pass


@dataclass
class Scene:
    """A namespace with a worker, a caller, and recorders."""

    server: EmbeddedServer
    namespace: str
    processes: Processes
    stack: AsyncExitStack

    @property
    def stream(self) -> str:
        return f"rec_{self.namespace}"

    async def runtime(self, **settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.server.url, namespace=self.namespace, **settings)
        return await self.stack.enter_async_context(runtime)

    async def worker(self, **settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.server.url, namespace=self.namespace, **settings)
        await natsrt.register(runtime, Shop, "shop", Shop)
        await natsrt.register(runtime, Listens, "listens", Listens)
        for prefix in ("news.", "work."):
            await runtime.add_subscription(TypePrefixSubscription(prefix, "listens"))
        return await self.stack.enter_async_context(runtime)

    async def record(self, *arguments: str) -> Process:
        recorder = self.processes.natsrt(
            "record", "--to", self.stream, "--server", self.server.url, "--namespace", self.namespace, *arguments
        )
        await recorder.wait_for_line("recording to", 30.0)
        return recorder

    async def end(self, recorder: Process) -> str:
        """End a recorder, and return its summary."""
        recorder.interrupt()
        await recorder.wait(30.0)
        return recorder.stderr.strip().splitlines()[-1]

    async def entries(self, runtime: NatsAgentRuntime) -> list[RecordedEntry]:
        return [entry async for entry in runtime.recorded(self.stream)]


@pytest.fixture
async def scene(server: EmbeddedServer, namespace: str, processes: Processes) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        scene = Scene(server, namespace, processes, stack)
        yield scene
        client = await nats.connect(server.url)
        try:
            await client.jetstream().delete_stream(scene.stream)
        except nats.js.errors.NotFoundError:
            pass
        finally:
            await client.close()


async def test_calls_replies_failures_and_events_are_recorded_and_read_back(scene: Scene) -> None:
    worker = await scene.worker(durable=["work."])
    caller = await scene.runtime(durable=["work."])
    recorder = await scene.record()
    for number in range(20):
        assert await caller.send_message(Order(number, "é\n"), ASK) == Done(number, "é\n")
    with pytest.raises(ValueError, match="no 20"):
        await caller.send_message(Order(20, "fail"), ASK)
    token = CancellationToken()
    cancelled = asyncio.ensure_future(caller.send_message(Order(21, "wait"), ASK, cancellation_token=token))
    shop = await worker.try_get_underlying_agent_instance(ASK, Shop)
    await eventually(lambda: shop.waiting == [21])
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await caller.publish_message(Order(22), TopicId("news.tech", "a b"))
    await caller.publish_message(Order(23), TopicId("work.jobs", "x"), message_id="of-23")
    client = await nats.connect(scene.server.url)
    plain = await client.request(f"{scene.namespace}.agent.shop", b'{"number": 24, "text": "plain"}', timeout=10)
    stored = await client.jetstream().stream_info(f"{scene.namespace}_natsrt_events")
    assert stored.state.messages == 1  # the durable event, once
    await client.close()
    assert json.loads(plain.data)["number"] == 24
    assert "missed: nothing known" in await scene.end(recorder)
    assert recorder.returncode == 0

    entries = await scene.entries(caller)
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    calls = [entry for entry in entries if entry.kind == "call"]
    assert [entry.message for entry in calls[:20]] == [Order(number, "é\n") for number in range(20)]
    assert len(calls) == 23
    assert {entry.recipient for entry in calls} == {ASK}
    assert json.loads(calls[22].message) == {"number": 24, "text": "plain"}
    replies = {entry.call.number: entry for entry in entries if entry.kind == "reply" and entry.call is not None}
    assert [replies[call.number].message for call in calls[:20]] == [Done(number, "é\n") for number in range(20)]
    assert isinstance(replies[calls[20].number].error, ValueError)
    assert replies[calls[20].number].sender == ASK
    assert json.loads(replies[calls[22].number].message)["number"] == 24
    events = [entry for entry in entries if entry.kind == "event"]
    assert [(one.topic, one.message) for one in events] == [
        (TopicId("news.tech", "a b"), Order(22)),
        (TopicId("work.jobs", "x"), Order(23)),
    ]
    assert events[1].message_id == "of-23"
    assert all(abs(entry.at - time.time()) < 120 for entry in entries)


async def test_a_type_without_workers_is_still_unknown_at_once(scene: Scene) -> None:
    await scene.worker()
    caller = await scene.runtime()
    recorder = await scene.record()
    begun = time.monotonic()
    with pytest.raises(UnknownAgentType):
        await caller.send_message(Order(1), AgentId("nobody", "default"))
    assert time.monotonic() - begun < 4.0
    assert await caller.send_message(Order(2), ASK) == Done(2)
    await scene.end(recorder)
    assert [entry.message for entry in await scene.entries(caller) if entry.kind == "reply"] == [Done(2)]


async def test_many_calls_are_recorded_once_each_and_in_order(scene: Scene) -> None:
    await scene.worker()
    callers = [await scene.runtime() for _ in range(3)]
    recorder = await scene.record()

    async def call(caller: NatsAgentRuntime, first: int) -> None:
        for number in range(first, first + 3000, 100):
            await asyncio.gather(*(caller.send_message(Order(one), ASK) for one in range(number, number + 100)))

    await asyncio.gather(*(call(caller, 10_000 * index) for index, caller in enumerate(callers)))
    assert "9,000 calls, 9,000 replies; missed: nothing known" in await scene.end(recorder)
    entries = await scene.entries(callers[0])
    for kind in ("call", "reply"):
        numbers = [entry.message.number for entry in entries if entry.kind == kind]
        assert Counter(numbers) == Counter(10_000 * index + one for index in range(3) for one in range(3000))
    for index in range(3):
        numbers = [entry.message.number for entry in entries if entry.kind == "call"]
        own = [number for number in numbers if number // 10_000 == index]
        assert own == sorted(own)
    assert all(
        entry.call is not None and entry.call.message.number == entry.message.number
        for entry in entries
        if entry.kind == "reply"
    )


async def test_keyed_calls_and_their_events_are_recorded_once(scene: Scene) -> None:
    runtime = NatsAgentRuntime(scene.server.url, namespace=scene.namespace)
    await runtime.register_factory("keyed", Shop, keyed=True)
    other = NatsAgentRuntime(scene.server.url, namespace=scene.namespace)
    await other.register_factory("keyed", Shop, keyed=True)
    for one in (runtime, other):
        await scene.stack.enter_async_context(one)
    caller = await scene.runtime()
    recorder = await scene.record("--agents", "keyed")
    for number in range(60):
        await caller.send_message(Order(number), AgentId("keyed", f"k {number % 6}"))
    await scene.end(recorder)
    entries = await scene.entries(caller)
    calls = [(entry.message.number, entry.recipient) for entry in entries if entry.kind == "call"]
    assert calls == [(number, AgentId("keyed", f"k {number % 6}")) for number in range(60)]
    assert [entry.message.number for entry in entries if entry.kind == "reply"] == list(range(60))


async def test_only_what_is_asked_for_is_recorded(scene: Scene) -> None:
    await scene.worker()
    caller = await scene.runtime()
    recorder = await scene.record("--topics", "news.")
    await caller.send_message(Order(1), ASK)
    await caller.publish_message(Order(2), TopicId("other.tech", "x"))
    await caller.publish_message(Order(3), TopicId("news.tech", "x"))

    async def stored() -> bool:
        return bool(await scene.entries(caller))

    await eventually(stored, 20.0)
    assert "1 events; missed: nothing known" in await scene.end(recorder)
    assert [entry.message for entry in await scene.entries(caller)] == [Order(3)]


async def test_a_large_payload_is_read_from_the_record(scene: Scene) -> None:
    await scene.worker()
    caller = await scene.runtime()
    recorder = await scene.record()
    text = "x" * 20_000_000
    assert (await caller.send_message(Order(1, text), ASK)).text == text
    await scene.end(recorder)
    entries = await scene.entries(caller)
    assert [(entry.kind, entry.problem) for entry in entries] == [("call", None), ("reply", None)]
    assert all(entry.message.text == text for entry in entries)


async def test_a_recorder_that_is_killed_leaves_what_it_stored_and_another_goes_on(scene: Scene) -> None:
    await scene.worker()
    caller = await scene.runtime()
    first = await scene.record()
    await caller.send_message(Order(1), ASK)

    async def stored() -> bool:
        return len(await scene.entries(caller)) == 2

    await eventually(stored, 20.0)
    first.kill()
    await first.wait()
    await caller.send_message(Order(2), ASK)
    second = await scene.record()
    await caller.send_message(Order(3), ASK)
    await scene.end(second)
    entries = await scene.entries(caller)
    told = [(entry.kind, entry.message, entry.error, entry.message_id, entry.headers) for entry in entries]
    assert [entry.message.number for entry in entries] == [1, 1, 3, 3], told
    assert len({entry.run for entry in entries}) == 2
    assert [entry.call.number for entry in entries if entry.call is not None] == [1, 1]


async def test_a_server_restart_is_a_gap_that_the_record_names(
    own_server: EmbeddedServer, processes: Processes, namespace: str
) -> None:
    async with AsyncExitStack() as stack:
        scene = Scene(own_server, namespace, processes, stack)
        await scene.worker()
        caller = await scene.runtime()
        recorder = await scene.record()
        await caller.send_message(Order(1), ASK)
        await own_server.restart()
        await recorder.wait_for_line("the connection was lost", 40.0)

        async def answered() -> bool:
            return await caller.send_message(Order(2), ASK) == Done(2)

        await eventually(answered, 40.0)
        summary = await scene.end(recorder)
        assert "what passed in 1 gaps" in summary
        assert recorder.returncode == 1
        entries = await scene.entries(caller)
        assert {entry.message.number for entry in entries} == {1, 2}
        assert [entry.gap > 0 for entry in entries] == [False, False, True, False]


async def test_a_full_stream_is_told_and_recording_goes_on_when_there_is_room(scene: Scene) -> None:
    await scene.worker()
    caller = await scene.runtime()
    client = await nats.connect(scene.server.url)
    scene.stack.push_async_callback(client.close)
    js = client.jetstream()
    config = nats.js.api.StreamConfig(
        name=scene.stream,
        subjects=[f"{scene.namespace}.natsrt.record.{scene.stream}.>"],
        discard=nats.js.api.DiscardPolicy.NEW,
        max_msgs=2,
        allow_direct=True,
    )
    await js.add_stream(config)
    recorder = await scene.record()
    for number in range(3):
        await caller.send_message(Order(number), ASK)
    await recorder.wait_for_line("does not store", 20.0)
    await js.update_stream(config.evolve(max_msgs=100))
    await recorder.wait_for_line("storing again", 20.0)
    assert "3 calls, 3 replies; missed: nothing known" in await scene.end(recorder)
    assert Counter(entry.message.number for entry in await scene.entries(caller)) == Counter([0, 0, 1, 1, 2, 2])


async def test_a_recorder_that_cannot_store_fast_enough_says_what_it_left_out(scene: Scene) -> None:
    await scene.worker()
    caller = await scene.runtime()
    client = await nats.connect(scene.server.url)
    scene.stack.push_async_callback(client.close)
    config = nats.js.api.StreamConfig(
        name=scene.stream,
        subjects=[f"{scene.namespace}.natsrt.record.{scene.stream}.>"],
        discard=nats.js.api.DiscardPolicy.NEW,
        max_msgs=1,
        allow_direct=True,
    )
    js = client.jetstream()
    await js.add_stream(config)
    recorder = await scene.record("--max-waiting", "20K")
    for number in range(100):
        assert await caller.send_message(Order(number), ASK) == Done(number)
    await recorder.wait_for_line("too many messages wait", 20.0)
    await js.update_stream(config.evolve(max_msgs=1000))
    await recorder.wait_for_line("does not store", 20.0)

    async def drained() -> bool:
        return len(await scene.entries(caller)) > 10

    await eventually(drained, 20.0)
    await caller.send_message(Order(1000), ASK)
    summary = await scene.end(recorder)
    assert recorder.returncode == 1
    entries = await scene.entries(caller)
    missed = sum(entry.missed for entry in entries)
    assert len(entries) + missed == 202
    assert f"{missed:,} left out" in summary


async def test_what_has_too_many_headers_for_a_stream_is_left_out(scene: Scene) -> None:
    recorder = await scene.record()
    client = await scene.stack.enter_async_context(await nats.connect(scene.server.url))
    for size in (70_000, 10):
        await client.publish(f"{scene.namespace}.topic.news.shop", b"{}", headers={"Own": "x" * size})
    await client.flush()
    reader = await scene.runtime()

    [entry] = await eventually(partial(scene.entries, reader), 20.0)
    assert "1 left out" in await scene.end(recorder)
    assert entry.headers["Own"] == "x" * 10


async def test_names_and_streams_that_cannot_be_recorded_into_are_refused(scene: Scene) -> None:
    caller = await scene.runtime()
    with pytest.raises(StreamUnavailable, match="there is no such stream"):
        await scene.entries(caller)
    for name in ("natsrt_events", "KV_x", "a.b", ""):
        with pytest.raises(ConfigurationError):
            [entry async for entry in caller.recorded(name)]
    client = await nats.connect(scene.server.url)
    scene.stack.push_async_callback(client.close)
    await client.jetstream().add_stream(name=scene.stream, subjects=[f"{scene.namespace}.other"])
    recorder = scene.processes.natsrt(
        "record", "--to", scene.stream, "--server", scene.server.url, "--namespace", scene.namespace
    )
    assert await recorder.wait(30.0) != 0
    assert "subjects" in recorder.stderr


# -- permissions -----------------------------------------------------------------------------------------------------


def documented(operation: str) -> list[str]:
    """The subjects that docs/recording.md gives to the user of a recorder."""
    text = (REPOSITORY / "docs" / "recording.md").read_text().partition("## Permissions")[2]
    [row] = [line for line in text.splitlines() if line.startswith(f"| {operation} ")]
    return re.findall(r"`([^`]+)`", row)


async def recorded_as(user: dict[str, Any], tmp_path: Path, processes: Processes) -> Process:
    """Let this user record two calls, and return the recorder when it has ended."""
    config = tmp_path / "nats.conf"
    users = [{"user": "all", "password": "all"}, {"user": "recorder", "password": "recorder", "permissions": user}]
    config.write_text("authorization: " + json.dumps({"users": users}))
    async with (
        EmbeddedServer(config=config, data_dir=tmp_path / "data", port=-1, extra_args=["-js"]) as server,
        NatsAgentRuntime(server.url, user="all", password="all") as runtime,
    ):
        await natsrt.register(runtime, Shop, "shop", Shop)
        arguments = ("record", "--to", "audit", "--server", server.url, "--user", "recorder", "--password", "recorder")
        recorder = processes.natsrt(*arguments)
        await eventually(lambda: "recording to" in recorder.stdout + recorder.stderr or not recorder.running, 30.0)
        for number in range(2):
            assert await runtime.send_message(Order(number), ASK) == Done(number)
        recorder.interrupt()
        await recorder.wait(30.0)
        if not recorder.returncode:
            found = [entry.kind async for entry in runtime.recorded("audit")]
            assert Counter(found) == {"call": 2, "reply": 2}
    return recorder


async def test_the_documented_permissions_of_a_recorder_are_enough(tmp_path: Path, processes: Processes) -> None:
    user = {operation: documented(operation) for operation in ("subscribe", "publish")}
    assert len(user["publish"]) == 3
    recorder = await recorded_as(user, tmp_path, processes)
    assert (recorder.returncode, recorder.stderr.count("\n")) == (0, 2), recorder.describe()


@pytest.mark.parametrize("subject", documented("publish") + documented("subscribe")[:1])
async def test_each_documented_permission_of_a_recorder_is_needed(
    tmp_path: Path, processes: Processes, subject: str
) -> None:
    user = {op: [one for one in documented(op) if one != subject] for op in ("subscribe", "publish")}
    recorder = await recorded_as(user, tmp_path, processes)
    assert recorder.returncode, recorder.describe()
    assert subject.removesuffix(".>") in recorder.stderr
