"""The registry is purged, deleted or replaced under running workers: it is complete again by itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import nats
import pytest
from autogen_core import AgentId, TopicId, TypeSubscription
from nats.aio.client import Client
from nats.js import JetStreamContext, api
from nats.js.errors import NotFoundError

from natsrt import NatsAgentRuntime, register
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.registry.entries import WorkerEntry, encode_entry
from natsrt.jetstream.registry.origin import ORIGIN
from natsrt.jetstream.registry.store import Last
from tests.support.processes import eventually
from tests.support.reading_worker import News
from tests.test_registry import Echo

SOON = 15.0
"""Seconds within which it must be healed, on a slow machine. In fact it takes some heartbeats of 0.3 s."""


@dataclass
class Scene:
    """A worker with a type, an instance and subscriptions, another worker, and a runtime that subscribed for a type."""

    url: str
    namespace: str
    client: Client
    stack: AsyncExitStack
    seen: list[int] = field(default_factory=list)

    @property
    def js(self) -> JetStreamContext:
        return self.client.jetstream()

    @property
    def bucket(self) -> str:
        return f"{self.namespace}_natsrt_registry"

    @property
    def stream(self) -> str:
        return f"KV_{self.bucket}"

    async def purge(self, pattern: str) -> None:
        await self.js.purge_stream(self.stream, subject=f"$KV.{self.bucket}.{pattern}")

    def runtime(self, name: str) -> NatsAgentRuntime:
        return NatsAgentRuntime(
            self.url, namespace=self.namespace, name=name, heartbeat_interval=0.3, heartbeat_ttl=1.0
        )

    async def start(self) -> None:
        self.worker, self.other, self.caller = map(self.runtime, ("worker", "other", "caller"))
        for runtime in (self.worker, self.other, self.caller):
            await self.stack.enter_async_context(runtime)
        await register(self.worker, Echo, "plain", lambda: Echo(self.seen))
        await self.worker.add_subscription(TypeSubscription("news", "plain"))
        await self.worker.register_agent_instance(Echo(self.seen), AgentId("single", "one"))
        await register(self.other, Echo, "second", lambda: Echo(self.seen))
        await self.caller.add_subscription(TypeSubscription("shared", "second"))

    async def keys(self) -> set[str]:
        """The keys of the entries that are stored, without heartbeats; none while there is no bucket."""
        try:
            info = await self.js.stream_info(self.stream, subjects_filter=f"$KV.{self.bucket}.r.>")
        except NotFoundError:
            return set()
        return {subject.removeprefix(f"$KV.{self.bucket}.") for subject in info.state.subjects or {}}

    async def is_whole_for_others(self, wanted: set[str]) -> bool:
        """Whether the entries are stored, everybody is in step, and a runtime that starts now sees all of them."""
        if not wanted <= await self.keys():
            return False
        if not all(runtime.ready for runtime in (self.worker, self.other, self.caller)):
            return False
        async with self.runtime("late") as late:
            view = late.running.registry.view
            return {"plain", "single", "second"} <= view.hosts.keys() and len(view.workers) == 2


@pytest.fixture
async def scene(server: EmbeddedServer, namespace: str) -> AsyncIterator[Scene]:
    client = await nats.connect(server.url)
    async with AsyncExitStack() as stack:
        scene = Scene(server.url, namespace, client, stack)
        await scene.start()
        yield scene
    await client.close()


async def delete_bucket(scene: Scene) -> None:
    await scene.js.delete_stream(scene.stream)


async def replace_bucket(scene: Scene) -> None:
    """As an operator does who copies its configuration: the revisions begin at 1."""
    config = (await scene.js.stream_info(scene.stream)).config
    await scene.js.delete_stream(scene.stream)
    await scene.js.add_stream(config.evolve(first_seq=None))


async def restore_old_copy(scene: Scene) -> None:
    """Only the worker's entry is left, at a lower revision."""
    info = await scene.js.stream_info(scene.stream)
    key = f"$KV.{scene.bucket}.r.worker.{scene.worker.running.worker_id}"
    entry = await scene.js.get_last_msg(scene.stream, key, direct=True)
    await scene.js.delete_stream(scene.stream)
    await scene.js.add_stream(info.config.evolve(first_seq=1))
    await scene.js.publish(key, entry.data or b"")


def purge(pattern: str) -> Callable[[Scene], Awaitable[None]]:
    async def loss(scene: Scene) -> None:
        await scene.purge(pattern)

    return loss


async def delete_type(scene: Scene) -> None:
    """As `nats kv del` does: it leaves a mark."""
    key = f"$KV.{scene.bucket}.r.type.plain.{scene.worker.running.worker_id}"
    await scene.js.publish(key, b"", headers={"KV-Operation": "DEL"})


LOSSES: dict[str, Callable[[Scene], Awaitable[None]]] = {
    "everything purged": purge(">"),
    "entries purged": purge("r.>"),
    "workers purged": purge("r.worker.>"),
    "types purged": purge("r.type.>"),
    "instances purged": purge("r.instance.>"),
    "subscriptions purged": purge("r.subscription.>"),
    "known types purged": purge("r.known.>"),
    "one type deleted": delete_type,
    "bucket deleted": delete_bucket,
    "bucket replaced": replace_bucket,
    "old copy restored": restore_old_copy,
}


