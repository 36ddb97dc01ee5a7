"""Calls to a handler that uses 1 ms of CPU time, with one, two and four workers of its type."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import measures
from benchmarks.harness import Goal, Scenario, Variant
from benchmarks.peers import BARE, GRPC, NATSRT
from benchmarks.setup import Setup

CONCURRENCY = 64
WORKERS = (1, 2, 4)


def scenarios(short: bool) -> Iterator[Scenario]:
    yield Scenario(
        name="workers",
        title=f"Calls to a handler with 1 ms of CPU work, {CONCURRENCY} at a time",
        unit="calls/s",
        baseline="bare ×1",
        most=20_000,
        first=1,
        multiple=CONCURRENCY,
        x_title="workers",
        variants=[
            Variant(
                name=f"{peer.name} ×{workers}",
                peer=peer,
                measure=measures.calls(CONCURRENCY),
                setup=Setup(workers=workers, work_ms=1),
                x=workers,
            )
            for peer in (BARE, NATSRT, GRPC)
            for workers in WORKERS
        ],
        goals=[
            Goal(
                text="two workers on two cores against one, a handler with 1 ms of CPU work",
                of="natsrt ×2",
                against="natsrt ×1",
                at_least=1.7,
            )
        ],
    )
