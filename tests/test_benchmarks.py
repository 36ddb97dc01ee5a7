"""The benchmarks run and count right. No test depends on the machine's speed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from benchmarks import report
from benchmarks.harness import Goal, Runner, Sample, Scenario, Settings, Variant, ratios
from benchmarks.peers import ALL_PEERS, BARE, GRPC, HTTP, IN_PROCESS, NATSRT, OTHERS, Peer
from benchmarks.roles import Role
from benchmarks.scenarios import all_scenarios
from benchmarks.setup import Setup
from benchmarks.teams import Team
from benchmarks.work import Counter, encoded, text_of
from tests.support.processes import REPOSITORY


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def results_of(*scenarios: dict[str, Any]) -> dict[str, Any]:
    return {"environment": report.environment(Settings(rounds=2)), "scenarios": list(scenarios)}


async def measured(scenario: Scenario, settings: Settings) -> dict[str, Any]:
    runner = Runner(settings, "nats://127.0.0.1:1", None, lambda text: None)
    try:
        return await runner.run(scenario)
    finally:
        await runner.close()


class Reporter(Role):
    """A process for what the harness itself does."""

    async def start(self) -> None:
        """Nothing is needed."""

    async def stop(self) -> None:
        """Nothing is left."""

    async def loop_module(self) -> str:
        return type(asyncio.get_running_loop()).__module__

    async def fail(self) -> None:
        raise LookupError("as it should")


ROLES = {"caller": Reporter}
REPORTER = Peer(name="reporter", title="reports of itself", module=__name__, has_workers=False)


def sequence(*values: float) -> Any:
    """A measure that gives one value after the other."""
    left = iter(values)

    async def measure(team: Team, count: int) -> Sample:
        return Sample(value=next(left))

    return measure


async def fails(team: Team, count: int) -> Sample:
    await team.caller.ask("fail")
    raise AssertionError("unreachable")


@pytest.mark.parametrize("size", [100, 1_000, 100_000, 1_000_000])
def test_a_text_is_as_many_bytes_of_json_as_it_is_asked_for(size: int) -> None:
    text = text_of(size)
    assert len(encoded(text)) == size
    assert orjson.loads(encoded(text)) == {"content": text.content}


async def test_a_counter_waits_for_the_last_event_and_begins_anew() -> None:
    counter = Counter()
    for _ in range(2):
        counter.add()
        reached = asyncio.ensure_future(counter.reach(2))
        await asyncio.sleep(0)
        assert not reached.done()
        counter.add()
        await reached


def test_ratios_are_taken_between_turns_of_the_same_round() -> None:
    slow, fast = [Sample(value=value) for value in (10, 20)], [Sample(value=value) for value in (20, 80)]
    assert ratios(slow, fast) == [0.5, 0.25]


@pytest.mark.parametrize("short", [False, True])
def test_every_scenario_has_a_name_of_its_own_and_names_only_its_own_rows(short: bool) -> None:
    scenarios = all_scenarios(short=short)
    assert len({scenario.name for scenario in scenarios}) == len(scenarios)
    for scenario in scenarios:
        rows = [variant.name for variant in scenario.variants]
        assert len(set(rows)) == len(rows), scenario.name
        named = {scenario.baseline, *(goal.of for goal in scenario.goals), *(goal.against for goal in scenario.goals)}
        assert named - {None} <= set(rows), scenario.name
        for goal in scenario.goals:
            assert (goal.at_least is None) != (goal.at_most is None), goal.text


def test_goals_have_texts_of_their_own() -> None:
    texts = [goal.text for scenario in all_scenarios(short=False) for goal in scenario.goals]
    assert len(set(texts)) == len(texts)


def test_a_peer_says_which_package_it_lacks() -> None:
    peer = Peer(name="x", title="x", module="x", requires=("no_such_package.part",))
    assert peer.missing(Setup()) == "not installed: no_such_package.part"
    assert BARE.missing(Setup(workers=2)) is None


async def test_rows_have_medians_spread_ratios_and_goals_their_verdict() -> None:
    scenario = Scenario(
        name="s",
        title="S",
        unit="x/s",
        baseline="a",
        variants=[
            Variant(name="a", peer=REPORTER, measure=sequence(10, 40, 20)),
            Variant(name="b", peer=REPORTER, measure=sequence(5, 10, 20)),
        ],
        goals=[
            Goal(text="met", of="b", against="a", at_least=0.5),
            Goal(text="not met", of="b", at_most=9),
            Goal(text="not measured", of="missing", at_most=9),
        ],
    )
    results = await measured(scenario, Settings(rounds=3))
    _, b = results["rows"]
    assert b["value"] == {"median": 10, "min": 5, "max": 20}
    assert b["ratio"] == {"median": 0.5, "min": 0.25, "max": 1}
    assert b["samples"] == [5, 10, 20]
    assert [(goal["value"], goal["met"]) for goal in results["goals"]] == [(0.5, True), (10, False), (None, None)]


async def test_a_row_that_fails_says_so_and_the_others_go_on() -> None:
    scenario = Scenario(
        name="s",
        title="S",
        unit="x/s",
        baseline="broken",
        variants=[
            Variant(name="broken", peer=REPORTER, measure=fails),
            Variant(name="absent", peer=REPORTER, measure=fails, missing="for a reason"),
            Variant(name="sound", peer=REPORTER, measure=sequence(1)),
        ],
    )
    results = results_of(await measured(scenario, Settings(rounds=1)))
    broken, absent, sound = results["scenarios"][0]["rows"]
    assert broken["failed"].startswith("reporter caller: LookupError: as it should\n")
    assert 'in fail\n    raise LookupError("as it should")' in broken["failed"]  # what the process wrote
    assert absent["absent"] == "for a reason"
    assert sound["value"]["median"] == 1
    assert sound["ratio"] is None
    [failure] = report.failures(results)
    assert failure.startswith("s, broken: ")


def a_scenario(name: str = "calls", **more: Any) -> dict[str, Any]:
    cpu = {"caller_us": 1.0, "worker_us": None, "server_us": None}
    one, half = {"median": 1, "min": 1, "max": 1}, {"median": 0.5, "min": 0.25, "max": 0.75}
    return {
        "name": name,
        "title": name.title(),
        "unit": "calls/s",
        "better": "more",
        "baseline": "bare",
        "x_title": None,
        "rows": [
            {"name": "bare", "peer": "bare", "x": None, "value": one, "ratio": one, "samples": [1], **cpu},
            {"name": "natsrt", "peer": "natsrt", "x": 3, "value": half, "ratio": half, "samples": [0.5], **cpu},
            {"name": "grpc", "peer": "grpc", "x": None, "absent": "not installed: grpc"},
        ],
        "goals": [{"text": f"{name} are fast", "value": 0.5, "at_least": 0.4, "at_most": None, "met": True}],
    } | more


needs_uvloop = pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is missing")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is missing")


@needs_matplotlib
def test_the_sections_of_a_document_are_filled_and_its_text_stays(tmp_path: Path) -> None:
    sections = ["environment", "goals", "plots", "tables", "calls", "unknown"]
    document = tmp_path / "performance.md"
    document.write_text(
        "# Title\n" + "\n".join(f"{s}:\n<!-- benchmark: {s} -->\nold {s}\n<!-- /benchmark -->" for s in sections)
    )
    for _ in range(2):  # filling again changes nothing
        report.update_document(document, [results_of(a_scenario()), results_of(a_scenario())], ["calls"])
    text = document.read_text()
    assert text.startswith("# Title\nenvironment:\n<!-- benchmark: environment -->\n")
    assert "| calls are fast | ≥ 0.4 | 0.5 | 0.5 | yes |" in text
    assert text.count("| natsrt | 0.5 (0.25 … 0.75) | 0.5 (0.25 … 0.75) | 1.0 |  |") == 2
    assert "not installed: grpc" in text
    assert text.count("old ") == 1
    assert "old unknown" in text
    assert "[![ratios](performance/ratios.svg)](performance/ratios.png)" in text
    assert (tmp_path / "performance" / "ratios.png").exists()


def test_a_run_of_some_scenarios_fills_only_their_sections(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    sections = ["environment", "goals", "plots", "tables", "calls", "events"]
    document.write_text("".join(f"<!-- benchmark: {s} -->\nold {s}\n<!-- /benchmark -->\n" for s in sections))
    report.update_document(document, [results_of(a_scenario())], ["calls", "events"])
    text = document.read_text()
    assert [one for one in sections if f"old {one}" not in text] == ["calls"]
    assert "| natsrt | 0.5 (0.25 … 0.75)" in text
    assert list(tmp_path.iterdir()) == [document]


@needs_matplotlib
def test_plots_are_written_as_png_and_svg(tmp_path: Path) -> None:
    results = results_of(a_scenario(), a_scenario("growth", x_title="agents"))
    written = report.plot(results, tmp_path / "plots")
    assert {path.name for path in written} == {"ratios.png", "ratios.svg", "growth.png", "growth.svg"}
    assert all(path.stat().st_size > 1_000 for path in written)


@pytest.mark.parametrize("loop", ["asyncio", pytest.param("uvloop", marks=needs_uvloop)])
async def test_processes_run_on_the_chosen_loop_and_end_with_their_team(loop: str) -> None:
    team = Team(REPORTER, Setup(), "", None, loop)
    await team.start()
    try:
        assert (await team.caller.ask("loop_module")).startswith(loop)
    finally:
        await team.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(team.caller.pid, 0)


def test_a_scenario_that_does_not_exist_is_an_error_that_lists_the_others() -> None:
    outcome = run("callz")
    assert outcome.returncode == 2
    assert "no scenario 'callz'" in outcome.stderr
    assert "calls-64" in outcome.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_run_measures_every_row_of_every_scenario(tmp_path: Path) -> None:
    own = [f"--peer={peer.name}" for peer in (BARE, NATSRT, IN_PROCESS)]  # the others: see below
    outcome = run("--short", *own, "--json", str(tmp_path / "results.json"))
    assert outcome.returncode == 0, outcome.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [s["name"] for s in results["scenarios"]] == [s.name for s in all_scenarios(short=True)]
    rows = [row for scenario in results["scenarios"] for row in scenario["rows"] if "absent" not in row]
    assert all(row["samples"] for row in rows)
    assert {"bare", "natsrt", "in-process"} <= {row["peer"] for row in rows}
    assert {row["peer"] for row in rows} <= {
        *(peer.name for peer in ALL_PEERS),
        "python",
        "nats-py kv",
        "pulls",
        "stores",
        "serializers",
        "streams",
        "tasks",
        "large",
    }


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("peer", [GRPC, HTTP, *OTHERS], ids=lambda peer: peer.name)
def test_another_kind_of_runtime_is_measured_beside_natsrt(peer: Peer, tmp_path: Path) -> None:
    if (reason := peer.missing(Setup())) is not None:
        pytest.skip(f"{reason}; it is in the extra bench-others, which is not for development")
    outcome = run("--short", "latency", "calls-8", "--peer", peer.name, "--json", str(tmp_path / "results.json"))
    assert outcome.returncode == 0, outcome.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [row for scenario in results["scenarios"] for row in scenario["rows"]]
    assert [row["name"] for row in rows if row["samples"]] == [peer.name] * 2


@pytest.mark.slow
def test_the_figures_of_an_earlier_run_are_shown_again(tmp_path: Path) -> None:
    kept = tmp_path / "results.json"
    measured_now = run("--short", "calls-64", "--peer", "bare", "--peer", "natsrt", "--json", str(kept))
    assert measured_now.returncode == 0, measured_now.stderr
    shown = run("--from", str(kept))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == measured_now.stdout


@pytest.mark.slow
@needs_uvloop
def test_peers_run_on_uvloop_too() -> None:
    outcome = run("--short", "--loop", "uvloop", "calls-8", "events-1-1")
    assert outcome.returncode == 0, outcome.stderr
    assert "(calls-8, uvloop)" in outcome.stdout