@pytest.mark.parametrize("loss", LOSSES)
async def test_what_vanished_is_stored_again(scene: Scene, loss: str) -> None:
    wanted = await scene.keys()
    await LOSSES[loss](scene)
    await eventually(lambda: scene.is_whole_for_others(wanted), timeout=SOON)
    for runtime in (scene.worker, scene.other, scene.caller):
        assert runtime.health().workers == 2
    assert await scene.caller.send_message("x", AgentId("plain", "a")) == "x"
    assert await scene.caller.send_message("y", AgentId("single", "one")) == "y"
    for topic in ("news", "shared"):
        await scene.other.publish_message(News(1), TopicId(topic, "s"))
    await eventually(lambda: scene.seen == [1, 1])


async def test_no_event_is_lost_while_the_registry_is_purged_again_and_again(scene: Scene) -> None:
    count = 300

    async def publish() -> None:
        for number in range(count):
            await scene.caller.publish_message(News(number), TopicId("news", "s"))
            await asyncio.sleep(0.005)

    publishing = asyncio.ensure_future(publish())
    wanted = await scene.keys()
    while not publishing.done():
        await scene.purge(">")
        await eventually(lambda: has_all(scene, wanted), timeout=SOON)
    await publishing
    await eventually(lambda: scene.seen == list(range(count)))


async def has_all(scene: Scene, wanted: set[str]) -> bool:
    return wanted <= await scene.keys()


async def test_health_says_that_the_bucket_in_its_place_is_not_natsrts(scene: Scene) -> None:
    await scene.js.delete_stream(scene.stream)
    wrong = api.StreamConfig(name=scene.stream, subjects=[f"$KV.{scene.bucket}.>"], allow_direct=True)
    try:
        await scene.js.add_stream(wrong)
    except Exception:  # a worker was faster
        await scene.js.delete_stream(scene.stream)
        await scene.js.add_stream(wrong)
    said = "republish is absent and must be $KV."
    await eventually(lambda: said in " ".join(scene.worker.health().reasons), timeout=SOON)
    assert not scene.worker.health().in_step and not scene.worker.ready
    await scene.js.delete_stream(scene.stream)
    await eventually(lambda: scene.worker.ready and scene.worker.health().workers == 2, timeout=SOON)
    assert scene.worker.health().reasons == ()


async def test_a_subscription_that_another_runtime_removed_is_not_stored_again(scene: Scene) -> None:
    """Its deletion leaves a mark, which a look finds as well."""
    shared = [entry for entry in scene.caller.running.registry.view.subscriptions() if entry.is_shared]
    await scene.other.remove_subscription(shared[0].subscription_id)
    integrity = scene.caller.running.registry._integrity
    await integrity.look()
    # a look that reads the mark before the feed has told of the deletion
    declared = scene.caller.running.registry._declared
    assert not declared._has_vanished(shared[0], 1, Last(2, deleted=True))
    assert declared._has_vanished(shared[0], 1, None)
    assert not any(entry.is_shared for entry in scene.other.running.registry.view.subscriptions())


async def test_one_that_has_not_noticed_that_the_bucket_was_replaced_is_not_taken_for_another_registry(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    origin = scene.worker.running.registry._store.origin
    wanted = await scene.keys()
    await scene.js.delete_stream(scene.stream)
    await eventually(lambda: scene.is_whole_for_others(wanted), timeout=SOON)
    key = f"$KV.{scene.bucket}.r.worker.late-1"
    entry = WorkerEntry("late-1", "late", "host", 1, 1.0, "0")
    await scene.js.publish(key, encode_entry(entry), headers={ORIGIN: str(origin)})
    await asyncio.gather(*(runtime.running.registry.catch_up() for runtime in (scene.worker, scene.other)))
    await scene.js.publish(key, encode_entry(entry))
    await eventually(lambda: "late-1" in scene.caller.running.registry.view.workers)
    assert scene.worker.ready and scene.worker.health().foreign_registry is None
    assert "two registries" not in caplog.text


async def test_looks_write_nothing_while_all_is_there(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "natsrt.registry")
    before = scene.worker.running.registry.view.applied
    for runtime in (scene.worker, scene.other, scene.caller):
        await runtime.running.registry._integrity.look()
        assert runtime.running.registry.view.applied == before
    assert "vanished" not in caplog.text


async def test_a_bucket_that_is_made_again_has_higher_revisions_also_where_the_clock_was_set_back(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = scene.worker.running.registry.view.applied
    monkeypatch.setattr("natsrt.jetstream.registry.store.time.time_ns", lambda: 1_000_000)
    wanted = await scene.keys()
    await scene.js.delete_stream(scene.stream)
    await eventually(lambda: scene.is_whole_for_others(wanted), timeout=SOON)
    assert (await scene.js.stream_info(scene.stream)).state.last_seq > before


async def test_a_bucket_that_the_server_does_not_know_a_moment_after_making_it_is_made_again(
    own_server: EmbeddedServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a cluster, where the server that is asked may not have heard of the bucket yet."""
    make, made = JetStreamContext.create_key_value, list[str]()

    async def make_and_lose(js: JetStreamContext, config: api.KeyValueConfig) -> object:
        store = await make(js, config)
        made.append(config.bucket)
        if len(made) == 1:
            await js.delete_stream(f"KV_{config.bucket}")
        return store

    monkeypatch.setattr(JetStreamContext, "create_key_value", make_and_lose)
    async with NatsAgentRuntime(own_server.url, namespace=namespace) as runtime:
        assert runtime.health().ready
    assert made == [f"{namespace}_natsrt_registry"] * 2
