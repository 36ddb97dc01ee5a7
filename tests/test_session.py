"""One life of a runtime: whatever fails while it starts or stops, nothing of it goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from autogen_core import AgentId

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.session import Session
from tests.support.calls import known, running
from tests.test_keyed import Add, Counting, Life

PARTS = 27


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, moment: str) -> None:
    """Let the part with this number raise when it is started, or after it was stopped."""
    parts = Session._parts

    def broken(session: Session) -> Any:
        listed = list(parts(session))
        assert len(listed) == PARTS
        start, stop = listed[number]

        async def fail() -> None:
            if moment == "stop":
                await stop()
            raise RuntimeError("a part failed")

        listed[number] = (fail, stop) if moment == "start" else (start, fail)
        return tuple(listed)

    monkeypatch.setattr(Session, "_parts", broken)


async def left_over(before: set[asyncio.Task[Any]]) -> set[str]:
    """The tasks that a runtime left behind."""
    await asyncio.sleep(0)
    return {task.get_coro().__qualname__ for task in asyncio.all_tasks() - before}  # type: ignore[union-attr]


async def worker(server: EmbeddedServer, namespace: str) -> NatsAgentRuntime:
    runtime = NatsAgentRuntime(server.url, namespace=namespace, name="w")
    await runtime.register_factory("counting", lambda: Counting(Life(), "w"), expected_class=Counting)
    return runtime


@pytest.mark.parametrize("number", range(PARTS))
async def test_a_part_that_fails_to_stop_keeps_no_other_from_being_stopped(
    server: EmbeddedServer, namespace: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fail_at(monkeypatch, number, "stop")
    before = asyncio.all_tasks()
    runtime = await worker(server, namespace)
    await runtime.start()
    assert (await runtime.send_message(Add(2), AgentId("counting", "k"))).value == 2
    connection = runtime.running.connection
    with pytest.raises(RuntimeError, match="a part failed"):
        await runtime.stop()
    assert not connection.connected
    assert runtime.health().reasons == ("It was stopped.",)
    assert await left_over(before) == set()


@pytest.mark.parametrize("number", range(PARTS))
async def test_a_start_that_fails_anywhere_leaves_nothing_behind(
    server: EmbeddedServer, namespace: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = asyncio.all_tasks()
    runtime = await worker(server, namespace)
    with monkeypatch.context() as patch:
        fail_at(patch, number, "start")
        with pytest.raises(RuntimeError, match="a part failed"):
            await runtime.start()
    assert runtime.worker_id is None
    assert await left_over(before) == set()
    async with running(server.url, namespace) as other:
        assert other.running.registry.view.workers == {}
        await runtime.start()  # the next life is not touched by it
        await known(other, "counting")
        assert (await other.send_message(Add(2), AgentId("counting", "k"))).value == 2
        await runtime.stop()
