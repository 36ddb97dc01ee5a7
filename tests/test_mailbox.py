"""The mailbox of a keyed agent under schedules chosen by chance: nothing here needs a server."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest

from natsrt.errors import Deadlock
from natsrt.keyed.mailbox import Mailbox


@dataclass
class Schedule:
    """Handlers that enter one mailbox in the order of their numbers, and what they did."""

    random: random.Random
    mailbox: Mailbox = field(default_factory=Mailbox)
    roots: int = 0
    """Handlers inside that do not belong to the chain of another one."""
    entered: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    async def pause(self) -> None:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)

    async def handle(self, number: int, depth: int, chain: tuple[str, ...] = ()) -> None:
        """Enter, and call the agent back up to ``depth`` times along the chain."""
        handler_id = f"h{number}.{depth}"
        if not self.mailbox.try_enter(handler_id, chain):
            assert not chain, "a handler of the chain is inside, so its message must not wait"
            try:
                await self.mailbox.wait(handler_id)
            except Deadlock:
                self.refused.append(number)
                return
            except asyncio.CancelledError:
                self.cancelled.append(number)
                raise
        try:
            if not chain:
                assert self.roots == 0, "two handlers at a time"
                self.roots += 1
                self.entered.append(number)
            await self.pause()
            if depth:
                await self.handle(number, depth - 1, (*chain, handler_id))
                await self.pause()
        finally:
            if not chain:
                self.roots -= 1
            self.mailbox.exit(handler_id)


@pytest.mark.parametrize("seed", range(200))
async def test_handlers_enter_one_at_a_time_and_in_order_whatever_is_refused_and_cancelled(seed: int) -> None:
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
            schedule.mailbox.refuse(f"h{number}.{depth}", Deadlock("t/k", ["t/k"]))
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError}
    assert schedule.entered == sorted(schedule.entered)
    ends = {*schedule.entered, *schedule.refused, *schedule.cancelled}
    never_began = {number for number, task in enumerate(tasks) if task.cancelled()} - ends
    assert ends | never_began == set(range(20))
    assert not set(schedule.entered) & {*schedule.refused, *schedule.cancelled}
    assert schedule.mailbox.inside == ()
    assert schedule.mailbox.try_enter("later"), "the mailbox must be free at the end"


async def test_a_handler_that_is_refused_or_cancelled_while_it_waits_does_not_enter() -> None:
    schedule = Schedule(random.Random(0))
    tasks = [asyncio.create_task(schedule.handle(number, 1)) for number in range(6)]
    await asyncio.sleep(0)
    schedule.mailbox.refuse("h3.1", Deadlock("t/k", ["t/k"]))
    tasks[4].cancel()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (schedule.entered, schedule.refused, schedule.cancelled) == ([0, 1, 2, 5], [3], [4])


async def test_a_handler_that_lets_others_in_still_lets_in_what_it_waits_for() -> None:
    mailbox = Mailbox()
    assert mailbox.try_enter("a")
    mailbox.let_others_in("a")
    assert mailbox.inside == ()
    assert mailbox.try_enter("b")
    assert not mailbox.try_enter("c", ("elsewhere",))
    assert mailbox.try_enter("d", ("elsewhere", "a"))
    assert mailbox.runs_any(("a",)) and mailbox.runs_any(("b",)) and not mailbox.runs_any(("c",))
    assert mailbox.count(("a", "b", "c")) == 2
    for handler_id in ("d", "a", "b"):
        mailbox.exit(handler_id)
    assert mailbox.count(("a", "b", "c", "d")) == 0
    assert mailbox.try_enter("c")


async def test_a_handler_that_is_cancelled_at_the_moment_it_enters_leaves_the_mailbox_to_the_next() -> None:
    mailbox = Mailbox()
    assert mailbox.try_enter("first")
    waiting = {name: asyncio.create_task(mailbox.wait(name)) for name in ("second", "third")}
    await asyncio.sleep(0)
    mailbox.exit("first")
    assert mailbox.inside == ("second",)
    waiting["second"].cancel()
    async with asyncio.timeout(5):
        await waiting["third"]
    assert waiting["second"].cancelled()
    assert mailbox.inside == ("third",)
