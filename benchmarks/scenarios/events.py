"""Events handled per second, with one or ten subscribers, and with one or ten publishers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks import measures
from benchmarks.harness import Goal, Scenario, Variant
from benchmarks.peers import HTTP, PEERS
from benchmarks.setup import Setup

MOST_HANDLED = 150_000
"""Maximum number of handled events in a turn. All may wait in the worker at once, where natsrt allows 64 MB."""

GOALS = (
    Goal(
        text="events/s handled by an agent, one publisher, against a bare callback subscription",
        of="natsrt",
        against="bare",
        at_least=0.38,
    ),
    Goal(text="events/s against the gRPC runtime", of="natsrt", against="grpc", at_least=10),
)


def scenarios(short: bool) -> Iterator[Scenario]:
    yield _events("events-1-1", "Events, one publisher, one agent", Setup(), GOALS)
    yield _events(
        "events-1-10", "Events, one publisher, ten agent types in one worker", Setup(agent_types=10, subscribers=10)
    )
    yield _events("events-10-1", "Events, ten publishers with a connection each, one agent", Setup(publishers=10))


def _events(name: str, title: str, setup: Setup, goals: Sequence[Goal] = ()) -> Scenario:
    return Scenario(
        name=name,
        title=title,
        unit="events handled/s",
        baseline="bare",
        most=MOST_HANDLED // setup.subscribers,
        multiple=10,
        first=5,
        variants=[
            Variant(
                name=peer.name,
                peer=peer,
                setup=setup,
                measure=measures.events(),
                missing="its workers cannot read the events it publishes" if peer is HTTP else None,
            )
            for peer in PEERS
        ],
        goals=goals,
    )
