"""A handler runs in a task of its own: what asyncio offers to a task works in it."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, message_handler, type_subscription

from tests.conformance.conftest import World
from tests.conformance.samples import Number, Text
from tests.support.processes import eventually

KEPT: ContextVar[str] = ContextVar("kept", default="nothing")


class Behaves(RoutedAgent):
    """Does one of the things that need a task."""

    def __init__(self) -> None:
        super().__init__("behaves")
        self.got: list[Any] = []

    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        return await getattr(self, message.content)()

    async def time_out(self) -> Text:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            return Text("timed out")
        return Text("not timed out")

    async def let_time_out(self) -> Text:
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()
        return Text("not timed out")

    async def group(self) -> Text:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(asyncio.sleep(0, n)) for n in range(5)]
        return Text(str(sum(task.result() for task in tasks)))

    async def failing_group(self) -> Text:
        async def fail() -> None:
            raise ValueError("one of the group")

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.Event().wait())
                group.create_task(fail())
        except ExceptionGroup as errors:
            return Text(str(errors.exceptions[0]))
        return Text("no failure")

    async def wait_for(self) -> Text:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        return Text("waited")

    async def context(self) -> Text:
        before = KEPT.get()
        KEPT.set("leaked")
        await asyncio.sleep(0)
        return Text(f"{before}, {KEPT.get()}")


@pytest.mark.parametrize(
    ("what", "result"),
    [
        ("time_out", "timed out"),
        ("group", "10"),
        ("failing_group", "one of the group"),
        ("wait_for", "waited"),
        ("context", "nothing, leaked"),
    ],
)
async def test_a_handler_may_use_what_needs_a_task(world: World, what: str, result: str) -> None:
    await Behaves.register(world.host, "behaves", Behaves)
    for _ in range(3):
        assert await world.caller.send_message(Text(what), AgentId("behaves", "k")) == Text(result)


async def test_a_handlers_own_timeout_ends_that_handler_only(world: World) -> None:
    await Behaves.register(world.host, "behaves", Behaves)
    results = await asyncio.gather(
        *(world.caller.send_message(Text("let_time_out"), AgentId("behaves", "k")) for _ in range(5)),
        *(world.caller.send_message(Text("group"), AgentId("behaves", "k")) for _ in range(5)),
        return_exceptions=True,
    )
    assert all(isinstance(result, TimeoutError) for result in results[:5])
    assert results[5:] == [Text("10")] * 5


@type_subscription("news")
class Tasks(RoutedAgent):
    """Keeps the tasks and context variables of its handlers."""

    def __init__(self, tasks: list[Any], kept: list[str]) -> None:
        super().__init__("keeps its tasks")
        self.tasks = tasks
        self.kept = kept

    @message_handler
    async def on_number(self, message: Number, ctx: MessageContext) -> None:
        self.tasks.append(asyncio.current_task())
        self.kept.append(KEPT.get())
        KEPT.set(f"leaked {message.value}")
        if message.value % 2:
            await asyncio.sleep(0)


async def test_every_handler_has_a_task_and_context_of_its_own(world: World) -> None:
    tasks: list[Any] = []
    kept: list[str] = []
    await Tasks.register(world.host, "first", lambda: Tasks(tasks, kept))
    await Tasks.register(world.host, "second", lambda: Tasks(tasks, kept))
    for n in range(10):
        await world.caller.publish_message(Number(n), TopicId("news", "k"))
        await world.caller.send_message(Number(n), AgentId("first", "k"))
    await world.idle()
    assert len(tasks) == len(set(tasks)) == 30
    assert None not in tasks
    assert set(kept) == {"nothing"}
    assert KEPT.get() == "nothing"


async def test_handlers_of_one_agent_run_at_the_same_time(world: World) -> None:
    class Meets(RoutedAgent):
        def __init__(self) -> None:
            super().__init__("meets")
            self.barrier = asyncio.Barrier(3)

        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            await self.barrier.wait()
            return message

    await Meets.register(world.host, "meets", Meets)
    calls = [world.caller.send_message(Text(str(n)), AgentId("meets", "k")) for n in range(3)]
    assert await asyncio.wait_for(asyncio.gather(*calls), 5) == [Text(str(n)) for n in range(3)]


async def test_a_task_that_a_handler_leaves_behind_lives_on(world: World) -> None:
    done: list[str] = []
    release = asyncio.Event()

    class Leaves(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            async def work() -> None:
                await release.wait()
                done.append(message.content)

            self.task = asyncio.create_task(work())
            return message

    await Leaves.register(world.host, "leaves", lambda: Leaves("leaves"))
    await world.caller.send_message(Text("a"), AgentId("leaves", "k"))
    assert done == []
    release.set()
    await eventually(lambda: done == ["a"])
