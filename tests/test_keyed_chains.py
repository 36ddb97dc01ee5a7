"""Keyed agents whose handlers make calls that come back to them: in other tasks, at once, in the background.

However a handler waits for its calls, one handler of an agent runs at a time, no change is lost, and no call hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer

ENDS_WITHIN = 45
"""Seconds; without an answer it would be for ever."""


@dataclass
class Add:
    """Add 1, with a pause between reading and writing."""


@dataclass
class CallBack:
    """Let the agent that sends this add 1."""


@dataclass
class Begin:
    """Make three calls that come back, in one of `WAYS`, directly or over other agents."""

    way: str
    over: str = ""


@dataclass
class Look:
    """Ask for what was `Seen`."""


@dataclass
class Seen:
    """The number of additions, and how many handlers were running at once at most."""

    additions: int
    most: int


Send = Callable[[int], Awaitable[Any]]
"""Makes the call with this number."""


async def one_by_one(send: Send) -> None:
    for number in range(3):
        await send(number)


async def gathered(send: Send) -> None:
    await asyncio.gather(*(send(number) for number in range(3)))


async def in_a_group(send: Send) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(_task(send, number))


async def as_they_end(send: Send) -> None:
    for ended in asyncio.as_completed([send(number) for number in range(3)]):
        await ended


async def first_of_all(send: Send) -> None:
    waiting: set[asyncio.Future[Any]] = {asyncio.ensure_future(send(number)) for number in range(3)}
    while waiting:
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


async def with_a_limit(send: Send) -> None:
    await asyncio.wait_for(asyncio.gather(*(send(number) for number in range(3))), ENDS_WITHIN)


async def shielded(send: Send) -> None:
    await asyncio.shield(asyncio.ensure_future(gathered(send)))


async def begun_first_and_awaited_later(send: Send) -> None:
    tasks = [asyncio.create_task(_task(send, number)) for number in range(3)]
    await asyncio.sleep(0.1)
    for task in reversed(tasks):
        await task


async def in_threads(send: Send) -> None:
    loop = asyncio.get_running_loop()

    def call(number: int) -> None:
        asyncio.run_coroutine_threadsafe(_task(send, number), loop).result()

    await asyncio.gather(*(asyncio.to_thread(call, number) for number in range(3)))


async def some_in_the_background(send: Send) -> None:
    background.extend(asyncio.create_task(_task(send, number)) for number in range(2))
    await send(2)


async def all_in_the_background(send: Send) -> None:
    background.extend(asyncio.create_task(_task(send, number)) for number in range(3))
    await asyncio.sleep(0.2)


background: list[asyncio.Task[Any]] = []

WAYS: dict[str, Callable[[Send], Awaitable[None]]] = {
    way.__name__: way
    for way in (
        one_by_one,
        gathered,
        in_a_group,
        as_they_end,
        first_of_all,
        with_a_limit,
        shielded,
        begun_first_and_awaited_later,
        in_threads,
        some_in_the_background,
        all_in_the_background,
    )
}
WAIT_FOR_ONE = {"as_they_end", "first_of_all"}


async def _task(send: Send, number: int) -> Any:
    return await send(number)


@natsrt.keyed
class Account(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("an account")
        self.n = self.running = self.most = 0

    def _enter(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)

    @message_handler
    async def add(self, message: Add, ctx: MessageContext) -> None:
        self._enter()
        n = self.n
        await asyncio.sleep(0.05)
        self.n = n + 1
        self.running -= 1

    @message_handler
    async def begin(self, message: Begin, ctx: MessageContext) -> None:
        self._enter()
        is_waiting = message.way != "all_in_the_background"
        if is_waiting:
            self.running -= 1

        async def send(number: int) -> None:
            other = AgentId(message.over, str(number)) if message.over else self.id
            await self.send_message(CallBack() if message.over else Add(), other)

        await WAYS[message.way](send)
        if is_waiting:
            self._enter()
        n = self.n
        await asyncio.sleep(0.05)
        self.n = n + 1
        self.running -= 1

    @message_handler
    async def look(self, message: Look, ctx: MessageContext) -> Seen:
        return Seen(self.n, self.most)

    async def save_state(self) -> Mapping[str, Any]:
        return {"n": self.n}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.n = state["n"]


class Other(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("calls back")

    @message_handler
    async def call_back(self, message: CallBack, ctx: MessageContext) -> None:
        assert ctx.sender is not None
        await self.send_message(Add(), ctx.sender)


@dataclass
class Meet:
    """Call another agent, of a handler that has begun as this one has."""

    way: str
    other: str


class Meeting(RoutedAgent):
    """Agents that call one another when both of them are busy."""

    both: dict[str, asyncio.Event]

    def __init__(self, both: dict[str, asyncio.Event]) -> None:
        super().__init__("meets")
        self.both = both

    @message_handler
    async def meet(self, message: Meet, ctx: MessageContext) -> str:
        self.both[str(self.id)].set()
        await self.both[message.other].wait()

        async def send(number: int) -> None:
            await self.send_message(Add(), AgentId.from_str(message.other))

        try:
            await WAYS[message.way](send)
        except ExceptionGroup as group:  # of a task group
            raise group.exceptions[0] from None
        return "done"

    @message_handler
    async def add(self, message: Add, ctx: MessageContext) -> None:
        pass


class Town:
    """Two workers, one of which has the other agents, and a caller."""

    def __init__(self, url: str, namespace: str, stack: AsyncExitStack) -> None:
        self.url, self.namespace, self.stack = url, namespace, stack

    async def runtime(self, **factories: Callable[[], RoutedAgent]) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.url, namespace=self.namespace)
        for agent_type, factory in factories.items():
            cls = type(factory())
            keyed = True if agent_type.startswith("keyed") else None
            await runtime.register_factory(agent_type, factory, expected_class=cls, keyed=keyed)
        return await self.stack.enter_async_context(runtime)


@pytest.fixture
async def town(server: EmbeddedServer, namespace: str) -> AsyncIterator[Town]:
    background.clear()
    async with AsyncExitStack() as stack:
        yield Town(server.url, namespace, stack)
        await asyncio.gather(*background, return_exceptions=True)


@pytest.mark.parametrize("over", ["", "other", "keyed_other"], ids=["to itself", "over agents", "over keyed agents"])
@pytest.mark.parametrize("way", WAYS)
async def test_one_handler_runs_at_a_time_however_calls_come_back(town: Town, way: str, over: str) -> None:
    await town.runtime(account=Account)
    await town.runtime(other=Other, keyed_other=Other)
    caller = await town.runtime()
    account = AgentId("account", "a")
    async with asyncio.timeout(ENDS_WITHIN):
        await caller.send_message(Begin(way, over), account)
        await asyncio.gather(*background)
        assert await caller.send_message(Look(), account) == Seen(4, 1)


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"some_in_the_background", "all_in_the_background"} - WAIT_FOR_ONE))
async def test_agents_that_wait_for_one_another_over_tasks_end(town: Town, way: str) -> None:
    """One of the calls is refused, and the handler that made it fails with the error."""
    both: dict[str, asyncio.Event] = {"keyed_one/1": asyncio.Event(), "keyed_two/2": asyncio.Event()}
    await town.runtime(keyed_one=lambda: Meeting(both))
    await town.runtime(keyed_two=lambda: Meeting(both))
    caller = await town.runtime()
    calls = [
        caller.send_message(Meet(way, "keyed_two/2"), AgentId("keyed_one", "1")),
        caller.send_message(Meet("one_by_one", "keyed_one/1"), AgentId("keyed_two", "2")),
    ]
    async with asyncio.timeout(ENDS_WITHIN):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    failed = [outcome for outcome in outcomes if outcome != "done"]
    assert len(failed) == 1
    assert isinstance(failed[0], natsrt.Deadlock)
