"""Lines of keys: each key's messages in order and one at a time, and no key waits for another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from natsrt.hosting.lines import Again, Lines, Outcome, Settled, Tries
from natsrt.retry_types import RetryOptions
from tests.support import line_schedules, virtual_time
from tests.support.line_schedules import any_schedule
from tests.support.processes import eventually

HANDLED, GIVEN_UP, GONE = Settled
RETRIES = RetryOptions(retry_delay=0.01, retry_delay_max=0.02)


class Place(NamedTuple):
    sequence: int
    key: str


class Hands:
    """Delivers texts, each when the test says how it ends."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.tries: dict[str, Tries] = {}
        self.ends: dict[str, asyncio.Future[Outcome]] = {}
        self.settled_as: list[tuple[int, Settled]] = []
        self.stored: dict[int, str] = {}
        self.begun: dict[int, int] = {}
        self.marked: list[int] = []

    async def deliver(self, place: Place, message: str, tries: Tries) -> Outcome:
        self.began.append(message)
        self.tries[message] = tries
        self.ends[message] = asyncio.get_running_loop().create_future()
        return await self.ends[message]

    async def read(self, place: Place) -> str | None:
        return self.stored.get(place.sequence)

    async def begin(self, place: Place) -> int:
        self.marked.append(place.sequence)
        return self.begun.get(place.sequence, 0)

    def settled(self, place: Place, outcome: Settled) -> None:
        self.settled_as.append((place.sequence, outcome))

    async def end(self, message: str, outcome: Outcome) -> None:
        """Let a delivery end that has begun, or is about to."""
        await eventually(lambda: message in self.ends and not self.ends[message].done())
        self.ends[message].set_result(outcome)
        await asyncio.sleep(0)


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
async def lines(hands: Hands) -> AsyncIterator[Lines[Place, str]]:
    lines = Lines[Place, str](hands, max_bytes=1000, most=100, retries=RETRIES)
    yield lines
    await lines.stop()


def take(lines: Lines[Place, str], *messages: str, size: int = 10) -> list[bool]:
    """Take messages named by their key and sequence, such as ``a1``."""
    return [lines.take(name[0], Place(int(name[1:]), name[0]), name, size) for name in messages]


async def test_the_next_of_a_key_is_delivered_when_the_former_one_is_settled(
    hands: Hands, lines: Lines[Place, str]
) -> None:
    take(lines, "a1", "a2", "b3")
    await eventually(lambda: hands.began == ["a1", "b3"])
    await hands.end("a1", HANDLED)
    await eventually(lambda: hands.began == ["a1", "b3", "a2"])
    assert hands.settled_as == [(1, HANDLED)]
    assert [place.sequence for place in lines.held()] == [2, 3]


async def test_a_message_that_failed_is_delivered_again_in_its_place_until_it_is_given_up(
    hands: Hands, lines: Lines[Place, str]
) -> None:
    take(lines, "a1", "a2", "b3")
    await hands.end("a1", Again(0.01))
    await hands.end("a1", Again(0.0, failed=False))
    await hands.end("b3", HANDLED)
    await eventually(lambda: hands.began == ["a1", "b3", "a1", "a1"])
    assert hands.tries["a1"] == Tries(failures=1, losses=1)
    await hands.end("a1", GIVEN_UP)
    await hands.end("a2", HANDLED)
    assert sorted(hands.settled_as) == [(1, GIVEN_UP), (2, HANDLED), (3, HANDLED)]
    assert lines.room == 100


async def test_a_message_is_not_taken_twice_and_a_settled_one_is_reported_again(
    hands: Hands, lines: Lines[Place, str]
) -> None:
    assert take(lines, "a1", "a1") == [True, False]
    await hands.end("a1", GIVEN_UP)
    await eventually(lambda: hands.settled_as == [(1, GIVEN_UP)])
    assert take(lines, "a1") == [False]
    assert hands.settled_as == [(1, GIVEN_UP)] * 2
    assert hands.began == ["a1"]


async def test_a_key_keeps_a_tenth_of_the_limit_in_memory_and_the_rest_is_read_again(
    hands: Hands, lines: Lines[Place, str]
) -> None:
    take(lines, *(f"a{number}" for number in range(1, 21)))
    await eventually(lambda: hands.began == ["a1"])
    assert lines.bytes_in_memory == 10 + 100 - 10  # the first one was among the ten that waited
    hands.stored = {number: f"a{number}" for number in range(11, 20)}
    for number in range(1, 20):
        await hands.end(f"a{number}", HANDLED)
    await eventually(lambda: hands.settled_as[-1:] == [(20, GONE)])
    assert hands.began == [f"a{number}" for number in range(1, 20)]
    assert lines.bytes_in_memory == 0


async def test_a_blocked_key_holds_up_no_other_one(hands: Hands, lines: Lines[Place, str]) -> None:
    take(lines, *(f"a{number}" for number in range(1, 50)), size=90)
    await hands.end("a1", Again(10_000.0))
    for number in range(50, 99):
        hands.stored[number] = f"b{number}"
        take(lines, f"b{number}", size=90)
        await hands.end(f"b{number}", HANDLED)
    assert hands.began.count("a1") == 1


