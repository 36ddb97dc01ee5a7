"""Random schedules of keyed agents: workers die, freeze, leave and join, links stall and are cut, JetStream fails.

Callers have counters of two keys count numbered increments. They also deliver the events of a stream to them, each
until it is confirmed, and many of them again. After each schedule, every increment whose call returned is in the state
exactly once; one whose call raised a typed error, and one that was published, is there at most once. Who asks a counter
hears of every increment that was acknowledged before. The events of the stream are there once, in order.
Every call ends, and raises nothing but natsrt's errors. No two writes of a record follow the same revision. Everything
but the network and the buckets is natsrt's own: see `tests.support.keyed_world`.

The same seed gives the same schedule as long as ``PYTHONHASHSEED`` is the same; the command sets it to 0.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import click

from natsrt.errors import NatsrtError
from natsrt.hosting.call_log import CallLog
from natsrt.hosting.withdrawn import WithdrawnCalls
from natsrt.jetstream import state_parts
from natsrt.keyed.slots import AgentSlot
from natsrt.transport import stall_watch
from tests.support.exploring import explore, explores
from tests.support.keyed_world import Member, World
from tests.support.virtual_time import Processes

happened: logging.Logger = logging.getLogger("schedule")

KEYS = ("a", "b")
CHAOS = 12.0
"""Seconds in which bad things happen."""
WITHIN = 60.0
"""Seconds after that in which every call ends."""
LATER = 15.0
"""Seconds after which the state is looked at once more."""
PAUSES = (0.05, 0.3, 1.0, 2.0, 4.0)
LONG = 11.0
"""Seconds after which a worker that is frozen has been replaced, and requests to JetStream have failed."""
FAULTS = ("fence", "promises", "copies", "sequences")
"""What can be taken out: the bucket's check of revisions, the workers' promises not to handle lost copies of calls, the
copies that a record names, and the sequences of events that it has."""


@dataclass
class Sent:
    """The increments that were sent, by number."""

    calls: dict[str, tuple[str, asyncio.Future[str]]] = field(default_factory=dict)
    """The key and the call of each."""
    events: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    questions: list[tuple[str, set[str], asyncio.Future[str]]] = field(default_factory=list)
    """The key of each question for what was counted, what was acknowledged before it, and the call."""
    confirmed: dict[str, int] = field(default_factory=dict)
    """By key: the last sequence of the stream that was confirmed."""

    def acknowledged(self, key: str) -> set[str]:
        """The increments of a key whose calls have returned."""
        return {
            n for n, (its_key, call) in self.calls.items() if its_key == key and call.done() and not call.exception()
        }

    @property
    def waits(self) -> list[asyncio.Future[Any]]:
        calls = (call for _, call in self.calls.values())
        return [*calls, *self.events.values(), *(call for _, _, call in self.questions)]


class Chaos:
    """What happens to one world."""

    def __init__(self, world: World, rng: random.Random, *, stalls: float, purges: bool) -> None:
        """``stalls`` is the part of stalled links among what happens, beside those by chance.

        ``purges``: records vanish, and nothing else goes wrong. A worker that has the agent and keeps it stores the
        record again, unless a claim that was delayed comes first.
        """
        self._world = world
        self._rng = rng
        self._started = 0
        self._kinds: list[Callable[[], Awaitable[None]]] = [
            self._join, self._kill, self._leave, self._freeze, self._freeze, self._cut, self._stall, self._stall,
            self._lose, self._disturb_jetstream, self._disturb_jetstream,
        ]  # fmt: skip
        if purges:
            self._kinds = [self._join, self._purge, self._purge]
        self._stalls = 0.0 if purges else stalls

    async def start(self, *, hosts: bool) -> Member:
        """Start a runtime. A start that fails because JetStream does is repeated."""
        while True:
            self._started += 1
            with suppress(NatsrtError):
                member = await self._world.start(f"{'w' if hosts else 'c'}{self._started}", hosts=hosts)
                break
        member.takes = lambda: self._rng.choice([0.0, 0.0, 0.0, 0.05, 0.3, 1.5])
        return member

    async def happen(self) -> None:
        """Do something bad for some seconds."""
        kind = self._stall if self._rng.random() < self._stalls else self._rng.choice(self._kinds)
        happened.info("%.3f: %s", self._world.processes.now, kind.__name__)
        await kind()

    def _one(self, members: list[Member]) -> Member | None:
        return self._rng.choice(members) if members else None

    def _any(self) -> Member | None:
        there = self._world.there(hosts=True)
        return self._one(there if self._rng.random() < 0.7 else self._world.there(hosts=False))

    async def _join(self) -> None:
        if len(self._world.there(hosts=True)) < 4:
            await self.start(hosts=True)

    async def _kill(self) -> None:
        if member := self._one(self._world.there(hosts=True)):
            member.kill()
            await asyncio.sleep(self._rng.choice([0.0, 0.0, *PAUSES]))  # its machine, not only its process
            member.link.forget()
            await self._replace()

    async def _leave(self) -> None:
        if member := self._one(self._world.there(hosts=True)):
            await asyncio.wait([asyncio.ensure_future(member.leave()), asyncio.ensure_future(self._replace())])

    async def _replace(self) -> None:
        await asyncio.sleep(self._rng.choice([0.0, *PAUSES]))
        if self._rng.random() < 0.8 or not self._world.there(hosts=True):
            await self._join()

    async def _freeze(self) -> None:
        if member := self._any():
            member.process.freeze()
            await asyncio.sleep(self._rng.choice([*PAUSES, LONG]))
            member.process.thaw()

    async def _cut(self) -> None:
        member = self._any()
        if member is not None and member.link.up:
            member.link.lose()
            await asyncio.sleep(self._rng.choice([*PAUSES, LONG]))
            if member.is_there:
                member.link.come_back()

    async def _stall(self) -> None:
        """Let what is sent wait on its way. Mostly the connection is replaced, and what waits arrives later."""
        member = self._any()
        if member is not None and member.link.up:
            thaw = member.link.stall(arrivals=self._rng.random() < 0.5)
            await asyncio.sleep(self._rng.choice(PAUSES))
            if self._rng.random() < 0.8 and member.is_there:
                member.link.replace()
                await asyncio.sleep(self._rng.choice([0.0, *PAUSES, LONG]))
            thaw()

    async def _lose(self) -> None:
        self._world.server.loss = self._rng.choice([0.1, 0.3])
        await asyncio.sleep(self._rng.choice(PAUSES))
        self._world.server.loss = 0.0

    async def _purge(self) -> None:
        if self._world.purge(key := self._rng.choice(KEYS)):
            happened.info("the record of %s is gone", key)

    async def _disturb_jetstream(self) -> None:
        jetstream, name = self._world.jetstream, self._rng.choice(["loss", "answer_loss", "late"])
        setattr(jetstream, name, self._rng.choice([0.3, 0.7, 1.0]))
        await asyncio.sleep(self._rng.choice([*PAUSES, LONG]))
        setattr(jetstream, name, 0.0)


async def _schedule(
    processes: Processes, rng: random.Random, stalls: float, without: Collection[str], untyped: list[str]
) -> None:
    purges = rng.random() < 0.1
    idle_timeout = None if purges else rng.choice([None, 0.2, 2.0])
    world = World(processes, rng, tapped=rng.random() < 0.3, idle_timeout=idle_timeout)
    world.jetstream.checks_revisions = "fence" not in without
    chaos, sent, bad = Chaos(world, rng, stalls=stalls, purges=purges), Sent(), list[asyncio.Task[None]]()
    for _ in range(rng.randint(1, 3)):
        await chaos.start(hosts=True)
    for _ in range(2):
        await chaos.start(hosts=False)
    until = processes.now + CHAOS
    feeding = [asyncio.ensure_future(_feed(world, sent, key, random.Random(rng.random()), until)) for key in KEYS]
    while processes.now < until:
        if rng.random() < 0.7:
            _count(world, sent, rng)
        else:
            bad.append(asyncio.ensure_future(chaos.happen()))
        await asyncio.sleep(rng.choice([0.0, 0.0, 0.05, 0.3, 1.0]))
    await asyncio.gather(*bad)
    if not world.there(hosts=True):
        await chaos.start(hosts=True)
    waits = [*sent.waits, *feeding]
    await asyncio.wait(waits, timeout=WITHIN)
    hanging = sum(not one.done() for one in waits)
    assert not hanging, f"{hanging} calls or events hang"
    await asyncio.gather(*feeding)
    reader = await chaos.start(hosts=False)
    for pause in (0.0, LATER):
        await asyncio.sleep(pause)
        for key in KEYS:
            counted = await _counted(reader, key)
            _check(key, sent, counted)
            _check_stream(sent.confirmed.get(key, 0), [int(one[1:]) for one in counted if one.startswith("s")])
    _check_fence(world)
    assert not untyped, "\n".join(untyped)


def _count(world: World, sent: Sent, rng: random.Random) -> None:
    """Count another increment, by a call or an event of any caller, or ask what was counted."""
    caller = rng.choice(world.there(hosts=False))
    number, key = str(len(sent.calls) + len(sent.events)), rng.choice(KEYS)
    if rng.random() < 0.2:
        sent.questions.append((key, sent.acknowledged(key), caller.count(key, "")))
    elif rng.random() < 0.8:
        sent.calls[number] = key, caller.count(key, number)
    else:
        sent.events[number] = caller.publish(key, number)


async def _feed(world: World, sent: Sent, key: str, rng: random.Random, until: float) -> None:
    """Deliver the events of the stream for a key in order, as feeders that take over from one another do.

    An event whose delivery fails is delivered again. So are confirmed ones, as confirmations get lost.
    """
    sequence, late = 0, list[asyncio.Future[None]]()
    while world.processes.now < until:
        sequence += 1
        while True:
            feeders = world.there(hosts=False)
            if rng.random() < 0.1:  # the former feeder does not know yet that it is not the feeder any more
                late.append(rng.choice(feeders).deliver(key, sequence))
            try:
                await rng.choice(feeders).deliver(key, sequence)
                break
            except NatsrtError:
                await asyncio.sleep(rng.choice([0.0, 0.3]))
        sent.confirmed[key] = max(sequence, sent.confirmed.get(key, 0))
        if rng.random() < 0.3:
            sequence -= min(sequence, rng.choice([1, 1, 2, 5]))
        await asyncio.sleep(rng.choice([0.0, 0.1, 0.5]))
    await asyncio.gather(*late, return_exceptions=True)


def _check_stream(confirmed: int, counted: list[int]) -> None:
    """The events of the stream that were confirmed, and perhaps the next one, each once and in order."""
    assert counted in (list(range(1, confirmed + 1)), list(range(1, confirmed + 2))), (
        f"{confirmed} events of the stream were confirmed, and are counted as {counted}"
    )


async def _counted(reader: Member, key: str) -> list[str]:
    """What is in the state of a counter."""
    for _ in range(5):
        try:
            async with asyncio.timeout(WITHIN):
                return (await reader.count(key, "")).split()
        except NatsrtError as error:
            last = error
            await asyncio.sleep(1.0)
    raise AssertionError(f"the state of {key} cannot be read: {last!r}")


def _check(key: str, sent: Sent, counted: list[str]) -> None:
    times = Counter(counted)
    twice = [number for number, count in times.items() if count > 1]
    assert not twice, f"increments of {key} that were counted twice: {twice}"
    for number, (its_key, call) in sent.calls.items():
        error = call.exception()
        assert error is None or isinstance(error, NatsrtError), f"increment {number}: {error!r}"
        if its_key == key and error is None:
            assert number in times, f"increment {number} of {key} was acknowledged, and is lost: {counted}"
            assert number in call.result().split(), f"increment {number} got another reply: {call.result()}"
    for _, before, call in sent.questions:
        error = call.exception()
        assert error is None or isinstance(error, NatsrtError), f"a question: {error!r}"
        missing = set() if error is not None else before - set(call.result().split())
        assert not missing, f"a stale answer, without increments that were acknowledged before: {missing}"
    for number, event in sent.events.items():
        error = event.exception()
        assert error is None or isinstance(error, NatsrtError), f"event {number}: {error!r}"


def _check_fence(world: World) -> None:
    """Each write of a record follows the one that it was to follow."""
    for stored in world.records.log:
        assert stored.follows in (None, stored.before), (
            f"the write at revision {stored.sequence} is not fenced: {stored}"
        )


class _Untyped(logging.Handler):
    """Collects the exceptions that natsrt logs because it did not expect them, with their traceback, and those of tasks
    whose results nobody asks for."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if "\n" in text:
            self.found.append(text)


