"""Calls per second, and the duration of a single call."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import measures
from benchmarks.harness import LESS, Goal, Scenario, Variant
from benchmarks.peers import ALL_PEERS

GOALS = {
    1: (),
    8: (),
    64: (
        Goal(text="calls/s, 64 callers, against bare `Client.request()`", of="natsrt", against="bare", at_least=0.85),
        Goal(
            text="calls/s against `SingleThreadedAgentRuntime` in process",
            of="natsrt",
            against="in-process",
            at_least=3,
        ),
        Goal(text="calls/s against the gRPC runtime", of="natsrt", against="grpc", at_least=10),
    ),
    512: (),
}


def scenarios(short: bool) -> Iterator[Scenario]:
    yield Scenario(
        name="latency",
        title="One caller: time of a call",
        unit="ms",
        better=LESS,
        baseline="bare",
        most=20_000,
        variants=[Variant(name=peer.name, peer=peer, measure=measures.latency()) for peer in ALL_PEERS],
        goals=[
            Goal(
                text="latency of a single call (median), against bare `Client.request()`",
                of="natsrt",
                against="bare",
                at_most=1.15,
            )
        ],
    )
    for concurrency, goals in GOALS.items():
        yield Scenario(
            name=f"calls-{concurrency}",
            title=f"Calls, {concurrency} at a time",
            unit="calls/s",
            baseline="bare",
            most=200_000,
            first=max(1, 50 // concurrency),
            multiple=concurrency,
            variants=[Variant(name=peer.name, peer=peer, measure=measures.calls(concurrency)) for peer in ALL_PEERS],
            goals=goals,
        )
