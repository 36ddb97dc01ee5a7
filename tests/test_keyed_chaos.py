"""The promises for keyed agents while workers come, go, die and stand still: `benchmarks.chaos` at a smaller scale.

With ``NATSRT_TEST_TAP=1`` somebody listens to every subject meanwhile, which hides "no responders".
"""

from __future__ import annotations

import pytest

from benchmarks.chaos.history import End, History, Outage
from benchmarks.chaos.ledger import ACKNOWLEDGED, Entry, Ledger
from benchmarks.chaos.scenario import Figure, broken
from benchmarks.chaos.scenarios import counter, doubles, frozen_owner, order, rolling_restart
from tests.support.processes import TAP


def value(figures: list[Figure], name: str) -> object:
    return {figure.name: figure.value for figure in figures}[name]


# -- the promises ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_first_calls_from_many_processes_make_one_instance_each_also_while_workers_die() -> None:
    figures = await doubles.measure(deaths=3, tap=TAP)
    assert broken(figures) == []


@pytest.mark.slow
async def test_no_acknowledged_increment_is_lost_and_none_counts_twice_while_workers_are_killed() -> None:
    figures = await counter.measure(increments=400 if TAP else 2_000, tap=TAP)
    assert broken(figures) == []
    assert value(figures, "workers killed")


@pytest.mark.slow
async def test_an_owner_that_stood_still_saves_nothing_and_drops_what_was_taken_over() -> None:
    assert broken(await frozen_owner.measure(tap=TAP)) == []


@pytest.mark.slow
async def test_callers_notice_nothing_of_a_rolling_restart() -> None:
    figures = await rolling_restart.measure(calls=3_000, tap=TAP)
    assert value(figures, "all: the first errors") == []
    assert broken(figures) == []


@pytest.mark.slow
async def test_calls_and_events_of_one_sender_come_in_order_to_agents_that_nobody_owned() -> None:
    assert broken(await order.measure(messages=5_000, tap=TAP)) == []


# -- the instruments -------------------------------------------------------------------------------------------------


def replied(key: str, sent: float, ended: float, call: str, value: int, worker: str, instance: str) -> Entry:
    return Entry(f"counter/{key}", sent, ended, ACKNOWLEDGED, [call, value, worker, instance])


def test_a_history_tells_what_was_lost_and_what_was_counted_twice() -> None:
    ledger = Ledger(
        [
            replied("a", 1.0, 1.1, "one", 1, "w1", "i1"),
            replied("a", 1.2, 1.3, "two", 2, "w1", "i1"),
            Entry("counter/a", 1.4, 1.5, "WorkerLost"),
        ]
    )
    assert (History([ledger], {"a": ["one", "two"]}).lost, History([ledger], {"a": ["one", "two"]}).applied) == (0, 2)
    assert History([ledger], {"a": ["one"]}).lost == 1
    assert History([ledger], {}).lost == 2
    twice = History([ledger], {"a": ["one", "two", "unacknowledged", "unacknowledged"], "b": ["one"]})
    assert (twice.counted_twice, twice.lost) == (2, 0)


@pytest.mark.parametrize(
    ("instances", "values", "doubles"),
    [
        (["i1", "i1", "i2", "i2"], [1, 2, 3, 4], 0),
        (["i1", "i2", "i1", "i1"], [1, 2, 3, 4], 2),
        (["i1", "i2"], [1, 1], 1),
        (["i1"], [3], 0),
    ],
    ids=["one after the other", "in turns", "the same value", "one"],
)
def test_a_history_tells_when_two_instances_lived_at_the_same_time(
    instances: list[str], values: list[int], doubles: int
) -> None:
    replies = [
        replied("a", 1.0, 2.0, f"call{number}", count, "w", instance)
        for number, (instance, count) in enumerate(zip(instances, values, strict=True))
    ]
    assert History([Ledger(replies)], {}).doubles == doubles


def test_a_history_tells_how_long_agents_were_out_of_reach() -> None:
    history = History(
        [
            Ledger(
                [
                    replied("a", 1.0, 1.1, "1", 1, "w1", "i1"),
                    Entry("counter/a", 1.9, 4.0, "WorkerLost"),
                    Entry("counter/a", 2.5, 2.6, "WorkerLost"),
                    replied("a", 2.7, 3.0, "2", 2, "w2", "i2"),
                    replied("b", 1.0, 1.1, "3", 1, "w2", "i3"),
                    replied("b", 2.1, 2.2, "4", 2, "w2", "i3"),
                ]
            )
        ],
        {},
    )
    ends = [End("w1", 2.0)]
    assert history.outages(ends) == [Outage(new=0.5, any=1.0)]
    assert history.no_reply(ends) == [0.5]
    assert history.outages([End("w2", 2.0)]) == [Outage(new=pytest.approx(0.1), any=pytest.approx(0.1))]
    assert history.no_reply([End("w3", 2.0)]) == []
