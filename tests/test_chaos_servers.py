"""The promises while servers restart, die and hang: the scenarios of `benchmarks.chaos`, smaller."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.chaos.ledger import ACKNOWLEDGED, PENDING, Entry, Ledger
from benchmarks.chaos.scenario import Figure, broken, slowest
from benchmarks.chaos.scenarios import all_scenarios, cluster, hung_server, idle, server_restart
from natsrt.jetstream.agent_bucket import AGENTS_BUCKET
from tests.support.processes import REPOSITORY


def values(figures: list[Figure]) -> dict[str, object]:
    return {figure.name: figure.value for figure in figures}


# -- the promises ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_after_8_s_without_a_server_everything_works_again_within_5_s_and_nobody_is_blind() -> None:
    figures = await server_restart.measure(outages=[server_restart.AWAY], workers=2, callers=1, settle=0.5)
    assert broken(figures) == []


@pytest.mark.slow
async def test_calls_between_survivors_go_on_when_the_leader_of_the_agents_records_is_killed() -> None:
    figures = await cluster.measure(led=AGENTS_BUCKET, settle=0.5)
    assert broken(figures) == []
    assert [
        values(figures)[f"{kind}, between survivors: calls that failed, by error"] for kind in ("plain", "keyed")
    ] == [{}] * 2


@pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 9) or (3, 13) <= sys.version_info < (3, 13, 2),
    reason="asyncio buffers without a limit here (CVE-2024-12254), so that a server that hangs stops nobody",
)
@pytest.mark.slow
@pytest.mark.parametrize("leading", [False, True], ids=["a follower", "the leader"])
async def test_runtimes_with_megabytes_to_send_leave_a_server_that_hangs_within_10_s(leading: bool) -> None:
    figures = await hung_server.measure(leading=leading, settle=0.5)
    assert broken(figures) == []


@pytest.mark.slow
async def test_an_idle_runtime_hears_no_more_among_many_than_among_few() -> None:
    figures = await idle.measure(few=4, many=24, seconds=6.0, heartbeat_interval=0.25, heartbeat_ttl=3.0)
    assert broken(figures) == []


# -- the instruments -------------------------------------------------------------------------------------------------


def test_a_ledger_tells_what_became_of_its_calls() -> None:
    ledger = Ledger(
        [
            Entry("a/k", sent=1.0, ended=1.5, outcome=ACKNOWLEDGED, reply="w"),
            Entry("b/k", sent=1.0, ended=4.0, outcome="WorkerLost"),
            Entry("a/k", sent=4.0, ended=4.5, outcome=ACKNOWLEDGED),
            Entry("a/k", sent=4.5, ended=6.0, outcome=PENDING),
        ]
    )
    assert (ledger.acknowledged, ledger.errors, ledger.untyped) == (2, {"WorkerLost": 1, PENDING: 1}, 1)
    assert (ledger.slowest, ledger.longest_gap) == (3.0, 3.0)
    assert ledger.where(lambda entry: entry.recipient == "b/k").longest_gap == 3.0
    assert Ledger.from_json(ledger.to_json()).entries == ledger.entries
    assert Ledger.together([ledger, ledger]).acknowledged == 4
    assert Ledger().longest_gap == 0.0


def test_a_figure_that_never_came_breaks_its_promise() -> None:
    assert slowest([2.0, 3.0], since=1.0) == 2.0
    assert slowest([2.0, None], since=1.0) is None
    assert slowest([], since=1.0) is None
    assert broken([Figure(name="told", value=None)]) == []
    assert broken([Figure(name="kept", value=2.0, at_most=2.0), Figure(name="exact", value=0, at_least=0)]) == []
    assert broken([Figure(name="late", value=2.1, unit="s", at_most=2.0)]) == ["late: 2.1 s, not ≤ 2"]
    assert len(broken([Figure(name="never", value=None, at_most=2.0)])) == 1


def test_the_command_lists_every_scenario() -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--list"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(all_scenarios())
