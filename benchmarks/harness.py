"""Measures scenarios in turns.

All variants of a scenario are set up together and measured in turns: A B C A B C … The speed of a machine drifts, so
only turns of the same round are compared. A ratio is the median of the ratios of all rounds.
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
    """The result of one turn.

    Args:
        value: The figure.
        seconds: Duration of the timed work in seconds. 0: not known.
        cpu: CPU microseconds per message, by process: ``caller_us``, ``worker_us`` and ``server_us``. None: not known.
    """

    value: float
    seconds: float = 0.0
    cpu: Mapping[str, float | None] = field(default_factory=dict)


Measure = Callable[[Team, int], Awaitable[Sample]]
"""Measures one turn of a team. The second argument is the number of messages; measures without messages ignore it."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row: a peer with a setup, and how to measure it.

    Args:
        name: Unique within the scenario.
        peer: The peer to measure.
        measure: Measures one turn.
        setup: The settings of the peer's processes.
        x: Position on the x axis of the scenario's plot. None: not in that plot.
        missing: The reason why the peer cannot take part. None: it takes part if its packages are installed.
    """

    name: str
    peer: Peer
    measure: Measure
    setup: Setup = Setup()
    x: float | None = None
    missing: str | None = None


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound for the figure of a variant, or for its ratio to the figure of another variant.

    Args:
        text: The goal as text, for the tables.
        of: Name of the variant.
        against: Name of the variant to divide by. None: the bound applies to the figure itself.
        at_least: Lower bound. Exactly one of the two bounds is given.
        at_most: Upper bound.
    """

    text: str
    of: str
    against: str | None = None
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Variants that are measured together and compared.

    Args:
        name: Name on the command line.
        title: Title of the table.
        unit: Unit of the figures.
        variants: The rows of the table.
        better: `MORE` if a larger figure is better, else `LESS`.
        baseline: Name of the variant that all others are divided by. None: no ratios.
        goals: Bounds for the figures.
        most: Maximum number of messages in a turn. None: turns have no number of messages, and there is no warm-up.
        first: Number of messages in the first warm-up turn, divided by ``multiple``. That turn determines how many
            messages fit into a turn.
        multiple: The number of messages in a turn is a multiple of this.
        fresh: Whether new processes are started for every turn, one variant at a time.
        rounds: Maximum number of rounds. None: the number that the settings give.
        x_title: Title of the plot's x axis, if variants have an ``x``. None: no separate plot.
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
    """Settings of a run.

    Args:
        rounds: Number of turns of every variant after the warm-up.
        seconds: Approximate length of a turn in seconds.
        short: Send only a few messages in each turn, to check correctness.
        loop: Event loop of all processes: ``asyncio`` or ``uvloop``.
    """

    rounds: int = 5
    seconds: float = 1.0
    short: bool = False
    loop: str = "asyncio"


class Runner:
    """Runs scenarios one after the other. Keeps the processes that the next scenario also needs.

    Args:
        settings: Settings of the run.
        server_url: URL of the NATS server.
        server_pid: Process id of the NATS server, for its CPU time. None: not measured.
        progress: Called with a line of text for each round.
    """

    def __init__(
        self, settings: Settings, server_url: str, server_pid: int | None, progress: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._server = (server_url, server_pid)
        self._progress = progress
        self._teams: dict[tuple[str, Setup], Team] = {}

    async def run(self, scenario: Scenario) -> dict[str, Any]:
        """Measure a scenario. Returns plain values, which `benchmarks.report` reads."""
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
        """Stop all processes."""
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
                await variant.measure(team, count)  # warms up the new processes
            return await variant.measure(team, count)
        finally:
            await team.stop()

    def _count(self, scenario: Scenario, count: int, seconds: float) -> int:
        """Return the number of messages that fit into one turn."""
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
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(of: Sequence[Sample], against: Sequence[Sample]) -> list[float]:
    """Return the ratio of the two turns of each round."""
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
