"""The mailbox of a keyed agent under schedules chosen by chance: nothing here needs a server."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from natsrt.agents.chain import Chain, Handler, as_call, current_chain, current_handler
from natsrt.errors import Deadlock
from natsrt.keyed.mailbox import Mailbox


def handler(name: str, mailbox: Mailbox) -> Handler:
    return Handler(name, asyncio.current_task(), mailbox)


@dataclass
class Schedule:
    """Handlers that enter one mailbox, what they do there, and whether each promise of the mailbox was kept."""

    random: random.Random
    mailbox: Mailbox = field(default_factory=Mailbox)
    running: int = 0
    """Handlers inside that do not await a call that came back."""
    numbers: Iterator[int] = field(default_factory=itertools.count)
    entered: list[int] = field(default_factory=list)
    """Messages that no handler waited for, in the order in which they entered."""
    refused: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    background: list[asyncio.Task[None]] = field(default_factory=list)

    async def pause(self) -> None:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)

    async def handle(self, number: int, depth: int, chain: Chain = ()) -> None:
        """Handle a message, whose handler makes calls that come back to the mailbox, nested ``depth`` times at most."""
        own = handler(f"h{number}" if not chain else f"c{next(self.numbers)}", self.mailbox)
        if not self.mailbox.try_enter(own, chain):
            try:
                await self.mailbox.wait(own, chain)
            except Deadlock:
                self.refused.append(number)
                return
            except asyncio.CancelledError:
                if not chain:
                    self.cancelled.append(number)
                raise
        try:
            if not chain:
                self.entered.append(number)
            await self._work(number, depth, chain, own)
        finally:
            self.mailbox.exit(own)

    async def _work(self, number: int, depth: int, chain: Chain, own: Handler) -> None:
        self.running += 1
        try:
            assert self.running == 1, "two handlers run at the same time"
            await self.pause()
            assert self.running == 1, "another handler has entered meanwhile"
            if depth:
                token, outer = current_handler.set(own), current_chain.set((*chain, own.handler_id))
                try:
                    await self._call_back(number, depth)
                finally:
                    current_handler.reset(token)
                    current_chain.reset(outer)
                await self.pause()
                assert self.running == 1
        finally:
            self.running -= 1

    async def _call_back(self, number: int, depth: int) -> None:
        way = self.random.randrange(4)
        if way == 0:  # a call that nobody awaits
            self.background.append(asyncio.create_task(self._call(number, depth)))
            return
        self.running -= 1  # from here on it only awaits its calls
        try:
            if way == 1:
                await self._call(number, depth)
            elif way == 2:
                await asyncio.gather(*(self._call(number, depth) for _ in range(3)))
            else:
                async with asyncio.TaskGroup() as group:
                    for _ in range(2):
                        group.create_task(self._call(number, depth))
        finally:
            self.running += 1

    async def _call(self, number: int, depth: int) -> None:
        async def call() -> None:
            await self.handle(number, depth - 1, current_chain.get())

        await as_call(call())


@pytest.mark.parametrize("seed", range(200))
async def test_one_handler_runs_at_a_time_and_in_order_whatever_is_called_refused_and_cancelled(seed: int) -> None:
    schedule = Schedule(random.Random(seed))
    tasks: list[asyncio.Task[None]] = []
    for number in range(20):
        depth = schedule.random.randrange(3)
        tasks.append(asyncio.create_task(schedule.handle(number, depth)))
        await schedule.pause()
        chosen = schedule.random.randrange(60)
        if chosen <= number:
            tasks[chosen].cancel()
        elif chosen >= 50:
            schedule.mailbox.refuse(f"h{number}", Deadlock("t/k", ["t/k"]))
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for task in schedule.background:  # they start more of them
            outcomes += await asyncio.gather(task, return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
    assert schedule.entered == sorted(schedule.entered)
    ends = {*schedule.entered, *schedule.refused, *schedule.cancelled}
    never_began = {number for number, task in enumerate(tasks) if task.cancelled()} - ends
    assert ends | never_began == set(range(20))
    assert not set(schedule.entered) & {*schedule.refused, *schedule.cancelled}
    assert schedule.mailbox.inside == ()
    assert schedule.mailbox.try_enter(handler("later", schedule.mailbox)), "the mailbox must be free at the end"


async def test_a_handler_that_is_refused_or_cancelled_while_it_waits_does_not_enter() -> None:
    schedule = Schedule(random.Random(0))
    tasks = [asyncio.create_task(schedule.handle(number, 1)) for number in range(6)]
    await asyncio.sleep(0)
    schedule.mailbox.refuse("h3", Deadlock("t/k", ["t/k"]))
    tasks[4].cancel()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (schedule.entered, schedule.refused, schedule.cancelled) == ([0, 1, 2, 5], [3], [4])


async def test_a_handler_that_lets_others_in_still_lets_in_what_it_waits_for() -> None:
    mailbox = Mailbox()
    a, b, c, d = (handler(name, mailbox) for name in "abcd")
    assert mailbox.try_enter(a)
    mailbox.let_others_in(a)
    assert mailbox.inside == ()
    assert mailbox.try_enter(b)
    assert not mailbox.try_enter(c, ("elsewhere",))
    assert mailbox.try_enter(d, ("elsewhere", "a"))
    assert mailbox.runs_any(("a",)) and mailbox.runs_any(("b",)) and not mailbox.runs_any(("c",))
    assert mailbox.count(("a", "b", "c")) == 2
    for one in (d, a, b):
        mailbox.exit(one)
    assert mailbox.count(("a", "b", "c", "d")) == 0
    assert mailbox.try_enter(c)


async def test_a_handler_that_is_cancelled_at_the_moment_it_enters_leaves_the_mailbox_to_the_next() -> None:
    mailbox = Mailbox()
    first = handler("first", mailbox)
    assert mailbox.try_enter(first)
    waiting = {name: asyncio.create_task(mailbox.wait(handler(name, mailbox))) for name in ("second", "third")}
    await asyncio.sleep(0)
    mailbox.exit(first)
    assert mailbox.inside == ("second",)
    waiting["second"].cancel()
    async with asyncio.timeout(5):
        await waiting["third"]
    assert waiting["second"].cancelled()
    assert mailbox.inside == ("third",)


class Stack:
    """A mailbox with three handlers, of which the first one is inside."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()
        self.outer, self.inner, self.late = (handler(name, self.mailbox) for name in ("outer", "inner", "late"))
        assert self.mailbox.try_enter(self.outer)
        self.handled = asyncio.Event()
        self.chain: Chain = ()
        """The chain of the call that `call` makes."""

    async def call(self) -> None:
        """Make a call for the first handler, and await it."""

        async def call() -> None:
            self.chain = (self.outer.handler_id, *current_chain.get())
            await self.handled.wait()

        await self.outer.call(call())


