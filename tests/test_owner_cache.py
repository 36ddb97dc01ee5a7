"""The cache of owners, without a server: in which order messages are sent, and which of them ask for the owner."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Collection
from typing import Any

import pytest
from autogen_core import AgentId

from natsrt.agents.chain import current_chain
from natsrt.errors import NoLiveWorker
from natsrt.sending import owner_cache
from natsrt.sending.owner_cache import CachedOwner, OwnerCache
from natsrt.wire.peer_messages import Location
from natsrt.wire.subjects import Subjects
from tests.support.processes import eventually

AGENT = AgentId("counter", "one")
LEASE = 10.0


class Clock:
    """The running event loop's clock, which a test can put forward."""

    def __init__(self) -> None:
        loop: Any = asyncio.get_running_loop()
        time = loop.time
        self._ahead = 0.0
        loop.time = lambda: time() + self._ahead

    def advance(self, seconds: float) -> None:
        self._ahead += seconds


class Workers:
    """Stands for the registry and for the locator: which workers are there, and what they answer."""

    def __init__(self) -> None:
        self.owner = "w1"
        self.lease = LEASE
        self.there = {"w1", "w2"}
        self.questions: list[tuple[AgentId, set[str]]] = []
        self.failure: Exception | None = None
        self.open = asyncio.Event()
        """Questions are answered while this is set."""
        self.open.set()

    def is_keyed(self, agent_type: str) -> bool:
        return agent_type == "counter"

    def stays(self, worker_id: str) -> bool:
        return worker_id in self.there

    async def locate(self, agent: AgentId, handlers: Collection[str] | None = None) -> Location:
        self.questions.append((agent, set(handlers or ())))
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        return Location(self.owner, self.lease)


class Sends:
    """Sends messages to agents as calls do, and notes the order in which they were sent."""

    def __init__(self, cache: OwnerCache) -> None:
        self._cache = cache
        self.sent: list[Any] = []

    def owner(self, agent: AgentId = AGENT) -> CachedOwner:
        owner = self._cache.owner_of(agent)
        assert owner is not None
        return owner

    def start(self, name: Any, agent: AgentId = AGENT) -> asyncio.Task[None]:
        """Send a message in a task."""
        return asyncio.ensure_future(self._send(name, self.owner(agent)))

    async def _send(self, name: Any, owner: CachedOwner) -> None:
        if not owner.may_send():
            await owner.wait(owner.join())
        self.sent.append(name)


def cache_of(workers: Any) -> OwnerCache:
    return OwnerCache(Subjects("test"), workers, workers)


@pytest.fixture
async def clock() -> Clock:
    return Clock()


@pytest.fixture
async def workers() -> Workers:
    return Workers()


@pytest.fixture
async def sends(workers: Workers) -> Sends:
    return Sends(cache_of(workers))


