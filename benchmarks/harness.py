"""Scenarios, measured in turns.

All variants of a scenario are set up at once and take turns: A B C A B C … The machine drifts, so what is compared is
always a pair of turns of the same round, and a ratio is the median of its rounds' ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers import Peer
from benchmarks.setup import Setup
from benchmarks.teams import ProcessFailed, Team

MORE, LESS = "more", "less"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one turn measured: the figure itself, and CPU microseconds per message where they are known."""

    value: float
    seconds: float = 0.0
    cpu: Mapping[str, float | None] = field(default_factory=dict)


Measure = Callable[[Team, int], Awaitable[Sample]]
"""Measures one turn of a team. The number is how many messages to send; what counts none ignores it."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row: a peer with a setup, and how to measure it.

    Args:
        name: Unique within the scenario.
        x: Where it stands on the x axis of the scenario's plot. None: it is a line of its own.
        missing: Why this peer cannot take part. None: it can, if its packages are installed.
    """

    name: str
    peer: Peer
    measure: Measure
    setup: Setup = Setup()
    x: float | None = None
    missing: str | None = None


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound for a variant: for its figure, or where ``against`` is given for its ratio to that variant's."""

    text: str
    of: str
    against: str | None = None
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is measured together.

    Args:
        name: For the command line.
        title: Of its table.
        unit: Of its figures.
        better: `MORE` or `LESS`.
        baseline: The variant that all others are divided by. None: no ratios.
        most: Messages in one turn at most. None: nothing is counted, and each turn is measured as it is.
        first: Messages in the first turn, which finds out how many fit into one.
        multiple: Messages in a turn are a multiple of this.
        fresh: Whether the processes are started anew for every turn, one variant at a time.
        rounds: How often it is repeated at most. None: as often as the command line says.
        x_title: Title of the plot's x axis, where variants have an ``x``.
    """

    name: str
    title: str
    unit: str
    variants: Sequence[Variant]
    better: str = MORE
    baseline: str | None = None
    goals: Sequence[Goal] = ()
    most: int | None = None
    first: int = 50
    multiple: int = 1
    fresh: bool = False
    rounds: int | None = None
    x_title: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run measures.

    Args:
        rounds: Turns of every variant that count, after the warm-up.
        seconds: Length of one turn, about.
        short: A few messages in each turn: for correctness only.
        loop: ``asyncio`` or ``uvloop``, in all processes alike.
    """

    rounds: int = 5
    seconds: float = 1.0
    short: bool = False
    loop: str = "asyncio"


