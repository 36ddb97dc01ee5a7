"""What follows from the end of an attempt to handle an event of a durable topic."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from natsrt.errors import (
    BlobDamaged,
    BlobLost,
    CannotDecode,
    MessageTooLarge,
    NotSettled,
    Reject,
    Retry,
    WorkerLost,
)
from natsrt.hosting.endings import Acknowledge, Bury, Ending, Fate, GiveBack, TryAgain, before_it_begins, fate
from natsrt.jetstream.attempts import Counted
from natsrt.retry_types import RetryOptions

RETRIES = RetryOptions(retry_delay=2.0, retry_delay_max=600.0, max_deliver=12)
ERROR = ValueError("wrong")
LOST = WorkerLost("jobs/a", "w1", "it was killed")
REJECT = Reject("no such job")
SOON, HOUR = Retry(after=5), Retry(after=3600)
PLAIN = Retry(reason="busy")


class OddReject(Reject):
    def __init__(self, reason: Any) -> None:
        self.reason = reason


class OddRetry(Retry):
    def __init__(self, *after: Any) -> None:
        if after:
            [self.after] = after


class RaisingReject(Reject):
    reason = property(lambda self: 1 / 0)

    def __init__(self) -> None:
        pass


ODD, RAISING = OddReject(404), RaisingReject()
AFTER: list[Any] = ["5", None, -1, math.nan, math.inf, True, []]
UNREADABLE = CannotDecode("a message", "it is no JSON", b"{")
GONE = BlobLost("id", 1, 3)
DAMAGED = BlobDamaged("id", "another SHA-256")
LARGE = MessageTooLarge(10, 5)
CANCELLED = asyncio.CancelledError()
LAST = "ValueError in the last of 12 attempts"


@pytest.mark.parametrize(
    ("ending", "follows"),
    [
        # nothing was raised
        ({}, Acknowledge()),
        ({"unknown": True}, GiveBack(2.0)),
        # nobody tried
        ({"refused": True}, GiveBack(2.0)),
        ({"refused": True, "at_once": True}, GiveBack(0.05)),
        ({"refused": True, "error": ERROR, "attempts": 12}, GiveBack(2.0)),
        # cancelled by its publisher, and by something else
        ({"error": CANCELLED, "cancelled": True}, Acknowledge()),
        ({"error": CANCELLED}, TryAgain(CANCELLED, 2.0)),
        ({"error": ERROR, "cancelled": True}, TryAgain(ERROR, 2.0)),
        # its handler raised
        ({"error": ERROR}, TryAgain(ERROR, 2.0)),
        ({"error": ERROR, "begun": False}, TryAgain(ERROR, 2.0)),
        ({"error": ERROR, "attempts": 3}, TryAgain(ERROR, 8.0)),
        ({"error": LOST, "begun": None, "attempts": 2}, TryAgain(LOST, 4.0)),
        ({"error": PLAIN, "attempts": 2}, TryAgain(PLAIN, 4.0)),
        ({"error": SOON, "attempts": 3}, TryAgain(SOON, 5)),
        # the last attempt, and more than that
        ({"error": ERROR, "attempts": 11}, TryAgain(ERROR, 600.0)),
        ({"error": ERROR, "attempts": 12}, Bury(ERROR, LAST, 12)),
        ({"error": ERROR, "attempts": 13}, Bury(ERROR, "ValueError in the last of 13 attempts", 13)),
        ({"error": HOUR, "attempts": 12}, Bury(HOUR, "Retry in the last of 12 attempts", 12)),
        # it will never be handled
        ({"error": REJECT, "attempts": 2}, Bury(REJECT, "no such job", 2)),
        ({"error": REJECT, "attempts": 2, "begun": None}, Bury(REJECT, "no such job", 2)),
        ({"error": UNREADABLE, "begun": False}, Bury(UNREADABLE, str(UNREADABLE), 1)),
        ({"error": UNREADABLE, "begun": None}, Bury(UNREADABLE, str(UNREADABLE), 1)),
        ({"error": GONE, "begun": False}, Bury(GONE, str(GONE), 1)),
        ({"error": DAMAGED, "begun": False}, Bury(DAMAGED, str(DAMAGED), 1)),
        ({"error": LARGE, "begun": False}, Bury(LARGE, str(LARGE), 1)),
        # classes of users that do not keep what natsrt's have
        ({"error": ODD}, Bury(ODD, "404", 1)),
        ({"error": RAISING}, Bury(RAISING, "RaisingReject", 1)),
        *[({"error": OddRetry(after)}, "as usual") for after in AFTER],
        ({"error": OddRetry()}, "as usual"),
        # the same errors, raised by what its handler did
        ({"error": UNREADABLE}, TryAgain(UNREADABLE, 2.0)),
        ({"error": GONE}, TryAgain(GONE, 2.0)),
        ({"error": GONE, "begun": None}, TryAgain(GONE, 2.0)),
        ({"error": LARGE}, TryAgain(LARGE, 2.0)),
        # more than a minute away
        ({"error": HOUR}, TryAgain(HOUR, 3600)),
        ({"error": HOUR, "can_wait": True}, TryAgain(HOUR, 3600, elsewhere=True)),
        ({"error": ERROR, "attempts": 5, "can_wait": True}, TryAgain(ERROR, 32.0)),
        ({"error": ERROR, "attempts": 6, "can_wait": True}, TryAgain(ERROR, 64.0, elsewhere=True)),
        ({"error": Retry(after=60), "can_wait": True}, "in its place"),
        # discarded before
        ({"error": ERROR, "left": 2.1}, TryAgain(ERROR, 2.0)),
        ({"error": HOUR, "left": 3601.0, "can_wait": True}, TryAgain(HOUR, 3600, elsewhere=True)),
        ({"error": ERROR, "left": 2.0}, "buried"),
        ({"error": HOUR, "left": 100.0, "can_wait": True}, "buried"),
        ({"error": ERROR, "left": -5.0}, "buried"),
    ],
)
def test_what_follows_from_the_end_of_an_attempt(ending: dict[str, Any], follows: Fate | str) -> None:
    decided = fate(RETRIES, Ending(**{"attempts": 1, **ending}))
    if follows == "buried":
        assert isinstance(decided, Bury)
        assert "discards it before the next attempt" in decided.reason
        assert (decided.error, decided.attempts) == (ending["error"], 1)
    elif follows == "as usual":
        assert decided == TryAgain(ending["error"], 2.0)
    elif follows == "in its place":
        assert isinstance(decided, TryAgain)
        assert not decided.elsewhere
    else:
        assert decided == follows


@pytest.mark.parametrize(
    ("attempts", "given_up", "begins"),
    [(0, False, True), (11, False, True), (12, False, False), (40, False, False), (0, True, False), (12, True, False)],
)
def test_whether_an_attempt_begins(attempts: int, given_up: bool, begins: bool) -> None:
    decided = before_it_begins(RETRIES, "s", 7, attempts=attempts, given_up=given_up)
    assert (decided is None) == begins
    if given_up:
        assert decided == Acknowledge()  # there is a dead letter
    elif decided is not None:
        assert isinstance(decided, Bury)
        assert isinstance(decided.error, NotSettled)
        assert (decided.attempts, decided.error.sequence, decided.error.attempts) == (attempts, 7, attempts)
        assert decided.reason == str(decided.error)


@pytest.mark.parametrize(
    ("value", "counted"),
    [
        (-1, Counted()),
        (0, Counted()),
        (3, Counted(3)),
        (1_000_000, Counted(0, 1)),
        (5_000_004, Counted(4, 5)),
        (1_000_000_000_000, Counted(0, 0, True)),
        (1_000_002_000_003, Counted(3, 2, True)),
    ],
)
def test_one_number_counts_attempts_and_what_was_given_back_and_whether_there_is_a_dead_letter(
    value: int, counted: Counted
) -> None:
    assert Counted.of(value) == counted


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("no such job", "no such job"),
        ("", ""),
        (404, "404"),
        (7.0, "7.0"),
        (None, "None"),
        (b"x", "b'x'"),
        (ValueError("no such job"), "ValueError: no such job"),
        (KeyError(), "KeyError"),
        (ValueError, "<class 'ValueError'>"),
    ],
)
def test_the_reason_of_a_handler_may_be_any_object(given: object, reason: str) -> None:
    for raised in (Reject(given), Retry(reason=given)):
        assert (raised.reason, type(raised.reason)) == (reason, str)
    assert str(Reject(given)) == reason
