"""The registry: what it tells of workers that vanish, freeze and return, and what it costs."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import AsyncExitStack
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, event, rpc
from nats.js.errors import NotFoundError
from nats.js.kv import KeyValue

from natsrt import NatsAgentRuntime, NoLiveWorker, UnknownAgentType, register
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.registry.entries import KnownEntry, encode_entry
from tests.support.clients import settled
from tests.support.processes import REPOSITORY, Process, Processes, eventually
from tests.support.reading_worker import News, WhatWasRead

READING_WORKER = REPOSITORY / "tests" / "support" / "reading_worker.py"


class Echo(RoutedAgent):
    """Returns what it is sent, and remembers events."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__("echo")
        self._seen = seen

    @rpc
    async def on_str(self, message: str, ctx: MessageContext) -> str:
        return message

    @event
    async def on_news(self, message: News, ctx: MessageContext) -> None:
        self._seen.append(message.number)


async def start_worker(server: EmbeddedServer, namespace: str, processes: Processes, name: str) -> Process:
    worker = processes.python(READING_WORKER, server.url, namespace, name, "news", name=name)
    await worker.wait_for_line("ready", 20)
    return worker


async def keys(server: EmbeddedServer, namespace: str) -> list[str]:
    """The keys that the bucket holds."""
    client = await nats.connect(server.url)
    try:
        js = client.jetstream()
        info = await js.stream_info(f"KV_{namespace}_natsrt_registry", subjects_filter=">")
        found = []
        for subject in info.state.subjects or {}:
            try:
                message = await js.get_last_msg(f"KV_{namespace}_natsrt_registry", subject, direct=True)
            except NotFoundError:  # purged since the list was made
                continue
            if not {"KV-Operation", "Nats-Marker-Reason"} & (message.headers or {}).keys():
                found.append(subject.removeprefix(f"$KV.{namespace}_natsrt_registry."))
        return found
    finally:
        await client.close()


@pytest.mark.slow
@pytest.mark.parametrize("with_others", [True, False], ids=["beside another worker", "as the last worker"])
async def test_the_entries_of_a_killed_worker_vanish_by_themselves(
    server: EmbeddedServer, namespace: str, processes: Processes, with_others: bool
) -> None:
    seen: list[int] = []
    async with AsyncExitStack() as stack:
        if with_others:
            other = NatsAgentRuntime(server.url, namespace=namespace, name="other")
            await other.register_factory("reader", lambda: Echo(seen), expected_class=Echo)
            await stack.enter_async_context(other)
        doomed = await start_worker(server, namespace, processes, "doomed")
        watcher = await stack.enter_async_context(NatsAgentRuntime(server.url, namespace=namespace))
        assert (await watcher.send_message(WhatWasRead(), AgentId("memory-doomed", "m"))).events == []
        doomed.kill()

        async def gone() -> bool:
            left = [key for key in await keys(server, namespace) if "doomed-" in key.rpartition(".")[2]]
            return not left

        if with_others:
            await eventually(gone, 15, "the entries of the killed worker are gone")
            # Its subscription ended with it.
            await watcher.publish_message(News(1), TopicId("news", "s"))
            await other.running.wait_idle()
            assert seen == []
        await eventually(gone, 15, "the entries of the killed worker are gone")
        with pytest.raises(NoLiveWorker):
            await watcher.send_message(WhatWasRead(), AgentId("memory-doomed", "m"))