@contextmanager
def _prepared(seed: int, processes: Processes) -> Iterator[_Untyped]:
    """What is random, and what measures time, follows the seed and the clock of the processes. Some seeds store states
    in parts."""
    drawn, logger, untyped = random.Random(~seed), logging.getLogger("natsrt"), _Untyped()
    random.seed(seed)
    level = logger.level
    with ExitStack() as stack:
        for name in ("os.urandom", "random._urandom"):
            stack.enter_context(patch(name, drawn.randbytes))
        stack.enter_context(patch.object(stall_watch, "monotonic", processes.time))
        if seed % 4 == 0:
            stack.enter_context(patch.object(state_parts, "MAX_BODY_BYTES", 40))
            stack.enter_context(patch.object(state_parts, "_PART_BYTES", 32))
        for one in (logger, logging.getLogger("asyncio")):
            one.addHandler(untyped)
            stack.callback(one.removeHandler, untyped)
        logger.setLevel(logging.INFO if happened.isEnabledFor(logging.INFO) else logging.ERROR)
        try:
            yield untyped
        finally:
            logger.setLevel(level)


def run(seed: int, *, stalls: float = 0.0, without: Collection[str] = ()) -> None:
    """One schedule. Raises AssertionError.

    ``stalls`` is the part of stalled links among what happens, beside those by chance. ``without``: what is taken out,
    of `FAULTS`.
    """
    processes = Processes()
    with _prepared(seed, processes) as untyped, ExitStack() as stack:
        if "promises" in without:
            stack.enter_context(patch.object(CallLog, "begin", _begin_without_promises))
        if "copies" in without:
            stack.enter_context(patch.object(AgentSlot, "counts", lambda slot, call_id: False))
        if "sequences" in without:
            stack.enter_context(patch.object(AgentSlot, "has_applied", lambda slot, event: False))
        processes.run(_schedule(processes, random.Random(seed), stalls, without, untyped.found))


def _begin_without_promises(log: CallLog, call_id: str, now: float, begin: Any = CallLog.begin) -> Any:
    """`CallLog.begin`, as if the worker had promised nothing."""
    promises, log.withdrawn = log.withdrawn, WithdrawnCalls()
    try:
        return begin(log, call_id, now)
    finally:
        log.withdrawn = promises


@click.command()
@explores
@click.option("--stalls", default=0.0, show_default=True, help="The part of stalled links among what happens.")
@click.option("--without", type=click.Choice(FAULTS), multiple=True, help="What to take out, to see that it is found.")
@click.option("--verbose", is_flag=True, help="Show what natsrt logs.")
def main(stalls: float, without: tuple[str, ...], verbose: bool, **exploring: Any) -> None:
    """Try schedules, and print those that break a promise. The exit code is 1 if there are any."""
    if verbose:
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        happened.setLevel(logging.INFO)
    explore(lambda seed: run(seed, stalls=stalls, without=without), **exploring, replay="tests.support.keyed_schedules")


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.support.keyed_schedules", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    main()
