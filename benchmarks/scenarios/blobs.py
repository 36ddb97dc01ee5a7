"""Calls whose payloads are sent by reference: how fast, and how much memory they take."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import LESS, Measure, Sample, Scenario, Variant
from benchmarks.peers import NATSRT
from benchmarks.setup import Setup
from benchmarks.teams import Team

MB = 1_000_000
BY_REFERENCE = Setup(options=(("blob_threshold", MB),))


def scenarios(short: bool) -> Iterator[Scenario]:
    for size in (2 * MB,) if short else (2 * MB, 50 * MB, 200 * MB):
        yield Scenario(
            name=f"blob-{size // MB}",
            title=f"Calls by reference with {size // MB} MB of text and as many back, one at a time",
            unit="MB/s",
            most=20,
            first=1,
            variants=[Variant(name="natsrt", peer=NATSRT, measure=transfer(size), setup=BY_REFERENCE)],
        )
        yield Scenario(
            name=f"blob-memory-{size // MB}",
            title=f"Peak memory for a call by reference with {size // MB} MB of text and as many back, as a multiple",
            unit="x",
            better=LESS,
            fresh=True,
            rounds=1,
            variants=[
                Variant(name=name, peer=NATSRT, measure=peak(size, in_worker), setup=BY_REFERENCE)
                for name, in_worker in (("caller", False), ("worker", True))
            ],
        )


def transfer(size: int) -> Measure:
    """Measure the megabytes per second of calls with ``size`` bytes, in both directions together."""

    async def measure(team: Team, count: int) -> Sample:
        seconds = await team.caller.ask("calls", count=count, concurrency=1, size=size)
        return Sample(value=2 * size * count / MB / seconds, seconds=seconds)

    return measure


def peak(size: int, in_worker: bool) -> Measure:
    """Measure the peak memory of a process for a call with ``size`` bytes, as a multiple of ``size``.

    It includes the message itself, as an object and as JSON, and in the caller the message to compare the reply with.
    """

    async def measure(team: Team, count: int) -> Sample:
        member = team.workers[0] if in_worker else team.caller
        await team.caller.ask("calls", count=1, concurrency=1, size=100)
        before = await member.ask("peak_memory")
        await team.caller.ask("calls", count=1, concurrency=1, size=size)
        return Sample(value=(await member.ask("peak_memory") - before) / size)

    return measure
