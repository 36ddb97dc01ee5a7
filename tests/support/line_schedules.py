"""Random schedules of lines: messages of many keys are slow, fail, lose their owners, come twice and expire.

After each schedule, every message was settled once, or is among those that `Lines.stop` returned. At any time,
messages of a key are delivered one at a time and in order, no more bytes are in memory than allowed, and a message
whose turn has come is delivered at once, unless its bytes find no room beside those that are being delivered.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import click

from natsrt.hosting.lines import Again, Lines, Outcome, Settled, Tries
from natsrt.retry_types import RetryOptions
from tests.support import virtual_time
from tests.support.exploring import explore, explores

SOON = 0.05
"""Seconds within which a message is delivered whose turn has come: reading it again takes some of it."""
RETRIES = RetryOptions(retry_delay=1.0, retry_delay_max=3.0)
"""The delays of messages whose deliverer has raised."""
BLOCKED = 1e9
"""Seconds that pass before a message of a blocked key is delivered again: longer than any schedule."""


class Place(NamedTuple):
    sequence: int
    key: str


class Message:
    """A message in memory. The world counts the bytes of those that are alive."""

    def __init__(self, world: World, sequence: int, size: int) -> None:
        self.sequence = sequence
        self._world, self._size = world, size
        world.alive += size
        world.in_memory[sequence] += 1

    def __del__(self) -> None:
        self._world.alive -= self._size
        self._world.in_memory[self.sequence] -= 1


@dataclass(slots=True)
class Fate:
    """What happens to a message: ``ends`` after these failures and losses, each of which is a pause."""

    size: int
    ends: Settled
    takes: float
    again: list[Again]
    begun: int = 0
    """How often former feeders began to deliver it."""

    @property
    def longest(self) -> float:
        """Seconds in which it ends if nothing else is delivered; 0 if it is blocked."""
        pauses = [max(one.after, RETRIES.retry_delay_max) for one in self.again]
        return 0.0 if BLOCKED in pauses else sum(pauses) + (self.takes + SOON) * (1 + len(pauses))


class World:
    """What the lines deliver to: it knows what should happen, and notices what should not."""

    def __init__(self, rng: random.Random, *, max_bytes: int, most: int) -> None:
        self.rng = rng
        self.max_bytes = max_bytes
        self.suspects_to = rng.choice([0, 0, 15])
        self.alive = self.largest = 0
        self.in_memory: Counter[int] = Counter()
        self.lines: Lines[Place, Message] = Lines(
            self, max_bytes=max_bytes, most=most, retries=RETRIES, suspects_to=self.suspects_to
        )
        self.fates: dict[int, Fate] = {}
        self.left: dict[str, list[int]] = defaultdict(list)
        """By key: the sequences that are taken and not settled."""
        self.ready: dict[int, float] = {}
        """When the turn of a message came."""
        self.running: dict[int, int] = {}
        """The sizes of the messages that are being delivered."""
        self.deliveries: Counter[int] = Counter()
        self.marked: Counter[int] = Counter()
        self.outcomes: dict[int, Settled] = {}
        self.copies: Counter[int] = Counter()
        """Copies that came after a message was settled."""
        self.confirmed: Counter[int] = Counter()
        self.wrong: list[str] = []

    def check(self, holds: bool, what: str) -> None:
        """Write down what does not hold: `Lines` logs what a deliverer raises, and goes on."""
        if not holds:
            self.wrong.append(what)

    # -- what happens to messages

    def new(self, sequence: int, key: str, blocked: bool) -> None:
        rng = self.rng
        size = rng.choice([10, 50, 200, *([self.max_bytes // 9, self.max_bytes // 2 + 1] if self.is_tight else [])])
        self.largest = max(self.largest, size)
        again = [
            Again(rng.choice([0.0, 0.1, 2.0, 30.0]), rng.random() < 0.6) for _ in range(rng.choice([0, 0, 0, 1, 4]))
        ]
        if blocked:
            again = [Again(BLOCKED)]
        ends = rng.choices(list(Settled), [8, 1, 1])[0]
        takes = rng.choice([0.0, 0.0, 0.01, 0.5, 5.0])
        self.fates[sequence] = Fate(size, ends, takes, again, rng.choice([0, 0, 3]))
        self.take(sequence, key)

    def take(self, sequence: int, key: str) -> None:
        fate, place = self.fates[sequence], Place(sequence, key)
        if sequence in self.outcomes:
            self.copies[sequence] += 1
        is_new = self.lines.take(key, place, Message(self, sequence, fate.size), fate.size)
        if is_new:
            self.left[key].append(sequence)
            if self.left[key][0] == sequence:
                self.ready[sequence] = _now()
        self.check_memory()
        waiting = sum(self.fates[one].size for one in self.left[key][1:] if self.in_memory[one])
        self.check(waiting <= self.max_bytes // 10, f"{waiting} bytes of {key} wait in memory, more than its share")

    def check_memory(self) -> None:
        most = self.max_bytes + self.largest
        self.check(self.alive <= most, f"{self.alive} bytes are in memory, of at most {self.max_bytes}")
        self.check(self.lines.bytes_in_memory <= most, f"{self.lines.bytes_in_memory} bytes are said to be in memory")

    # -- as a Deliverer

    async def read(self, place: Place) -> Message | None:
        self._check_turn(place)
        await asyncio.sleep(self.rng.choice([0.0, 0.002]))
        fate = self.fates[place.sequence]
        if fate.ends is Settled.GONE:
            return None
        return Message(self, place.sequence, fate.size)

    async def begin(self, place: Place) -> int:
        self.check(place.sequence <= self.suspects_to, f"{place.sequence} is no suspect")
        self.marked[place.sequence] += 1
        return self.fates[place.sequence].begun

    async def deliver(self, place: Place, message: Message, tries: Tries) -> Outcome:
        sequence = place.sequence
        self.check(message.sequence == sequence, f"{message.sequence} is delivered as {sequence}")
        self._check_turn(place)
        self._check_soon(place)
        fate, number = self.fates[sequence], self.deliveries[sequence]
        self._check_tries(place, tries)
        self.deliveries[sequence] += 1
        self.running[sequence] = fate.size
        try:
            await asyncio.sleep(fate.takes)
            self.check_memory()
        finally:
            del self.running[sequence]
        if number < len(fate.again):
            self.ready[sequence] = _now() + fate.again[number].after
            again = fate.again[number]
            if again.failed and again.after < BLOCKED and self.rng.random() < 0.3:
                self.ready[sequence] = _now() + RETRIES.delay(tries.failures + 1)
                raise RuntimeError("the deliverer failed")
            return fate.again[number]
        return Settled.HANDLED if fate.ends is Settled.GONE else fate.ends

    def settled(self, place: Place, outcome: Settled) -> None:
        sequence = place.sequence
        self.confirmed[sequence] += 1
        if sequence in self.outcomes:
            self.check(outcome is self.outcomes[sequence], f"{sequence} ended in two ways")
            self.check(self.confirmed[sequence] <= 1 + self.copies[sequence], f"{sequence} was settled twice")
            return
        self.outcomes[sequence] = outcome
        self._check_turn(place)
        left = self.left[place.key]
        if place.sequence in left:
            left.remove(place.sequence)
        if left:
            self.ready[left[0]] = _now()

    # -- what must hold

    def _check_turn(self, place: Place) -> None:
        left = self.left[place.key]
        self.check(left[:1] == [place.sequence], f"{place.sequence} of {place.key} comes before {left[:1]}")
        self.check(place.sequence not in self.running, f"{place.sequence} is delivered twice at a time")

    def _check_soon(self, place: Place) -> None:
        late = _now() - self.ready.get(place.sequence, _now())
        self.check(late >= -0.001, f"{place.sequence} is delivered {-late:.3f} s before its pause ends")
        self.check(self.is_tight or late <= SOON, f"{place.sequence} is delivered {late:.3f} s after its turn came")

    def _check_tries(self, place: Place, tries: Tries) -> None:
        fate, number = self.fates[place.sequence], self.deliveries[place.sequence]
        before = fate.again[:number]
        failed = sum(again.failed for again in before)
        base = fate.begun if place.sequence <= self.suspects_to else 0
        self.check(tries == (base + failed, number - failed), f"{place.sequence} is said to have had {tries}")
        marked = self.marked[place.sequence]
        self.check(marked == (place.sequence <= self.suspects_to), f"{place.sequence} was written down {marked} times")

    @property
    def is_tight(self) -> bool:
        """Whether messages may have to wait for those that are being delivered."""
        return self.max_bytes < 1_000_000


async def any_schedule(seed: int, *, kind: type[Lines[Place, Message]] = Lines) -> None:
    """One schedule. Raises AssertionError. ``kind`` is the class of the lines, which may lack a rule."""
    rng = random.Random(seed)
    tight = rng.random() < 0.5
    most = rng.choice([5, 50, 500])
    world = World(rng, max_bytes=rng.choice([500, 5_000]) if tight else 2_000_000, most=most)
    world.lines.__class__ = kind
    keys = [f"k{number}" for number in range(rng.choice([1, 3, 20]))]
    blocked = set(rng.sample(keys, rng.choice([0, 0, 1]))) if len(keys) > 1 else set()
    by_sequence: dict[int, str] = {}
    sequence, stops = 0, rng.random() < 0.3
    for _ in range(rng.choice([20, 200])):
        for _ in range(rng.choice([1, 1, 10])):
            if world.lines.room:
                sequence += rng.choice([1, 1, 3])
                key = rng.choice(keys)
                by_sequence[sequence] = key
                world.new(sequence, key, key in blocked)
        if by_sequence and rng.random() < 0.3:  # the server delivers a message again
            recent = [*list(world.outcomes)[-most:], *(place.sequence for place in world.lines.held())]
            again = rng.choice(recent)
            world.take(again, by_sequence[again])
        await asyncio.sleep(rng.choice([0.0, 0.0, 0.01, 0.3, 3.0]))
    if not stops:
        until = _now() + sum(fate.longest for fate in world.fates.values())
        while _now() < until and any(place.key not in blocked for place in world.lines.held()):
            await asyncio.sleep(5.0)
    waiting = {place.sequence for place in world.lines.held()}
    left = await world.lines.stop(rng.choice([0.0, 1.0]))
    assert not world.wrong, "; ".join(world.wrong[:3])
    sequences = [place.sequence for place in left]
    assert sequences == sorted(by_sequence.keys() - world.outcomes.keys()), "stop returned others than are left"
    assert set(sequences) <= waiting
    if not stops:
        assert {by_sequence[one] for one in sequences} <= blocked, f"not settled: {sequences}"
    assert not world.running
    assert not world.lines.take("k0", Place(sequence + 1, "k0"), Message(world, sequence + 1, 1), 1)
    for one, outcome in world.outcomes.items():
        expected = world.fates[one].ends
        assert outcome is expected or (expected is Settled.GONE and outcome is Settled.HANDLED)
        assert world.confirmed[one] == 1 + world.copies[one], f"{one} was not reported once for each copy"


@click.command()
@explores
def main(**exploring: Any) -> None:
    """Try schedules, and print those in which something is wrong. The exit code is 1 if there are any."""
    logging.disable()  # what deliverers raise is part of the schedules
    explore(lambda seed: virtual_time.run(any_schedule(seed)), **exploring, replay="tests.support.line_schedules")


def _now() -> float:
    return asyncio.get_running_loop().time()


if __name__ == "__main__":
    main()
