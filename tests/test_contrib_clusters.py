"""Memories and caches in a cluster of three servers, whose leader is killed while they are used."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack

import pytest
from autogen_core.memory import MemoryContent

from benchmarks.chaos.cluster import Cluster
from natsrt import Options
from natsrt.contrib.cache import NatsCacheStore
from natsrt.contrib.memory import NatsMemory
from tests.support.processes import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

SETTINGS = {"namespace": "t", "registry_replicas": 3, "publish_timeout": 40.0, "offline_timeout": 40.0}


async def contents(memory: NatsMemory) -> list[str]:
    return [str(content.content) for content in (await memory.query()).results]


async def lose_the_leader(cluster: Cluster, stream: str) -> int:
    async def leaders() -> list[int]:
        leader = await cluster.leader_of(stream)
        return [] if leader is None else [leader]

    [leader] = await eventually(leaders, 20.0, f"a leader of {stream}")
    await cluster.kill(leader)
    return leader


async def test_a_memory_keeps_one_order_and_each_content_once_when_the_leader_is_killed() -> None:
    async with Cluster() as cluster, AsyncExitStack() as stack:
        options = Options(servers=cluster.urls, **SETTINGS)
        # The first use makes the stream of three copies, and each memory begins with another server.
        orders = [cluster.urls[number:] + cluster.urls[:number] for number in range(3)]
        members = [NatsMemory("s", urls, options=options) for urls in orders]
        for member in members:
            await stack.enter_async_context(member)

        async def add_all(number: int) -> None:
            for count in range(100):
                await members[number].add(MemoryContent(content=f"{number} {count}", mime_type="text/plain"))

        adding = [asyncio.create_task(add_all(number)) for number in range(3)]
        await eventually(lambda: len(members[0].memory.content) > 60, 30.0)  # type: ignore[attr-defined]
        leader = await lose_the_leader(cluster, "t_natsrt_memory_default")
        await asyncio.gather(*adding)
        first, second, third = [await contents(member) for member in members]
        assert first == second == third and len(first) == 300
        for number in range(3):
            assert [text for text in first if text.startswith(f"{number} ")] == [f"{number} {n}" for n in range(100)]
        await cluster.start(leader)
        await cluster.until_healthy()
        await members[0].clear()
        await members[1].add(MemoryContent(content="last", mime_type="text/plain"))
        late = await stack.enter_async_context(NatsMemory("s", cluster.urls[leader], options=options))
        assert [await contents(member) for member in (*members, late)] == [["last"]] * 4


async def test_a_cache_has_each_value_that_was_set_when_the_leader_is_killed() -> None:
    async with Cluster() as cluster:
        options = Options(servers=cluster.urls, **SETTINGS)
        with ExitStack() as stack:
            stores = [
                stack.enter_context(NatsCacheStore[int](cluster.urls[number:], options=options, timeout=40.0))
                for number in range(3)
            ]
            done = [0, 0, 0]

            def set_all(number: int) -> None:
                for count in range(150):
                    stores[number].set(f"{number} {count}", count)
                    assert stores[(number + 1) % 3].get(f"{number} {count}") == count  # another process gets it
                    done[number] = count

            setting = [asyncio.create_task(asyncio.to_thread(set_all, number)) for number in range(3)]
            await eventually(lambda: min(done) > 30, 30.0)
            await lose_the_leader(cluster, "KV_t_natsrt_cache_default")
            await asyncio.gather(*setting)

            def read_all(store: NatsCacheStore[int]) -> list[int | None]:
                return [store.get(f"{number} {count}") for number in range(3) for count in range(150)]

            for store in stores:
                assert await asyncio.to_thread(read_all, store) == [*range(150)] * 3