async def test_a_suspect_is_written_down_once_and_has_failed_as_often_as_it_was_begun(hands: Hands) -> None:
    lines = Lines[Place, str](hands, max_bytes=1000, most=100, retries=RETRIES, suspects_to=1)
    hands.begun = {1: 4}
    take(lines, "a1", "b2")
    await hands.end("a1", Again(0.0))
    await hands.end("a1", HANDLED)
    assert hands.tries["a1"] == Tries(5, 0)
    assert hands.tries["b2"] == Tries(0, 0)
    assert hands.marked == [1]
    await lines.stop()


async def test_a_delivery_that_raises_is_logged_and_counts_as_a_failure(
    hands: Hands, lines: Lines[Place, str], caplog: pytest.LogCaptureFixture
) -> None:
    take(lines, "a1")
    for number in range(3):
        await eventually(lambda number=number: len(hands.began) == number + 1)  # type: ignore[misc]
        assert hands.tries["a1"] == Tries(number, 0)
        hands.ends["a1"].set_exception(ValueError("odd"))
    await hands.end("a1", HANDLED)
    told = [record.getMessage() for record in caplog.records if record.exc_info is not None]
    assert told == [f"delivering the message 1 of a stream failed; again in {after} s" for after in (0.01, 0.02, 0.02)]


async def test_a_message_that_cannot_be_read_again_has_not_failed(hands: Hands) -> None:
    reads: list[int] = []

    async def read(place: Place) -> str:
        reads.append(place.sequence)
        if len(reads) < 3:
            raise ConnectionError
        return "b2"

    hands.read = read  # type: ignore[method-assign]
    lines = Lines[Place, str](hands, max_bytes=10, most=100, retries=RETRIES)  # without room for one that waits
    take(lines, "b2")
    await hands.end("b2", HANDLED)
    assert (reads, hands.tries["b2"]) == ([2, 2, 2], Tries(0, 2))
    await lines.stop()


async def test_stop_waits_for_what_is_under_way_and_returns_what_is_not_settled(hands: Hands) -> None:
    lines = Lines[Place, str](hands, max_bytes=1000, most=100, retries=RETRIES)
    take(lines, "a1", "a2", "b3", "c4")
    await hands.end("c4", Again(10_000.0))
    await eventually(lambda: len(hands.began) == 3)
    stopping = asyncio.ensure_future(lines.stop(within=30.0))
    await asyncio.sleep(0)
    assert take(lines, "d5") == [False]
    await hands.end("a1", HANDLED)
    await hands.end("b3", Again(0.0))
    assert [place.sequence for place in await stopping] == [2, 3, 4]
    assert hands.began == ["a1", "b3", "c4"]


# ---------------------------------------------------------------------------------------------------------------------
# Random schedules

SEEDS = range(30)


@pytest.fixture
def no_logs() -> object:
    """What deliverers raise is part of the schedules."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("no_logs")
@pytest.mark.parametrize("seed", SEEDS)
def test_in_any_schedule_each_message_is_settled_once_and_in_the_order_of_its_key(seed: int) -> None:
    virtual_time.run(any_schedule(seed))


Any_ = Lines[line_schedules.Place, line_schedules.Message]


class NoOrder(Any_):
    def take(self, key, place, message, size):  # type: ignore[no-untyped-def]
        return super().take(f"{key}/{place.sequence}", place, message, size)


class OneAtATime(Any_):
    async def _try(self, line, entry):  # type: ignore[no-untyped-def]
        while any(other.delivering for other in self._lines.values()):
            await asyncio.sleep(0.01)
        return await super()._try(line, entry)


class Copies(Any_):
    def _is_copy(self, place):  # type: ignore[no-untyped-def]
        return False


class AllInMemory(Any_):
    def _has_room(self, line, size):  # type: ignore[no-untyped-def]
        return True


class NoShare(Any_):
    def _has_room(self, line, size):  # type: ignore[no-untyped-def]
        return self._waiting_bytes + size <= self._waiting_room


class NoPause(Any_):
    async def _try(self, line, entry):  # type: ignore[no-untyped-def]
        outcome = await super()._try(line, entry)
        return Again(0.0, outcome.failed) if isinstance(outcome, Again) else outcome


class NoMarks(Any_):
    async def _deliver(self, entry, message):  # type: ignore[no-untyped-def]
        entry.suspect = False
        return await super()._deliver(entry, message)


class NothingLeft(Any_):
    async def stop(self, within=0.0):  # type: ignore[no-untyped-def]
        await super().stop(within)
        return []


@pytest.mark.usefixtures("no_logs")
@pytest.mark.parametrize(
    "kind",
    [NoOrder, OneAtATime, Copies, AllInMemory, NoShare, NoPause, NoMarks, NothingLeft],
    ids=lambda kind: kind.__name__,
)
def test_the_schedules_find_a_rule_that_is_missing(kind: type[Any_]) -> None:
    for seed in SEEDS:
        try:
            virtual_time.run(any_schedule(seed, kind=kind))
        except (AssertionError, KeyError):
            return
    pytest.fail("no schedule went wrong")