@pytest.mark.slow
async def test_a_worker_that_was_removed_while_it_was_frozen_registers_again(
    server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    other = NatsAgentRuntime(server.url, namespace=namespace, name="other")
    await register(other, Echo, "echo", lambda: Echo([]))
    async with other:
        frozen = await start_worker(server, namespace, processes, "frozen")
        before = {key for key in await keys(server, namespace) if "frozen" in key}

        async def registered() -> bool:
            return {key for key in await keys(server, namespace) if "frozen" in key} == before

        async def removed() -> bool:
            return not [key for key in await keys(server, namespace) if key.startswith("r.worker.frozen")]

        frozen.pause()
        await eventually(removed, 20, "the frozen worker is removed")
        frozen.resume()
        await eventually(registered, 15, "the worker has registered everything again")
        await other.publish_message(News(7), TopicId("news", "s"))

        async def read() -> bool:
            return (await other.send_message(WhatWasRead(), AgentId("memory-frozen", "m"))).events == ["s 7"]

        await eventually(read)


async def test_a_draining_worker_still_sends_heartbeats(server: EmbeddedServer, namespace: str) -> None:
    release = asyncio.Event()

    class Waiting(RoutedAgent):
        @rpc
        async def on_str(self, message: str, ctx: MessageContext) -> str:
            await release.wait()
            return message

    settings: dict[str, Any] = {"heartbeat_interval": 0.1, "heartbeat_ttl": 1.0}
    worker = NatsAgentRuntime(server.url, namespace=namespace, **settings)
    await register(worker, Waiting, "waiting", lambda: Waiting("waiting"))
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        await worker.start()
        worker_id = worker.running.worker_id
        client = await nats.connect(server.url)
        beats: list[str] = []

        async def on_beat(message: Any) -> None:
            beats.append(message.subject)

        await client.subscribe(f"$KV.{namespace}_natsrt_registry.hb.{worker_id}", cb=on_beat)
        await settled(client)
        call = asyncio.ensure_future(caller.send_message("hi", AgentId("waiting", "k")))
        await eventually(lambda: worker.health().handlers_running == 1)
        stopping = asyncio.ensure_future(worker.stop())
        await eventually(lambda: caller.running.registry.view.workers[worker_id].draining)
        beats.clear()
        try:
            await eventually(lambda: len(beats) >= 5, message="five heartbeats")
        finally:
            release.set()
        assert await call == "hi"
        await stopping
        await client.close()


async def test_a_type_stays_known_after_its_last_worker_stopped(server: EmbeddedServer, namespace: str) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        with pytest.raises(UnknownAgentType):
            await caller.send_message("hi", AgentId("echo", "k"))
        worker = NatsAgentRuntime(server.url, namespace=namespace)
        await register(worker, Echo, "echo", lambda: Echo([]))
        async with worker:
            assert await caller.send_message("hi", AgentId("echo", "k")) == "hi"
        with pytest.raises(NoLiveWorker):
            await caller.send_message("hi", AgentId("echo", "k"))
        async with NatsAgentRuntime(server.url, namespace=namespace) as newcomer:
            with pytest.raises(NoLiveWorker):
                await newcomer.send_message("hi", AgentId("echo", "k"))


async def test_what_is_known_of_a_type_goes_with_the_last_worker_that_leaves_in_order(
    server: EmbeddedServer, namespace: str
) -> None:
    async def known() -> set[str]:
        return {key.removeprefix("r.known.") for key in await keys(server, namespace) if key.startswith("r.known.")}

    workers = [NatsAgentRuntime(server.url, namespace=namespace, name=f"w{number}") for number in range(2)]
    for worker in workers:
        await worker.start()
        for agent_type in ("echo", "other"):
            await register(worker, Echo, agent_type, lambda: Echo([]))
    await register(workers[0], Echo, "single", lambda: Echo([]))
    assert await known() == {"echo", "other", "single"}
    await workers[0].unregister("echo")
    assert await known() == {"echo", "other", "single"}
    await workers[1].unregister("echo")
    assert await known() == {"other", "single"}
    await workers[0].stop()
    assert await known() == {"other"}
    await workers[0].start()
    assert await known() == {"other", "single"}
    for _ in range(5):  # whichever is the last
        await asyncio.gather(*(worker.stop() for worker in workers))
        assert await known() == set()
        await asyncio.gather(*(worker.start() for worker in workers))
        assert await known() == {"other", "single"}
    await asyncio.gather(*(worker.close() for worker in workers))
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:  # as in a deployment that stops all first
        for agent_type in ("echo", "other", "single"):
            with pytest.raises(NoLiveWorker):
                await caller.send_message("hi", AgentId(agent_type, "k"))
        info = await caller.running.connection.jetstream.stream_info(f"KV_{namespace}_natsrt_registry")
        assert info.state.messages < 28  # 8 of them are the reserve


async def test_a_runtime_reads_what_is_known_of_a_type_only_when_a_call_finds_no_worker(
    server: EmbeddedServer, namespace: str
) -> None:
    worker = NatsAgentRuntime(server.url, namespace=namespace)
    await register(worker, Echo, "echo", lambda: Echo([]))
    async with worker, AsyncExitStack() as stack:
        client = await nats.connect(server.url)
        stack.push_async_callback(client.close)
        bucket: KeyValue = await client.jetstream().key_value(f"{namespace}_natsrt_registry")
        ids = [f"team{number:04}" for number in range(1500)]
        writes = [bucket.put(f"r.known.{name}", encode_entry(KnownEntry(name, ("Text",)))) for name in ids]
        await asyncio.gather(*writes)
        caller = await stack.enter_async_context(NatsAgentRuntime(server.url, namespace=namespace))
        assert caller.running.connection.client.stats["in_msgs"] < 50
        for runtime in (worker, caller):
            assert len(runtime.running.registry.view.entries) < 10
        assert await caller.send_message("hi", AgentId("echo", "k")) == "hi"
        with pytest.raises(NoLiveWorker):
            await caller.send_message("hi", AgentId("team0700", "k"))
        with pytest.raises(UnknownAgentType) as raised:
            await caller.send_message("hi", AgentId("team", "k"))
        assert raised.value.known == sorted(["echo", *ids[:19]])
        await bucket.purge("r.known.team0700")
        await client.jetstream().purge_stream(f"KV_{namespace}_natsrt_registry", subject="$KV.*.r.known.team0700")
        with pytest.raises(UnknownAgentType):
            await caller.send_message("hi", AgentId("team0700", "k"))
        assert set(await caller.running.registry.known()) == {"echo", *ids} - {"team0700"}


async def test_a_worker_stores_again_what_another_one_withdrew_of_a_type_that_it_hosts(
    server: EmbeddedServer, namespace: str
) -> None:
    worker = NatsAgentRuntime(server.url, namespace=namespace)
    await register(worker, Echo, "echo", lambda: Echo([]))
    async with worker:
        client = await nats.connect(server.url)
        bucket: KeyValue = await client.jetstream().key_value(f"{namespace}_natsrt_registry")
        before = (await bucket.get("r.known.echo")).value
        await bucket.delete("r.known.echo")

        async def stored() -> bool:
            return "r.known.echo" in await keys(server, namespace)

        await eventually(stored)
        assert (await bucket.get("r.known.echo")).value == before
        await client.close()


async def test_runtimes_that_create_the_bucket_at_the_same_time_all_start(
    server: EmbeddedServer, namespace: str
) -> None:
    runtimes = [NatsAgentRuntime(server.url, namespace=namespace) for _ in range(8)]
    for number, runtime in enumerate(runtimes):
        await register(runtime, Echo, f"echo{number}", lambda: Echo([]))
    await asyncio.gather(*(runtime.start() for runtime in runtimes))
    for number, runtime in enumerate(runtimes):
        following = AgentId(f"echo{(number + 1) % len(runtimes)}", "k")
        assert await runtime.send_message("hi", following) == "hi"
    await asyncio.gather(*(runtime.close() for runtime in runtimes))


async def test_a_runtime_of_more_than_a_hundred_types_is_seen_whole(server: EmbeddedServer, namespace: str) -> None:
    worker = NatsAgentRuntime(server.url, namespace=namespace)
    for number in range(150):
        await register(worker, Echo, f"echo{number}", lambda: Echo([]))
        await worker.add_subscription(TypeSubscription(f"topic{number}", f"echo{number}"))
    early = NatsAgentRuntime(server.url, namespace=namespace)
    async with early, worker, NatsAgentRuntime(server.url, namespace=namespace) as late:
        for caller in (early, late):
            replies = await asyncio.gather(
                *(caller.send_message(str(number), AgentId(f"echo{number}", "k")) for number in range(150))
            )
            assert replies == [str(number) for number in range(150)]
        assert len([key for key in await keys(server, namespace) if key.startswith("r.type.")]) == 150
    assert not [key for key in await keys(server, namespace) if key.startswith("r.type.")]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["data kept", "data lost"])
