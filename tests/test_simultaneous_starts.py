"""Workers that start at the same moment: none waits for the end of another one's start, and no event is missed."""

from __future__ import annotations

import asyncio
import logging
import textwrap
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    default_subscription,
    event,
    rpc,
)

import natsrt
from natsrt import NatsAgentRuntime, register
from natsrt.embedded import EmbeddedServer
from natsrt.session import Session
from tests.support.processes import Processes, eventually
from tests.support.reading_worker import News

PATIENCE = 60.0
"""Seconds for which these workers wait for one another. A test that waits for it fails."""
BOUND = 30.0
"""Seconds that all starts of a test may take together."""

Make = Callable[[str], NatsAgentRuntime]


@default_subscription
class Reader(RoutedAgent):
    def __init__(self, seen: Counter[int]) -> None:
        super().__init__("reads news")
        self._seen = seen

    @event
    async def on_news(self, message: News, ctx: MessageContext) -> None:
        self._seen[message.number] += 1

    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        return message


@natsrt.keyed
@default_subscription
class KeyedReader(Reader):
    pass


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        def runtime(name: str) -> NatsAgentRuntime:
            made = NatsAgentRuntime(server.url, namespace=namespace, name=name, subscription_timeout=PATIENCE)
            stack.push_async_callback(made.close)
            return made

        yield runtime


async def add(runtime: NatsAgentRuntime, seen: Counter[int], name: str = "reader", cls: type[Reader] = Reader) -> None:
    await register(runtime, cls, name, lambda: cls(seen))


async def published_by_each(runtimes: list[NatsAgentRuntime], *types: str, seen: Counter[int]) -> None:
    """Every event that these runtimes publish now arrives once for each agent type."""
    for number, runtime in enumerate(runtimes):
        await runtime.publish_message(News(number), TopicId("default", f"from-{number}"))
    wanted = {number: len(types) for number in range(len(runtimes))}
    await eventually(lambda: sum(seen.values()) >= sum(wanted.values()), message=f"events arrive: {seen}")
    for runtime in runtimes:
        await runtime.running.wait_idle()
    assert seen == wanted


@pytest.mark.parametrize("cls", [Reader, KeyedReader])
@pytest.mark.parametrize("count", [2, 4, 8])
async def test_workers_of_one_type_do_not_wait_for_the_end_of_one_anothers_start(
    make: Make, count: int, cls: type[Reader], caplog: pytest.LogCaptureFixture
) -> None:
    seen: Counter[int] = Counter()
    runtimes = [make(f"w{number}") for number in range(count)]
    for runtime in runtimes:
        await add(runtime, seen, cls=cls)
    with caplog.at_level(logging.WARNING, "natsrt"):
        async with asyncio.timeout(BOUND):
            await asyncio.gather(*(runtime.start() for runtime in runtimes))
    assert caplog.messages == []
    await published_by_each(runtimes, "reader", seen=seen)


async def test_an_event_right_after_a_start_reaches_every_type_that_is_served_by_then(make: Make) -> None:
    """Each publishes as soon as its own start has returned, while others may still be starting."""
    seen: Counter[int] = Counter()
    runtimes = [make(f"w{number}") for number in range(6)]
    for runtime in runtimes:
        await add(runtime, seen)

    async def start(number: int, runtime: NatsAgentRuntime) -> None:
        await runtime.start()
        await runtime.publish_message(News(number), TopicId("default", f"s{number}"))

    async with asyncio.timeout(BOUND):
        await asyncio.gather(*map(start, range(6), runtimes))
    await eventually(lambda: len(seen) == 6, message=f"each event arrives: {seen}")
    for runtime in runtimes:
        await runtime.running.wait_idle()
    assert set(seen.values()) == {1}


