"""Calls with tracing: every call, or one in a hundred, is sampled, and spans are exported in batches."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import measures
from benchmarks.harness import Goal, Scenario, Variant
from benchmarks.peers import BARE, NATSRT
from benchmarks.setup import Setup

CONCURRENCY = 64
OFF, ALL, SOME = "natsrt", "natsrt, all sampled", "natsrt, 1 % sampled"


def scenarios(short: bool) -> Iterator[Scenario]:
    measure = measures.calls(CONCURRENCY)
    yield Scenario(
        name="tracing",
        title=f"Calls with tracing in caller and worker, {CONCURRENCY} at a time",
        unit="calls/s",
        baseline=BARE.name,
        most=200_000,
        first=1,
        multiple=CONCURRENCY,
        variants=[
            Variant(name=BARE.name, peer=BARE, measure=measure),
            Variant(name=OFF, peer=NATSRT, measure=measure),
            Variant(name=ALL, peer=NATSRT, measure=measure, setup=Setup(sampled=1.0)),
            Variant(name=SOME, peer=NATSRT, measure=measure, setup=Setup(sampled=0.01)),
        ],
        goals=[
            Goal(
                text="calls/s with tracing exported in batches, all sampled, against no tracing",
                of=ALL,
                against=OFF,
                at_least=0.3,
            ),
            Goal(text="the same with 1 % sampled", of=SOME, against=OFF, at_least=0.85),
        ],
    )