async def test_after_a_server_restart_everything_is_registered_and_served_again(
    own_server: EmbeddedServer, namespace: str, data: str
) -> None:
    seen: list[int] = []
    worker = NatsAgentRuntime(own_server.url, namespace=namespace, name="worker")
    await register(worker, Echo, "echo", lambda: Echo(seen))
    adder = NatsAgentRuntime(own_server.url, namespace=namespace, name="adder")
    caller = NatsAgentRuntime(own_server.url, namespace=namespace, name="caller")

    async def entries() -> list[str]:  # the reserve is stored again later
        return sorted(key for key in await keys(own_server, namespace) if not key.startswith("reserve."))

    async with worker, adder, caller:
        await adder.add_subscription(TypeSubscription("news", "echo"))
        assert await caller.send_message("hi", AgentId("echo", "k")) == "hi"
        before = await entries()
        await own_server.kill()
        if data == "data lost":
            assert own_server.data_dir is not None
            shutil.rmtree(own_server.data_dir / "jetstream")
        await own_server.start()
        await eventually(lambda: worker.ready and adder.ready and caller.ready, 15, "all are ready again")

        async def complete() -> bool:
            return await entries() == before

        await eventually(complete, 10, "the registry is as it was")
        assert await caller.send_message("hi", AgentId("echo", "k")) == "hi"
        await caller.publish_message(News(1), TopicId("news", "s"))
        await eventually(lambda: seen == [1])
        await adder.add_subscription(TypeSubscription("more", "echo"))
        await caller.publish_message(News(2), TopicId("more", "s"))
        await eventually(lambda: seen == [1, 2])
        late = NatsAgentRuntime(own_server.url, namespace=namespace, name="late")
        await register(late, Echo, "late", lambda: Echo([]))
        async with late:
            assert await caller.send_message("hi", AgentId("late", "k")) == "hi"