async def test_workers_of_several_types_in_different_orders(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    seen: Counter[int] = Counter()
    names = ["a", "b", "c"]
    runtimes = [make(f"w{number}") for number in range(4)]
    for number, runtime in enumerate(runtimes):
        for name in names if number % 2 else reversed(names):
            await add(runtime, seen, name, KeyedReader if name == "b" else Reader)
    async with asyncio.timeout(BOUND):
        await asyncio.gather(*(runtime.start() for runtime in runtimes))
    assert [line for line in caplog.messages if "confirm" in line] == []
    await published_by_each(runtimes, *names, seen=seen)


async def test_types_that_are_registered_after_the_start_at_the_same_moment(make: Make) -> None:
    seen: Counter[int] = Counter()
    runtimes = [make(f"w{number}") for number in range(4)]
    await asyncio.gather(*(runtime.start() for runtime in runtimes[:2]))
    for runtime in runtimes[2:]:
        await add(runtime, seen)
    async with asyncio.timeout(BOUND):  # two start with the type, two register it meanwhile
        await asyncio.gather(*(add(r, seen) for r in runtimes[:2]), *(r.start() for r in runtimes[2:]))
    await published_by_each(runtimes, "reader", seen=seen)


async def test_subscriptions_that_are_added_while_the_workers_start(make: Make) -> None:
    """By a runtime that starts too, and by one that has started."""
    seen: Counter[int] = Counter()
    workers, starting, started = [make("w0"), make("w1")], make("starting"), make("started")
    for worker in workers:
        await add(worker, seen)
    await starting.add_subscription(TypeSubscription("early", "reader"))
    await started.start()
    async with asyncio.timeout(BOUND):
        await asyncio.gather(
            *(worker.start() for worker in workers),
            starting.start(),
            started.add_subscription(TypeSubscription("late", "reader")),
        )
    await starting.publish_message(News(1), TopicId("early", "s"))
    await started.publish_message(News(2), TopicId("late", "s"))
    await eventually(lambda: seen == {1: 1, 2: 1}, message=f"both arrive: {seen}")


async def test_a_start_that_fails_keeps_no_other_waiting(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked while it is half started: it has joined the registry, and does not serve yet."""
    seen: Counter[int] = Counter()
    good, bad = make("good"), make("bad")
    for runtime in (good, bad):
        await add(runtime, seen)
    go_on = asyncio.Event()
    parts = Session._parts

    def held(session: Session) -> object:
        listed = list(parts(session))
        if session.name == "bad":
            place = next(at for at, part in enumerate(listed) if part[0] == session.incoming.subscriptions.start)

            async def fail() -> None:
                await go_on.wait()
                raise RuntimeError("a part failed")

            listed.insert(place, (fail, _nothing))
        return tuple(listed)

    monkeypatch.setattr(Session, "_parts", held)
    starting_bad = asyncio.ensure_future(bad.start())
    await eventually(lambda: bad._session is not None and bad._session.registry.view.workers)
    starting_good = asyncio.ensure_future(good.start())
    answering = bad.running.incoming.peer_answers._tasks
    await eventually(lambda: len(answering) == 1, message="the good one asks the bad one")
    assert not starting_good.done()
    go_on.set()
    async with asyncio.timeout(BOUND):
        with pytest.raises(RuntimeError, match="a part failed"):
            await starting_bad
        await starting_good
    assert [line for line in caplog.messages if "confirm" in line] == []
    await good.publish_message(News(1), TopicId("default", "s"))
    await eventually(lambda: seen == {1: 1})


async def _nothing() -> None:
    pass


async def test_a_worker_that_serves_while_its_start_goes_on_answers(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one asks again later: when a subscription is added."""
    seen: Counter[int] = Counter()
    slow, other = make("slow"), make("other")
    for runtime in (slow, other):
        await add(runtime, seen)
    go_on = asyncio.Event()
    parts = Session._parts

    def held(session: Session) -> object:
        listed = list(parts(session))
        if session.name == "slow":
            listed.append((_wait_for(go_on), _nothing))
        return tuple(listed)

    monkeypatch.setattr(Session, "_parts", held)
    starting = asyncio.ensure_future(slow.start())
    async with asyncio.timeout(BOUND):
        await other.start()
        await eventually(lambda: len(other.running.registry.view.workers) == 2)
        await other.add_subscription(TypeSubscription("more", "reader"))
        await other.remove_subscription((await _subscription(other, "more")).id)
        assert not starting.done()
        go_on.set()
        await starting
    assert await slow.send_message("x", AgentId("reader", "a")) == "x"


def _wait_for(go_on: asyncio.Event) -> Callable[[], object]:
    async def wait() -> None:
        await go_on.wait()

    return wait


async def _subscription(runtime: NatsAgentRuntime, topic: str) -> TypeSubscription:
    found = [one for one in runtime._subscriptions if isinstance(one, TypeSubscription) and one.topic_type == topic]
    return found[0]


APP = textwrap.dedent(
    """
    from dataclasses import dataclass
    from autogen_core import MessageContext, RoutedAgent, default_subscription, event, rpc

    @dataclass
    class Note:
        text: str

    @default_subscription
    class Reader(RoutedAgent):
        def __init__(self) -> None:
            super().__init__("reads")

        @event
        async def on_note(self, message: Note, ctx: MessageContext) -> None:
            print("note", message.text, flush=True)

        @rpc
        async def on_text(self, message: str, ctx: MessageContext) -> str:
            return message
    """
)


@pytest.mark.parametrize("count", [2, 4])
async def test_processes_of_one_supervisor_start_without_a_warning(
    server: EmbeddedServer, namespace: str, processes: Processes, tmp_path: Path, make: Make, count: int
) -> None:
    (tmp_path / "notes.py").write_text(APP)
    where = ("--server", server.url, "--namespace", namespace)
    worker = processes.natsrt(
        "worker", "notes:Reader", "--type", "reader", "--processes", str(count), *where, cwd=tmp_path
    )
    caller = make("caller")
    await caller.start()
    await eventually(lambda: len(caller.running.registry.view.workers_hosting("reader")) == count, 30.0)
    await caller.wait_for("reader", timeout=30)
    assert await caller.send_message("x", AgentId("reader", "a")) == "x"
    worker.terminate()
    await worker.wait(30)
    assert "confirm" not in worker.stderr


async def test_a_process_that_is_killed_while_others_start(
    server: EmbeddedServer, namespace: str, processes: Processes, tmp_path: Path, make: Make
) -> None:
    (tmp_path / "notes.py").write_text(APP)
    where = ("--server", server.url, "--namespace", namespace)
    dying = processes.natsrt("worker", "notes:Reader", "--type", "reader", *where, cwd=tmp_path)
    watcher = make("watcher")
    await watcher.start()
    await eventually(lambda: watcher.running.registry.view.workers, 30.0)
    seen: Counter[int] = Counter()
    others = [make("w0"), make("w1")]
    for other in others:
        await add(other, seen)
    starting = [asyncio.ensure_future(other.start()) for other in others]
    dying.kill()
    async with asyncio.timeout(BOUND):
        await asyncio.gather(*starting)
    await published_by_each(others, "reader", seen=seen)