async def test_a_message_enters_when_the_handler_begins_to_await_its_call() -> None:
    stack = Stack()
    mailbox = stack.mailbox
    called = asyncio.create_task(stack.call())
    await asyncio.sleep(0)
    assert not mailbox.try_enter(stack.inner, stack.chain), "nobody awaits its call"
    waiting = asyncio.create_task(mailbox.wait(stack.inner, stack.chain))
    await asyncio.sleep(0.1)
    assert mailbox.inside == ("outer",)
    assert mailbox.keep_out("inner") == [stack.outer]

    async def ends() -> None:
        await waiting
        assert mailbox.inside == ("outer", "inner")
        mailbox.exit(stack.inner)
        stack.handled.set()

    ending = asyncio.create_task(ends())
    async with asyncio.timeout(5):
        await called  # this task is the handler's
        await ending
    assert mailbox.inside == ("outer",)


async def test_of_two_messages_that_a_handler_begins_to_await_the_one_that_came_first_enters_first() -> None:
    stack = Stack()
    mailbox = stack.mailbox
    called = asyncio.create_task(stack.call())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(mailbox.wait(stack.inner, stack.chain))
    await asyncio.sleep(0)
    assert mailbox.inside == ("outer",)

    async def comes_later() -> None:
        assert not mailbox.try_enter(stack.late, stack.chain)
        assert mailbox.inside == ("outer", "inner")
        await waiting
        mailbox.exit(stack.inner)
        stack.handled.set()

    later = asyncio.create_task(comes_later())
    async with asyncio.timeout(5):
        await called  # this task is the handler's
    await later


async def test_the_handlers_above_one_are_those_that_entered_after_it() -> None:
    stack = Stack()
    mailbox = stack.mailbox
    assert mailbox.try_enter(stack.inner, ("outer",))
    assert list(mailbox.above(stack.outer)) == [stack.inner]
    assert list(mailbox.above(stack.inner)) == list(mailbox.above(stack.late)) == []


async def test_a_chain_that_names_no_call_counts_as_awaited_by_the_last_handler_only() -> None:
    stack = Stack()
    mailbox = stack.mailbox
    assert mailbox.try_enter(stack.inner, ("outer",))
    assert not mailbox.try_enter(stack.late, ("outer",)), "the handler above it does not wait for this message"
    waiting = asyncio.create_task(mailbox.wait(stack.late, ("outer",)))
    await asyncio.sleep(0)
    assert mailbox.keep_out("late") == [stack.inner]
    assert mailbox.keep_out("nobody") == ()
    mailbox.exit(stack.inner)
    await waiting
    assert mailbox.inside == ("outer", "late")


@pytest.mark.parametrize("how", ["returns", "raises", "is cancelled"])
async def test_a_handler_goes_on_after_a_call_when_it_is_the_last_one_again(how: str) -> None:
    stack = Stack()
    mailbox = stack.mailbox

    async def call() -> None:
        assert mailbox.try_enter(stack.inner, ("outer", *current_chain.get()))
        if how == "raises":
            raise LookupError
        if how == "is cancelled":
            raise asyncio.CancelledError

    async def handle() -> None:
        stack.outer.task = asyncio.current_task()
        await stack.outer.call(call())

    handling = asyncio.create_task(handle())
    await asyncio.wait([handling], timeout=0.05)
    assert handling.done() is (how == "is cancelled")
    assert stack.outer.resuming == (how != "is cancelled")
    assert list(mailbox.above(stack.outer)) == [stack.inner]
    mailbox.exit(stack.inner)
    async with asyncio.timeout(5):
        outcome = (await asyncio.gather(handling, return_exceptions=True))[0]
    assert type(outcome) is {"returns": type(None), "raises": LookupError}.get(how, asyncio.CancelledError)
    assert not stack.outer.resuming and mailbox.is_last(stack.outer)
    mailbox.exit(stack.outer)
    assert mailbox.is_last(stack.outer) and not mailbox.above(stack.outer)
