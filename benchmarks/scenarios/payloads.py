"""Calls with large texts as request and reply."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import measures
from benchmarks.harness import Goal, Scenario, Variant
from benchmarks.peers import PEERS

CONCURRENCY = 8


def scenarios(short: bool) -> Iterator[Scenario]:
    for size in (100, 100_000, 1_000_000):
        goal = Goal(
            text=f"calls with {size:,} bytes of text, against bare `request()`",
            of="natsrt",
            against="bare",
            at_least=0.7,
        )
        yield Scenario(
            name=f"payload-{size}",
            title=f"Calls with {size:,} bytes of text and as many back, {CONCURRENCY} at a time",
            unit="calls/s",
            baseline="bare",
            most=100_000,
            first=2,
            multiple=CONCURRENCY,
            variants=[Variant(name=peer.name, peer=peer, measure=measures.calls(CONCURRENCY, size)) for peer in PEERS],
            goals=[goal] if size > 100 else [],
        )
