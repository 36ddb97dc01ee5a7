"""Speed of calls and events with growing numbers of agent types, agents, subscriptions and idle workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks import measures
from benchmarks.harness import Measure, Scenario, Variant
from benchmarks.peers import BARE, NATSRT
from benchmarks.setup import Setup

CONCURRENCY = 64


def scenarios(short: bool) -> Iterator[Scenario]:
    sizes = (1, 10) if short else (1, 10, 100, 1_000, 10_000)
    yield _calls("types", "agent types in the worker", sizes, lambda number: Setup(agent_types=number))
    yield _calls(
        "agents",
        "live agents in the worker",
        (1, 10) if short else (1, 100, 10_000, 100_000),
        lambda number: Setup(live_agents=number),
    )
    yield _calls("subscriptions", "subscriptions of the agent type", sizes, _with_subscriptions)
    yield _growth(
        "events-subscriptions",
        "Events to an agent type with more and more subscriptions",
        "subscriptions of the agent type",
        "events handled/s",
        sizes,
        _with_subscriptions,
        measures.events(),
        most=150_000,
    )
    yield _calls(
        "idle-workers",
        "idle workers of another agent type",
        (0, 3) if short else (0, 1, 10, 100),
        lambda number: Setup(idle_workers=number),
        fresh=True,  # otherwise their heartbeats would disturb all variants
    )


def _with_subscriptions(number: int) -> Setup:
    return Setup(subscriptions=number)


def _calls(
    name: str, what: str, sizes: Sequence[int], setup: Callable[[int], Setup], *, fresh: bool = False
) -> Scenario:
    return _growth(
        name,
        f"Calls with more and more {what}, {CONCURRENCY} at a time",
        what,
        "calls/s",
        sizes,
        setup,
        measures.calls(CONCURRENCY),
        most=200_000,
        multiple=CONCURRENCY,
        fresh=fresh,
    )


def _growth(
    name: str,
    title: str,
    what: str,
    unit: str,
    sizes: Sequence[int],
    setup: Callable[[int], Setup],
    measure: Measure,
    *,
    most: int,
    multiple: int = 10,
    fresh: bool = False,
) -> Scenario:
    return Scenario(
        name=f"growth-{name}",
        title=title,
        unit=unit,
        baseline=BARE.name,
        most=most,
        first=1,
        multiple=multiple,
        fresh=fresh,
        x_title=what,
        variants=[
            Variant(name=BARE.name, peer=BARE, measure=measure),
            *(
                Variant(name=f"natsrt, {size:,}", peer=NATSRT, measure=measure, setup=setup(size), x=size)
                for size in sizes
            ),
        ],
    )
