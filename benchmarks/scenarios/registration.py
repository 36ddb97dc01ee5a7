"""Duration of registering and subscribing. Every turn uses new processes."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import measures
from benchmarks.harness import LESS, Scenario, Variant
from benchmarks.peers import BARE, GRPC, HTTP, IN_PROCESS, NATSRT


def scenarios(short: bool) -> Iterator[Scenario]:
    types = 10 if short else 1_000
    one_by_one = measures.in_worker("register", count=types)
    yield Scenario(
        name="register-types",
        title=f"Registering {types:,} agent types",
        unit="s",
        better=LESS,
        fresh=True,
        rounds=3,
        variants=[
            Variant(
                name="natsrt, then start()", peer=NATSRT, measure=measures.in_worker("register_and_start", count=types)
            ),
            Variant(
                name="natsrt, running, at once",
                peer=NATSRT,
                measure=measures.in_worker("register", count=types, at_once=True),
            ),
            Variant(name="natsrt, running, one by one", peer=NATSRT, measure=one_by_one),
            *(Variant(name=peer.name, peer=peer, measure=one_by_one) for peer in (GRPC, HTTP, IN_PROCESS)),
        ],
    )
    count = 10 if short else 500
    yield Scenario(
        name="add-subscription",
        title=f"One `add_subscription` of a running worker, the mean of {count}",
        unit="ms",
        better=LESS,
        baseline=BARE.name,
        fresh=True,
        rounds=3,
        variants=[
            Variant(name=peer.name, peer=peer, measure=measures.in_worker("subscribe", count=count, scale=1e3 / count))
            for peer in (BARE, NATSRT, GRPC, HTTP, IN_PROCESS)
        ],
    )
