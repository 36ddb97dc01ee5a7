"""``python -m benchmarks``: measures, and prints, saves, plots and documents the figures."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import report
from benchmarks.harness import Runner, Scenario, Settings
from benchmarks.peers import ALL_PEERS
from benchmarks.scenarios import all_scenarios
from natsrt.embedded import EmbeddedServer

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
_WIDTH = 140
"""Width of the tables in columns if the output is not a terminal."""
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("scenarios", nargs=-1)
@click.option("--list", "listing", is_flag=True, help="Only list the scenarios.")
@click.option(
    "--peer", "peers", multiple=True, type=click.Choice([p.name for p in ALL_PEERS]), help="Only these peers."
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Rounds after the warm-up.")
@click.option(
    "--seconds", default=1.0, show_default=True, type=click.FloatRange(0.05), help="Approximate length of a turn."
)
@click.option(
    "--short", is_flag=True, help="Send a few messages in one round, to check correctness. The figures mean nothing."
)
@click.option("--loop", default="asyncio", show_default=True, type=click.Choice(["asyncio", "uvloop"]))
@click.option(
    "--server-config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Configuration of the nats-server. By default, it is that of natsrt.embedded.",
)
@click.option("--json", "json_file", type=_FILE, help="Write the results to this file.")
@click.option("--plot", type=click.Path(file_okay=False, path_type=Path), help="Write PNG and SVG to this directory.")
@click.option(
    "--from",
    "earlier",
    multiple=True,
    type=_FILE,
    help="Measure nothing; read this file, written by --json. Repeat the option for several runs.",
)
@click.option(
    "--update-docs", is_flag=True, help=f"Fill the tables and plots of {DOCUMENT.parent.name}/{DOCUMENT.name}."
)
def main(
    scenarios: tuple[str, ...],
    listing: bool,
    peers: tuple[str, ...],
    rounds: int,
    seconds: float,
    short: bool,
    loop: str,
    server_config: Path | None,
    json_file: Path | None,
    plot: Path | None,
    earlier: tuple[Path, ...],
    update_docs: bool,
) -> None:
    """Compare natsrt with bare nats-py and AutoGen's other runtimes, in turns.

    SCENARIOS are names from --list, or patterns such as 'calls-*'. Without any, all scenarios run.

    The exit code is 1 if a row failed. Rows whose packages are not installed do not count as failed.
    """
    chosen = _chosen(scenarios, peers, short)
    if listing:
        for scenario in chosen:
            print(f"{scenario.name:28}{scenario.title}")
        return
    for module, needed in (("matplotlib", plot is not None or update_docs), ("uvloop", loop == "uvloop")):
        if needed and importlib.util.find_spec(module) is None:
            raise click.UsageError(f"{module} is not installed: pip install 'natsrt[bench,fast]'")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    if earlier:
        runs: list[Any] = [report.load(path) for path in earlier]
        for scenario in runs[-1]["scenarios"]:
            report.show_scenario(scenario, runs[-1]["environment"]["loop"], console)
    else:
        settings = Settings(rounds=1 if short else rounds, seconds=seconds, short=short, loop=loop)
        runs = [asyncio.run(_measure(chosen, settings, console, server_config))]
    results = runs[-1]
    report.show_goals(results, console)
    if json_file is not None:
        report.save(results, json_file)
    if plot is not None:
        for path in report.plot(results, plot):
            report.say(f"wrote {path}")
    if update_docs:
        report.update_document(DOCUMENT, runs, [scenario.name for scenario in all_scenarios(short=False)])
    failed = report.failures(results)
    for failure in failed:
        report.say(f"FAILED {failure}")
    sys.exit(1 if failed else 0)


def _chosen(patterns: tuple[str, ...], peers: tuple[str, ...], short: bool) -> list[Scenario]:
    everything = all_scenarios(short=short)
    for pattern in patterns:
        if not any(fnmatchcase(scenario.name, pattern) for scenario in everything):
            known = ", ".join(scenario.name for scenario in everything)
            raise click.UsageError(f"no scenario {pattern!r}; there are {known}")
    chosen = [
        scenario
        for scenario in everything
        if not patterns or any(fnmatchcase(scenario.name, pattern) for pattern in patterns)
    ]
    if not peers:
        return chosen
    narrowed = [
        replace(scenario, variants=[v for v in scenario.variants if v.peer not in ALL_PEERS or v.peer.name in peers])
        for scenario in chosen
    ]
    return [scenario for scenario in narrowed if scenario.variants]


async def _measure(
    scenarios: list[Scenario], settings: Settings, console: Console, server_config: Path | None
) -> dict[str, Any]:
    environment = report.environment(settings)
    # Installed packages have bytecode. Without this, each process would compile natsrt, which is not installed.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    measured = []
    async with EmbeddedServer(port=-1, config=server_config) as server:
        runner = Runner(settings, server.url, server.pid, report.say)
        try:
            for scenario in scenarios:
                results = await runner.run(scenario)
                report.show_scenario(results, settings.loop, console)
                measured.append(results)
        finally:
            await runner.close()
    return {"environment": environment, "scenarios": measured}


if __name__ == "__main__":
    main()