async def settle() -> None:
    """Let every task run until all of them wait."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_type_that_is_not_keyed_has_no_owners(workers: Workers) -> None:
    assert cache_of(workers).owner_of(AgentId("plain", "one")) is None


async def test_messages_for_one_agent_wait_for_one_question_and_are_sent_in_order(
    sends: Sends, workers: Workers
) -> None:
    workers.open.clear()
    tasks = [sends.start(number) for number in range(5)]
    await settle()
    assert sends.sent == []
    workers.open.set()
    await asyncio.gather(*tasks)
    assert sends.sent == [0, 1, 2, 3, 4]
    assert [agent for agent, _ in workers.questions] == [AGENT]
    assert sends.owner().subject == Subjects("test").instance("counter", "one")


async def test_messages_for_other_agents_do_not_wait(sends: Sends, workers: Workers) -> None:
    other = AgentId("counter", "two")
    await sends.start("first", other)
    workers.open.clear()
    waiting = sends.start("waits")
    await sends.start("goes", other)
    assert sends.sent == ["first", "goes"]
    workers.open.set()
    await waiting


async def test_a_message_after_the_answer_is_sent_without_a_question_but_behind_those_that_wait(
    sends: Sends, workers: Workers
) -> None:
    tasks = [sends.start(0), sends.start(1)]
    while not sends.sent:
        tasks.append(sends.start(len(tasks)))
        await asyncio.sleep(0)
    tasks.append(sends.start(len(tasks)))  # the owner is known, and messages still wait
    await asyncio.gather(*tasks)
    assert sends.sent == list(range(len(tasks)))
    assert sends.owner().may_send()
    assert len(workers.questions) == 1


async def test_each_message_extends_the_lease_which_then_ends(sends: Sends, workers: Workers, clock: Clock) -> None:
    await sends.start("asks")
    for _ in range(3):
        clock.advance(LEASE - 1)
        assert sends.owner().may_send()
    clock.advance(LEASE + 1)
    assert not sends.owner().may_send()
    await sends.start("asks again")
    assert len(workers.questions) == 2


async def test_an_answer_without_a_lease_lets_each_message_ask(sends: Sends, workers: Workers) -> None:
    workers.lease = 0.0
    await asyncio.gather(*(sends.start(number) for number in range(4)))
    assert sends.sent == [0, 1, 2, 3]
    assert len(workers.questions) == 4


async def test_all_that_wait_get_the_error_of_the_locator_and_the_next_message_asks_again(
    sends: Sends, workers: Workers
) -> None:
    workers.failure = NoLiveWorker(str(AGENT), AGENT.type)
    results = await asyncio.gather(*(sends.start(number) for number in range(3)), return_exceptions=True)
    assert results == [workers.failure] * 3
    assert sends.sent == [] and sends.owner().unused
    workers.failure = None
    await sends.start("again")
    assert sends.sent == ["again"]
    assert len(workers.questions) == 2


async def test_the_error_of_the_locator_reaches_only_those_that_wait(sends: Sends, workers: Workers) -> None:
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
    workers.failure = NoLiveWorker(str(AGENT), AGENT.type)
    with pytest.raises(NoLiveWorker):
        await sends.start("first")
    await asyncio.sleep(0)
    gc.collect()
    assert unseen == []


async def test_an_owner_that_does_not_listen_is_asked_for_again(sends: Sends, workers: Workers) -> None:
    await sends.start("first")
    sends.owner().lost()
    assert not sends.owner().may_send()
    await sends.start("second")
    assert sends.sent == ["first", "second"]
    assert len(workers.questions) == 2


async def test_a_lost_worker_owns_none_of_its_agents_until_an_answer_names_it_again(
    sends: Sends, workers: Workers
) -> None:
    other = AgentId("counter", "two")
    await sends.start("one")
    await sends.start("two", other)
    sends.owner().owner_lost()
    assert not sends.owner(other).may_send()
    await sends.start("three", other)  # the answer names w1 again: it lives
    assert sends.owner(other).may_send()
    assert len(workers.questions) == 3


async def test_an_owner_that_leaves_the_registry_is_not_an_owner(sends: Sends, workers: Workers) -> None:
    await sends.start("one")
    workers.there.discard("w1")
    assert not sends.owner().may_send()
    workers.owner = "w2"
    await sends.start("two")
    assert sends.owner().may_send()


async def test_what_is_cancelled_while_it_waits_holds_up_nobody(sends: Sends, workers: Workers) -> None:
    workers.open.clear()
    tasks = [sends.start(number) for number in range(4)]
    await settle()
    tasks[0].cancel()
    tasks[2].cancel()
    workers.open.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [
        asyncio.CancelledError,
        type(None),
        asyncio.CancelledError,
        type(None),
    ]
    assert sends.sent == [1, 3]


async def test_what_is_cancelled_when_its_turn_has_just_come_holds_up_nobody(sends: Sends) -> None:
    owner = sends.owner()
    turns = [owner.join(), owner.join()]
    first = asyncio.ensure_future(owner.wait(turns[0]))
    turns[0].add_done_callback(lambda _: first.cancel())
    await asyncio.wait_for(owner.wait(turns[1]), 5)
    assert first.cancelled() and turns[0].done() and not turns[0].cancelled()
    assert owner.may_send()


async def test_a_turn_that_its_cancellation_token_cancels_is_left_out(sends: Sends, workers: Workers) -> None:
    workers.open.clear()
    owner = sends.owner()
    cancelled, other = owner.join(), sends.start("other")
    await settle()
    cancelled.cancel()
    workers.open.set()
    with pytest.raises(asyncio.CancelledError):
        await owner.wait(cancelled)
    await other
    assert sends.sent == ["other"] and owner.may_send()


async def test_the_question_is_asked_again_with_the_handlers_that_joined_meanwhile(
    sends: Sends, workers: Workers, clock: Clock
) -> None:
    workers.open.clear()
    marks = [("h1",), ("h1", "h2")]
    tasks = []
    for ids in marks:
        mark = current_chain.set(ids)
        tasks.append(sends.start(ids))  # the task keeps the chain of this moment
        current_chain.reset(mark)
        await settle()
    assert [ids for _, ids in workers.questions] == [{"h1"}]
    clock.advance(1.0)
    async with asyncio.timeout(5):
        while len(workers.questions) < 2:
            await asyncio.sleep(0)
    assert workers.questions[1][1] == {"h1", "h2"}
    workers.open.set()
    await asyncio.gather(*tasks)
    assert sends.sent == marks


async def test_the_next_question_does_not_name_the_handlers_of_a_cancelled_message(
    sends: Sends, workers: Workers, clock: Clock
) -> None:
    workers.open.clear()
    mark = current_chain.set(("h1",))
    cancelled = sends.start("cancelled")
    current_chain.reset(mark)
    await settle()
    cancelled.cancel()
    mark = current_chain.set(("h2",))
    other = sends.start("other")
    current_chain.reset(mark)
    clock.advance(1.0)
    async with asyncio.timeout(5):
        while len(workers.questions) < 2:
            await asyncio.sleep(0)
    assert [ids for _, ids in workers.questions] == [{"h1"}, {"h2"}]
    workers.open.set()
    await other


async def test_owners_that_are_not_in_use_are_removed_when_there_are_many(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner_cache, "_MANY_OWNERS", 4)
    sends = Sends(cache_of(workers))
    kept = sends.owner()
    await sends.start("kept")
    workers.open.clear()
    waited_for = AgentId("counter", "waited for")
    waiting, awaited = sends.start("waiting", waited_for), sends.owner(waited_for)
    await settle()
    unused = [sends.owner(AgentId("counter", str(number))) for number in range(2)]
    assert sends.owner(unused[0].recipient) is unused[0]  # there are not many yet
    sends.owner(AgentId("counter", "one more"))
    workers.open.set()
    await waiting
    assert sends.owner() is kept and sends.owner(waited_for) is awaited
    assert all(sends.owner(owner.recipient) is not owner for owner in unused)


@pytest.mark.parametrize("seed", range(200))
async def test_in_every_schedule_messages_are_sent_in_order_and_none_is_forgotten(
    seed: int, sends: Sends, workers: Workers, clock: Clock
) -> None:
    """Random sends, cancellations, failures, lost owners and ends of leases, with random pauses between them."""
    rng = random.Random(seed)
    tasks: list[asyncio.Task[None]] = []
    for _ in range(rng.randrange(20, 120)):
        what = rng.random()
        if what < 0.5:
            tasks.append(sends.start(len(tasks)))
        elif what < 0.6 and tasks:
            rng.choice(tasks).cancel()
        elif what < 0.65:
            workers.failure = None if workers.failure else NoLiveWorker(str(AGENT), AGENT.type)
        elif what < 0.7:
            workers.lease = rng.choice([0.0, LEASE])
        elif what < 0.75:
            sends.owner().lost()
        elif what < 0.8:
            sends.owner().owner_lost()
        elif what < 0.85:
            workers.there.symmetric_difference_update({workers.owner})
        elif what < 0.9:
            clock.advance(rng.choice([1.0, LEASE]))
        else:
            (workers.open.clear if rng.random() < 0.5 else workers.open.set)()
        for _ in range(rng.choice([0, 0, 1, 2, 5])):
            await asyncio.sleep(0)
    workers.open.set()
    async with asyncio.timeout(10):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sends.sent == sorted(sends.sent)
    assert sends.sent == [number for number, result in enumerate(results) if result is None]
    assert all(isinstance(r, NoLiveWorker | asyncio.CancelledError) for r in results if r is not None)
    workers.failure, workers.there = None, {"w1", "w2"}
    await asyncio.wait_for(sends.start("last"), 10)  # the turn is free


async def test_an_answer_counts_although_handlers_have_joined_since_the_question(
    sends: Sends, workers: Workers
) -> None:
    """A worker far away answers later than the next handler joins."""

    def joins(handler: str) -> asyncio.Task[None]:
        mark = current_chain.set((handler,))
        try:
            return sends.start(handler)
        finally:
            current_chain.reset(mark)

    answers: list[asyncio.Future[Location]] = []

    async def locate(agent: AgentId, handlers: Collection[str] | None = None) -> Location:
        workers.questions.append((agent, set(handlers or ())))
        answers.append(asyncio.get_running_loop().create_future())
        return await answers[-1]

    workers.locate = locate  # type: ignore[method-assign]
    tasks = [joins("h0")]
    await eventually(lambda: len(answers) == 1)
    tasks.append(joins("h1"))
    await eventually(lambda: len(answers) == 2)
    tasks.append(joins("h2"))
    answers[0].set_result(Location(workers.owner, LEASE))  # the last question waits still
    await asyncio.gather(*tasks)
    assert sends.sent == ["h0", "h1", "h2"]
    assert [handlers for _, handlers in workers.questions[:2]] == [{"h0"}, {"h0", "h1"}]


async def test_only_the_error_of_the_last_question_counts(sends: Sends, workers: Workers) -> None:
    answers: list[asyncio.Future[Location]] = []

    async def locate(agent: AgentId, handlers: Collection[str] | None = None) -> Location:
        answers.append(asyncio.get_running_loop().create_future())
        return await answers[-1]

    workers.locate = locate  # type: ignore[method-assign]
    first = sends.start("first")
    await eventually(lambda: len(answers) == 1)
    mark = current_chain.set(("h1",))
    second = sends.start("second")
    current_chain.reset(mark)
    await eventually(lambda: len(answers) == 2)
    answers[0].set_exception(NoLiveWorker(str(AGENT), AGENT.type))
    await settle()
    assert not first.done() and not second.done()
    answers[1].set_result(Location(workers.owner, LEASE))
    await asyncio.gather(first, second)
    assert sends.sent == ["first", "second"]