class Runner:
    """Runs scenarios one after the other. Processes that the next one needs too are kept."""

    def __init__(
        self, settings: Settings, server_url: str, server_pid: int | None, progress: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._server = (server_url, server_pid)
        self._progress = progress
        self._teams: dict[tuple[str, Setup], Team] = {}

    async def run(self, scenario: Scenario) -> dict[str, Any]:
        """Measure it. Returns plain values: see `benchmarks.report`."""
        failures: dict[str, str] = {}
        taking_part = []
        for variant in scenario.variants:
            if reason := variant.missing or variant.peer.missing(variant.setup):
                failures[variant.name] = reason
            else:
                taking_part.append(variant)
        absent = set(failures)
        if not scenario.fresh:
            await self._keep_only(taking_part)
        samples = await self._turns(scenario, taking_part, failures)
        rows = [_row(scenario, variant, samples, failures, absent) for variant in scenario.variants]
        return {
            "name": scenario.name,
            "title": scenario.title,
            "unit": scenario.unit,
            "better": scenario.better,
            "baseline": scenario.baseline,
            "x_title": scenario.x_title,
            "rows": rows,
            "goals": [_outcome(goal, samples) for goal in scenario.goals],
        }

    async def close(self) -> None:
        """End all processes."""
        await self._keep_only([])

    async def _turns(
        self, scenario: Scenario, variants: Sequence[Variant], failures: dict[str, str]
    ) -> dict[str, list[Sample]]:
        counts = {variant.name: scenario.first * scenario.multiple for variant in variants}
        samples: dict[str, list[Sample]] = {variant.name: [] for variant in variants}
        warm_up = 0 if scenario.most is None else 1 if self._settings.short else 2
        rounds = self._settings.rounds if scenario.rounds is None else min(scenario.rounds, self._settings.rounds)
        for number in range(-warm_up, rounds):
            self._progress(f"{scenario.name}: {'warming up' if number < 0 else f'round {number + 1} of {rounds}'}")
            for variant in variants:
                if variant.name in failures:
                    continue
                try:
                    sample = await self._turn(scenario, variant, counts[variant.name])
                except ProcessFailed as error:
                    failures[variant.name] = str(error)
                    samples[variant.name].clear()
                    await self._drop(variant)
                    continue
                if number >= 0:
                    samples[variant.name].append(sample)
                elif not self._settings.short:
                    counts[variant.name] = self._count(scenario, counts[variant.name], sample.seconds)
        return samples

    async def _turn(self, scenario: Scenario, variant: Variant, count: int) -> Sample:
        if not scenario.fresh:
            return await variant.measure(await self._team(variant), count)
        team = self._made(variant)
        await team.start()
        try:
            if scenario.most is not None:
                await variant.measure(team, count)  # new processes warm up too
            return await variant.measure(team, count)
        finally:
            await team.stop()

    def _count(self, scenario: Scenario, count: int, seconds: float) -> int:
        """As many messages as fit into one turn."""
        fitting = int(count / seconds * self._settings.seconds) if seconds else count
        most = scenario.most or fitting
        return max(1, min(fitting, most) // scenario.multiple) * scenario.multiple

    # -- teams ---------------------------------------------------------------------------------------------------

    def _made(self, variant: Variant) -> Team:
        return Team(variant.peer, variant.setup, *self._server, self._settings.loop)

    async def _team(self, variant: Variant) -> Team:
        key = (variant.peer.name, variant.setup)
        if key not in self._teams:
            team = self._made(variant)
            await team.start()
            self._teams[key] = team
        return self._teams[key]

    async def _drop(self, variant: Variant) -> None:
        team = self._teams.pop((variant.peer.name, variant.setup), None)
        if team is not None:
            await team.stop()

    async def _keep_only(self, variants: Sequence[Variant]) -> None:
        needed = {(variant.peer.name, variant.setup) for variant in variants}
        for key in [key for key in self._teams if key not in needed]:
            await self._teams.pop(key).stop()


# -- figures -----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(of: Sequence[Sample], against: Sequence[Sample]) -> list[float]:
    """The ratios of the turns of the same rounds."""
    return [a.value / b.value for a, b in zip(of, against, strict=False)]


def _row(
    scenario: Scenario,
    variant: Variant,
    samples: Mapping[str, Sequence[Sample]],
    failures: Mapping[str, str],
    absent: set[str],
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": variant.name, "peer": variant.peer.name, "x": variant.x}
    if variant.name in failures:
        return row | {"absent" if variant.name in absent else "failed": failures[variant.name]}
    own = samples[variant.name]
    row["value"] = spread([sample.value for sample in own])
    row["samples"] = [sample.value for sample in own]
    baseline = samples.get(scenario.baseline or "", ())
    row["ratio"] = spread(ratios(own, baseline)) if baseline else None
    for name in ("caller_us", "worker_us", "server_us"):
        known = [microseconds for sample in own if (microseconds := sample.cpu.get(name)) is not None]
        row[name] = statistics.median(known) if known else None
    return row


def _outcome(goal: Goal, samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    of, against = samples.get(goal.of, ()), samples.get(goal.against or "", ())
    value: float | None = None
    if of and goal.against is None:
        value = statistics.median(sample.value for sample in of)
    elif of and against:
        value = statistics.median(ratios(of, against))
    met = None
    if value is not None:
        met = value >= goal.at_least if goal.at_least is not None else value <= (goal.at_most or 0)
    return {"text": goal.text, "value": value, "at_least": goal.at_least, "at_most": goal.at_most, "met": met}
