"""``python -m benchmarks.chaos``: runs the chaos scenarios, and prints their figures."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import traceback
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.chaos.scenario import Figure, Repeated, Scenario, Timed, Value, broken
from benchmarks.chaos.scenarios import all_scenarios
from benchmarks.harness import Settings

_SECONDS, _SHORT_SECONDS = 180.0, 60.0
"""For how long a timed scenario goes on if nothing else is asked."""
_RUNS, _SHORT_RUNS = 200, 20
"""How many runs a repeated scenario has if nothing else is asked."""
_WIDTH = 140
"""Width of the tables in columns if the output is not a terminal."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("scenarios", nargs=-1)
@click.option("--list", "listing", is_flag=True, help="Only list the scenarios.")
@click.option("--short", is_flag=True, help="Less load and fewer processes, with the same failures.")
@click.option("--seconds", type=click.FloatRange(min=1), help="For how long the soak goes on. Default: 180, short: 60.")
@click.option(
    "--runs", type=click.IntRange(min=1), help="How many runs with streams there are. Default: 200, short: 20."
)
@click.option("--seed", type=int, help="Repeat the failures of an earlier soak, or of earlier runs. Default: any.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file."
)
def main(
    scenarios: tuple[str, ...],
    listing: bool,
    short: bool,
    seconds: float | None,
    runs: int | None,
    seed: int | None,
    json_file: Path | None,
) -> None:
    """Kill, freeze and restart workers and servers under load, and print the figures.

    SCENARIOS are names from --list, or patterns such as 'server_*'. Without any, all scenarios run.

    The exit code is 1 if a promise was not kept or a scenario failed.
    """
    chosen = _chosen(scenarios)
    if listing:
        for name, scenario in chosen.items():
            print(f"{name:28}{scenario.title}")
        return
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles natsrt, which is not installed
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    results, wrong = [], []
    for name, scenario in chosen.items():
        report.say(f"{name}: {scenario.title}")
        try:
            figures = asyncio.run(_measured(scenario, short, seconds, runs, seed))
        except Exception:
            traceback.print_exc()
            wrong.append(f"{name} failed")
            continue
        _show(name, scenario, figures, console)
        wrong += [f"{name}, {text}" for text in broken(figures)]
        results.append(_plain(name, scenario, figures))
    if json_file is not None:
        report.save({"environment": _environment(short), "scenarios": results}, json_file)
    for text in wrong:
        report.say(f"NOT KEPT {text}")
    sys.exit(1 if wrong else 0)


async def _measured(
    scenario: Scenario, short: bool, seconds: float | None, runs: int | None, seed: int | None
) -> Sequence[Figure]:
    if not isinstance(scenario, Timed | Repeated):
        return await scenario.measure(short)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    report.say(f"seed {seed}")
    if isinstance(scenario, Repeated):
        return await scenario.measure_runs(runs or (_SHORT_RUNS if short else _RUNS), seed)
    return await scenario.measure_for(seconds or (_SHORT_SECONDS if short else _SECONDS), seed)


def _chosen(patterns: tuple[str, ...]) -> dict[str, Scenario]:
    everything = all_scenarios()
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in everything):
            raise click.UsageError(f"no scenario {pattern!r}; there are {', '.join(everything)}")
    return {
        name: scenario
        for name, scenario in everything.items()
        if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _environment(short: bool) -> dict[str, Any]:
    of_benchmarks = report.environment(Settings(short=short))
    return {name: value for name, value in of_benchmarks.items() if name not in ("rounds", "seconds_per_turn")}


def _plain(name: str, scenario: Scenario, figures: Sequence[Figure]) -> dict[str, Any]:
    return {"name": name, "title": scenario.title, "figures": [figure.to_json() for figure in figures]}


def _show(name: str, scenario: Scenario, figures: Sequence[Figure], console: Console) -> None:
    table = Table()
    for title in ("", "figure", "unit", "promised", "kept"):
        table.add_column(title, justify="right" if title in ("figure", "promised") else "left")
    for figure in figures:
        kept = ("yes" if figure.kept else "NO") if figure.promised else ""
        table.add_row(figure.name, _text(figure.value), figure.unit, figure.bound, kept)
    console.print(f"\n{scenario.title} ({name})", highlight=False)
    console.print(table)


def _text(value: Value) -> str:
    if value is None:
        return "never"
    if isinstance(value, Mapping):
        return ", ".join(f"{count:,} {what}" for what, count in sorted(value.items())) or "none"
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "\n".join(value) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
