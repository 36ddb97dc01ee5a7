"""The soak: everything goes wrong at once, and its own instruments."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import faults, journal
from benchmarks.chaos.faults import Kind, plan
from benchmarks.chaos.journal import Book, Journal, Written
from benchmarks.chaos.ledger import ACKNOWLEDGED, PENDING, Entry, Ledger
from benchmarks.chaos.scenario import broken
from benchmarks.chaos.scenarios import soak

SECONDS = 180.0
SEED = 5
LONG = 3600.0


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_three_minutes_of_everything_that_can_go_wrong_break_no_promise() -> None:
    figures = await soak.measure(SECONDS, SEED)
    assert broken(figures) == [], {figure.name: figure.value for figure in figures}


# -- the plan --------------------------------------------------------------------------------------------------------


def test_the_same_seed_plans_the_same_faults_and_another_one_others() -> None:
    assert plan(1, LONG) == plan(1, LONG) != plan(2, LONG)
    assert {fault.kind for fault in plan(1, LONG)} == set(Kind)
    assert {fault.kind for fault in plan(1, LONG, [Kind.CUT_LINK])} == {Kind.CUT_LINK}


def test_faults_begin_in_order_and_are_over_in_time() -> None:
    planned = plan(1, LONG)
    assert [fault.at for fault in planned] == sorted(fault.at for fault in planned)
    assert all(0 <= fault.at < LONG and fault.until <= LONG for fault in planned)


def test_no_two_servers_and_no_two_workers_are_away_at_once() -> None:
    for group in faults._EXCLUSIVE:
        planned = [fault for fault in plan(1, LONG) if fault.kind in group]
        assert len(planned) > 100
        assert all(earlier.until <= later.at for earlier, later in zip(planned, planned[1:], strict=False))


# -- the ledger ------------------------------------------------------------------------------------------------------


def test_a_journal_counts_what_several_processes_have_written(tmp_path: Path) -> None:
    for words in (["a", "b"], ["b"]):
        one = Journal(str(tmp_path))
        for word in words:
            one.write("handled", word)
        one.close()
    handled = journal.read(str(tmp_path))["handled"]
    assert {name: len(lines) for name, lines in handled.items()} == {"a": 1, "b": 2}
    assert all(line.pid == os.getpid() and line.moment <= time.monotonic() for line in handled["b"])


def loaded(plain: list[Entry], cancelled: list[Entry] = [], ticks: list[Any] = []) -> dict[str, Any]:  # noqa: B006
    return {"plain": Ledger(plain).to_json(), "cancelled": Ledger(cancelled).to_json(), "counters": [], "ticks": ticks}


def book(word: str, **counts: int) -> Book:
    return {word: {name: [Written(1, 1.0)] * count for name, count in counts.items()}}


def call(name: str, outcome: str = ACKNOWLEDGED) -> Entry:
    return Entry("plain/k", 1.0, 2.0, outcome, name)


@pytest.mark.parametrize(
    ("entries", "written", "found"),
    [
        ([call("a"), call("b")], book("handled", a=1, b=1), []),
        ([call("a", "WorkerLost")], {}, []),
        ([call("a")], book("handled", a=2), ["calls that were handled twice"]),
        ([call("a")], {}, ["calls that were answered, and not handled"]),
        ([call("a", PENDING)], {}, ["plain: calls without an end, or with an untyped error"]),
        ([call("a", "KeyError")], {}, ["plain: calls without an end, or with an untyped error"]),
        ([], book("cancelled", x=1), ["handlers that were cancelled, although nobody asked for it"]),
    ],
)
def test_the_ledger_finds_calls_that_went_wrong(entries: list[Entry], written: Book, found: list[str]) -> None:
    figures = soak._of_calls([loaded(entries)], written)
    assert [figure.name for figure in figures if not figure.kept] == found


def test_the_ledger_finds_events_that_were_lost_without_a_reason_or_heard_twice() -> None:
    during, calm = loaded([], ticks=[["a", 1.0], ["b", 1.0]]), loaded([], ticks=[["c", 2.0]])
    kept = soak._of_events([during], [calm], book("heard", b=1, c=1))
    assert broken(kept) == []
    assert {figure.name: figure.value for figure in kept}["events lost during faults"] == 1
    assert len(broken(soak._of_events([during], [calm], book("heard", b=2)))) == 2


def test_the_ledger_finds_what_was_not_given_back() -> None:
    before = {"tasks": 10, "consumers": 1}
    assert broken(soak._of_leaks(before, {"tasks": 25, "consumers": 1})) == []
    assert len(broken(soak._of_leaks(before, {"tasks": 26, "consumers": 2}))) == 2
