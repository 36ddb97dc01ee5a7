"""Equal subscriptions that several runtimes add for a type which they do not host: each of them counts."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, event
from nats.js.errors import NotFoundError

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import UnknownSubscription
from natsrt.jetstream.registry.entries import NOBODY, Rule, SubscriptionEntry
from tests.support.processes import eventually
from tests.support.reading_worker import News
from tests.test_registry import keys

NEWS = Rule("reader", "type", "news")
KEY = SubscriptionEntry("reader", "type", "news", NOBODY, "any").key


class Reader(RoutedAgent):
    def __init__(self, seen: list[int]) -> None:
        super().__init__("reads news")
        self._seen = seen

    @event
    async def on_news(self, message: News, ctx: MessageContext) -> None:
        self._seen.append(message.number)


class Place:
    """A worker that hosts the type, and runtimes that do not."""

    def __init__(self, server: EmbeddedServer, namespace: str, stack: AsyncExitStack) -> None:
        self.server, self.namespace, self._stack = server, namespace, stack
        self.seen: list[int] = []
        self.published = 0

    async def runtime(self, name: str = "other") -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.server.url, namespace=self.namespace, name=name)
        return await self._stack.enter_async_context(runtime)

    async def open(self) -> None:
        self.worker = await self.runtime("worker")
        await self.worker.register_factory("reader", lambda: Reader(self.seen), expected_class=Reader)

    async def in_force(self) -> bool:
        """Whether the worker gets the news."""
        self.published += 1
        await self.worker.publish_message(News(self.published), TopicId("news", "s"))
        await self.worker.running.wait_idle()
        return self.published in self.seen

    async def declared(self) -> list[str]:
        """The ids of the subscriptions in the stored entry."""
        return list((await self.value() or {}).get("declarations", {}).values())

    async def value(self) -> dict[str, Any] | None:
        """The stored entry; None if there is none."""
        client = await nats.connect(self.server.url)
        try:
            bucket = await client.jetstream().key_value(f"{self.namespace}_natsrt_registry")
            return dict(json.loads((await bucket.get(KEY)).value or b""))
        except NotFoundError:
            return None
        finally:
            await client.close()

    async def put(self, value: dict[str, Any] | None) -> None:
        """Store the entry as it is; None deletes it."""
        client = await nats.connect(self.server.url)
        bucket = await client.jetstream().key_value(f"{self.namespace}_natsrt_registry")
        await (bucket.delete(KEY) if value is None else bucket.put(KEY, json.dumps(value).encode()))
        await client.close()


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        place = Place(server, namespace, stack)
        await place.open()
        yield place


def news(subscription_id: str | None = None) -> TypeSubscription:
    return TypeSubscription("news", "reader", id=subscription_id)


OLD: dict[str, Any] = {
    "agent_type": "reader",
    "kind": "type",
    "pattern": "news",
    "declarer": "-",
    "subscription_id": "old",
}
"""The entry as a runtime stores it that knows nothing of the declarations of others."""


@pytest.mark.parametrize("number", [2, 3])
async def test_a_subscription_that_several_runtimes_added_ends_when_all_have_removed_it(
    place: Place, number: int
) -> None:
    runtimes = [await place.runtime(f"r{n}") for n in range(number)]
    for n, runtime in enumerate(runtimes):
        await runtime.add_subscription(news(f"id{n}"))
    for n, runtime in enumerate(runtimes):
        assert await place.in_force()
        await runtime.remove_subscription(f"id{n}")
    assert not await place.in_force()
    assert await place.value() is None


async def test_declarations_at_the_same_moment_all_count(place: Place) -> None:
    runtimes = [await place.runtime(f"r{n}") for n in range(8)]
    await asyncio.gather(*(runtime.add_subscription(news(f"id{n}")) for n, runtime in enumerate(runtimes)))
    assert sorted(await place.declared()) == [f"id{n}" for n in range(8)]
    changes = [runtime.remove_subscription(f"id{n}") for n, runtime in enumerate(runtimes[:7])]
    await asyncio.gather(*changes, (late := await place.runtime("late")).add_subscription(news("late")))
    assert await place.in_force()
    assert sorted(await place.declared()) == ["id7", "late"]
    await asyncio.gather(runtimes[7].remove_subscription("id7"), late.remove_subscription("late"))
    assert not await place.in_force()


async def test_a_third_runtime_removes_one_by_its_id_and_the_others_count(place: Place) -> None:
    first, second, third = [await place.runtime(f"r{n}") for n in range(3)]
    await first.add_subscription(news("one"))
    await second.add_subscription(news("two"))
    await third.remove_subscription("one")
    assert await place.in_force()
    await eventually(lambda: first._subscriptions.find("one") is None)  # its own record of it has ended as well
    with pytest.raises(UnknownSubscription):
        await third.remove_subscription("one")
    with pytest.raises(UnknownSubscription):
        await first.remove_subscription("one")
    await first.add_subscription(news("again"))
    await third.remove_subscription("two")
    assert await place.in_force()
    await first.remove_subscription("again")
    assert not await place.in_force()


async def test_runtimes_that_use_one_id_each_remove_their_own(place: Place) -> None:
    first, second, third = [await place.runtime(f"r{n}") for n in range(3)]
    for runtime in (first, second):
        await runtime.add_subscription(news("same"))
    await first.remove_subscription("same")
    assert await place.in_force()
    await first.add_subscription(news("same"))
    await third.remove_subscription("same")  # it added none: all with that id end
    assert not await place.in_force()


async def test_a_declaration_outlives_its_runtime_and_counts_on(place: Place) -> None:
    script, other = NatsAgentRuntime(place.server.url, namespace=place.namespace), await place.runtime()
    async with script:
        await script.add_subscription(news("of the script"))
    await other.add_subscription(news("of the other"))
    await other.remove_subscription("of the other")
    assert await place.in_force()
    await other.remove_subscription("of the script")
    assert not await place.in_force()


async def test_a_runtime_that_starts_again_counts_once(place: Place) -> None:
    runtime, other = NatsAgentRuntime(place.server.url, namespace=place.namespace, name="r"), await place.runtime()
    await runtime.add_subscription(news("one"))
    await other.add_subscription(news("two"))
    for _ in range(3):
        await runtime.start()
        await runtime.stop()
    await runtime.start()
    assert sorted(await place.declared()) == ["one", "two"]
    await runtime.remove_subscription("one")
    assert await place.declared() == ["two"]
    await runtime.add_subscription(news("three"))
    await runtime.stop()
    await runtime.remove_subscription("three")  # while it is stopped
    assert await place.in_force()
    await runtime.start()
    assert await place.declared() == ["two"]
    await runtime.close()
    await other.remove_subscription("two")
    assert not await place.in_force()


async def test_another_process_with_the_same_id_takes_the_place_of_one_that_is_gone(place: Place) -> None:
    for _ in range(2):
        async with NatsAgentRuntime(place.server.url, namespace=place.namespace) as runtime:
            await runtime.add_subscription(news("fixed"))
    assert await place.declared() == ["fixed"]
    # One that was killed left its declaration, and no heartbeat.
    value = await place.value()
    assert value is not None
    await place.put({**value, "declarations": {"killed-1": "fixed", "killed-2": "of another"}})
    runtime = await place.runtime()
    await runtime.add_subscription(news("fixed"))
    assert await place.declared() == ["of another", "fixed"]


async def test_declarations_that_were_left_behind_are_limited(place: Place) -> None:
    living = await place.runtime("living")
    await living.add_subscription(news("living"))
    for n in range(20):
        async with NatsAgentRuntime(place.server.url, namespace=place.namespace) as runtime:
            await runtime.add_subscription(news(f"id{n}"))
    assert await place.declared() == ["living", *(f"id{n}" for n in range(3, 20))]
    assert await place.in_force()


async def test_a_runtime_that_hosts_the_type_later_moves_its_own_declaration_only(place: Place) -> None:
    other, mover = await place.runtime("other"), await place.runtime("mover")
    await other.add_subscription(news("one"))
    await mover.add_subscription(news("two"))
    await mover.register_factory("reader", lambda: Reader(place.seen), expected_class=Reader)
    assert await place.declared() == ["one"]
    await mover.remove_subscription("two")
    assert await place.in_force()
    await mover.add_subscription(news("three"))
    await other.remove_subscription("one")
    assert await place.value() is None
    assert await place.in_force()
    await mover.unregister("reader", keep_subscriptions=True)  # now it is shared again
    assert await place.declared() == ["three"]
    await other.add_subscription(news("four"))
    await mover.remove_subscription("three")
    assert await place.in_force()
    await other.remove_subscription("four")
    assert not await place.in_force()


async def test_runtimes_that_know_nothing_of_declarations_are_understood(place: Place) -> None:
    runtime = await place.runtime()
    await place.put(OLD)
    await eventually(lambda: NEWS in place.worker.running.registry.view.rules("reader"))
    await runtime.add_subscription(news("new"))
    value = await place.value()
    assert value is not None
    assert {**value, "declarations": None} == {**OLD, "subscription_id": "new", "declarations": None}
    assert await place.declared() == ["old", "new"]
    await place.put(OLD)  # it stores its own again, without the others

    async def both() -> bool:
        return await place.declared() == ["old", "new"]

    await eventually(both, 10)
    await runtime.remove_subscription("new")
    assert await place.in_force()
    await runtime.remove_subscription("old")
    assert not await place.in_force()
    await runtime.add_subscription(news("new"))
    await place.put(None)  # it knows one way to remove it
    await eventually(lambda: runtime._subscriptions.find("new") is None)
    assert not await place.in_force()


async def test_a_runtime_that_declares_has_a_heartbeat_until_it_stops(place: Place) -> None:
    async with NatsAgentRuntime(place.server.url, namespace=place.namespace) as runtime:
        heartbeat = f"hb.{runtime.worker_id}"
        assert heartbeat not in await keys(place.server, place.namespace)
        await runtime.add_subscription(news())
        assert heartbeat in await keys(place.server, place.namespace)
    assert heartbeat not in await keys(place.server, place.namespace)
    assert place.worker.running.registry.view.workers.keys() == {place.worker.worker_id}


@pytest.mark.slow
@pytest.mark.parametrize("data", ["data kept", "data lost"])
async def test_every_declaration_is_there_again_after_a_server_restart(
    own_server: EmbeddedServer, namespace: str, data: str
) -> None:
    async with AsyncExitStack() as stack:
        place = Place(own_server, namespace, stack)
        await place.open()
        runtimes = [await place.runtime(f"r{n}") for n in range(3)]
        for n, runtime in enumerate(runtimes):
            await runtime.add_subscription(news(f"id{n}"))
        await own_server.kill()
        if data == "data lost":
            assert own_server.data_dir is not None
            shutil.rmtree(own_server.data_dir / "jetstream")
        await own_server.start()
        await eventually(lambda: all(r.ready for r in (place.worker, *runtimes)), 15, "all are ready again")
        assert sorted(await place.declared()) == ["id0", "id1", "id2"]
        for n, runtime in enumerate(runtimes):
            assert await place.in_force()
            await runtime.remove_subscription(f"id{n}")
        assert not await place.in_force()
        assert await place.worker.get(AgentId("reader", "s"))