@pytest.mark.slow
async def test_the_feed_is_silent_while_workers_are_idle(server: EmbeddedServer, namespace: str) -> None:
    async with AsyncExitStack() as stack:
        for number in range(12):
            worker = NatsAgentRuntime(server.url, namespace=namespace, name=f"idle{number}")
            await register(worker, Echo, f"echo{number % 3}", lambda: Echo([]))
            await stack.enter_async_context(worker)
        watcher = await stack.enter_async_context(NatsAgentRuntime(server.url, namespace=namespace))
        client = await nats.connect(server.url)
        stack.push_async_callback(client.close)
        fed: list[str] = []
        beats: list[str] = []

        async def on_change(message: Any) -> None:
            fed.append(message.subject)

        async def on_beat(message: Any) -> None:
            beats.append(message.subject)

        await client.subscribe(f"{namespace}.natsrt.registry.>", cb=on_change)
        await client.subscribe(f"$KV.{namespace}_natsrt_registry.hb.>", cb=on_beat)
        await settled(client)
        received = watcher.running.connection.client.stats["in_msgs"]
        await eventually(lambda: len(beats) >= 36, 20, "three heartbeats of each worker")
        assert fed == []
        # It looks after one worker at a time, however many there are.
        assert watcher.running.connection.client.stats["in_msgs"] - received < len(beats) / 2


async def test_a_change_of_a_kind_that_this_version_does_not_know_is_ignored(
    server: EmbeddedServer, namespace: str
) -> None:
    worker = NatsAgentRuntime(server.url, namespace=namespace)
    await register(worker, Echo, "echo", lambda: Echo([]))
    async with worker, NatsAgentRuntime(server.url, namespace=namespace) as caller:
        client = await nats.connect(server.url)
        bucket: KeyValue = await client.jetstream().key_value(f"{namespace}_natsrt_registry")
        await bucket.put("r.novelty.echo", b'{"from":"a newer version"}')
        async with asyncio.timeout(1):
            with pytest.raises(UnknownAgentType):  # proved by a view that contains the novelty
                await caller.send_message("hi", AgentId("unheard-of", "k"))
        assert await caller.send_message("hi", AgentId("echo", "k")) == "hi"
        async with NatsAgentRuntime(server.url, namespace=namespace) as late:
            with pytest.raises(UnknownAgentType):
                await late.send_message("hi", AgentId("unheard-of", "k"))
            assert await late.send_message("hi", AgentId("echo", "k")) == "hi"
        await client.close()


async def test_an_entry_that_lacks_a_field_is_named_with_the_field_and_breaks_no_other(
    server: EmbeddedServer, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    entry = b'{"worker_id":"other","name":"other","pid":7,"started":1,"version":"1"}'
    worker = NatsAgentRuntime(server.url, namespace=namespace)
    await register(worker, Echo, "echo", lambda: Echo([]))
    async with worker, NatsAgentRuntime(server.url, namespace=namespace) as caller:
        client = await nats.connect(server.url)
        bucket: KeyValue = await client.jetstream().key_value(f"{namespace}_natsrt_registry")
        revision = await bucket.put("r.worker.other", entry)
        await caller.running.registry._follower.shown(revision)
        text = "the registry entry 'r.worker.other': the field 'hostname' is missing"
        assert text in caplog.text
        caplog.clear()
        async with NatsAgentRuntime(server.url, namespace=namespace) as late:
            assert text in caplog.text
            for runtime in (caller, late):
                view = runtime.running.registry.view
                assert view.unreadable == {"r.worker.other": "the field 'hostname' is missing"}
                assert list(view.workers) == [worker.worker_id]
                assert await runtime.send_message("hi", AgentId("echo", "k")) == "hi"
            whole = entry.replace(b'"pid"', b'"hostname":"h","pid"')
            revision = await bucket.put("r.worker.other", whole)
            await late.running.registry._follower.shown(revision)
            assert late.running.registry.view.unreadable == {}
            assert "other" in late.running.registry.view.workers
        await client.close()


async def test_a_shared_subscription_that_cannot_be_read_is_replaced(server: EmbeddedServer, namespace: str) -> None:
    async with (
        NatsAgentRuntime(server.url, namespace=namespace) as adder,
        NatsAgentRuntime(server.url, namespace=namespace) as other,
    ):
        subscription = TypeSubscription("news", "echo")
        await adder.add_subscription(subscription)
        (key,) = [key for key in await keys(server, namespace) if key.startswith("r.subscription.")]
        client = await nats.connect(server.url)
        bucket: KeyValue = await client.jetstream().key_value(f"{namespace}_natsrt_registry")
        await bucket.put(key, b'{"agent_type":"echo"}')
        await other.add_subscription(TypeSubscription("news", "echo"))
        await eventually(lambda: [rule.pattern for rule in other.running.registry.view.rules("echo")] == ["news"])
        await client.close()
